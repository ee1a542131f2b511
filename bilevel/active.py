"""Which blocks of the lower variable train at step t: a pure function of (seed, t), as a rule the same for every replica."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bilevel.blocks import EMBEDDING, HEAD, REST, Blocks
from bilevel.data import Stream, generator
from bilevel.errors import InputError


class Active(ABC):
    """A rule that chooses the blocks that train at each step."""

    @abstractmethod
    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """Names of the blocks that train at step t. Raises `InputError` if the rule does not fit the module."""

    def of_replica(self, number: int) -> "Active":
        """The rule for replica number `number` of the lower variable. By default all replicas have the same one."""
        return self

    def heaviest(self, blocks: Blocks, sizes: Mapping[str, int]) -> list[frozenset[str]]:
        """Sets of blocks of which one needs the most memory. By default this is all blocks at once.

        sizes: the number of parameters of each block.
        """
        return [blocks.names]

    def lighter(self) -> Sequence["Active"]:
        """Rules by which less trains at a time, the nearest first: what a planner may advise. None by default."""
        return ()


@dataclass(frozen=True)
class All(Active):
    """Every block trains at every step."""

    name: Literal["all"] = "all"

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """Return all blocks."""
        return blocks.names

    def lighter(self) -> Sequence[Active]:
        """A random few."""
        return (LISA(),)


@dataclass(frozen=True)
class LISA(Active):
    """Layerwise importance sampling (LISA, arXiv 2403.17919): a few random repeated blocks train, the others are frozen.

    blocks: how many repeated blocks train at a time.
    period: steps for which a draw is kept.
    embedding, head, rest: whether the parts that do not repeat train ("rest" is the final norm and whatever else is outside
        the repeated blocks). The LISA paper trains all of them all the time. They are frozen here by default: in a small
        model the embedding is a large share of all parameters, a trained embedding makes every backward pass run to the
        bottom of the model, and source weights are a comparison of two replicas, not a model to ship. Set them to "train" to
        follow the paper.

    independent: whether every replica has a draw of its own, as in the code of ScaleBiO's authors. By default both get the
        same one: with independent draws the difference of the two, which the penalty multiplies, has an error that does not
        shrink as the penalty grows. Solvers that copy one replica to another refuse it.

    The draw is uniform without replacement.
    """

    blocks: int = 2
    period: int = 5
    embedding: Literal["train", "freeze"] = "freeze"
    head: Literal["train", "freeze"] = "freeze"
    rest: Literal["train", "freeze"] = "freeze"
    independent: bool = False
    name: Literal["lisa"] = "lisa"

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if self.period < 1:
            raise ValueError(f"period must be at least 1, not {self.period}")

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """The blocks drawn for the period that contains step t. Raises `InputError` if the module has too few."""
        return self._drawn(t, blocks, seed, 0)

    def of_replica(self, number: int) -> Active:
        """This rule, or one with other draws if they are independent."""
        return _OtherDraws(self, number) if self.independent and number else self

    def _drawn(self, t: int, blocks: Blocks, seed: int, replica: int) -> frozenset[str]:
        if self.blocks > len(blocks.repeated):
            raise InputError(
                f"active.blocks is {self.blocks}, but the lower module has {len(blocks.repeated)} repeated blocks; "
                "lower active.blocks or use `active: {name: all}`"
            )
        if blocks.head_is_embedding and self.head != self.embedding:
            raise InputError(
                f"active.head is {self.head!r} and active.embedding {self.embedding!r}, "
                "but this model ties the two weights; give both the same value"
            )
        purpose = (t // self.period, *([replica] if replica else []))
        draw = generator(seed, Stream.ACTIVE, *purpose).choice(len(blocks.repeated), size=self.blocks, replace=False)
        return self._always(blocks) | {blocks.repeated[i] for i in np.sort(draw)}

    def heaviest(self, blocks: Blocks, sizes: Mapping[str, int]) -> list[frozenset[str]]:
        """The largest blocks, and the first block (all above it keep activations) with the largest others."""
        first, *others = blocks.repeated
        by_size = sorted(others, key=lambda block: -sizes[block])
        largest = sorted(blocks.repeated, key=lambda block: -sizes[block])[: self.blocks]
        return [
            self._always(blocks) | draw
            for draw in dict.fromkeys((frozenset(largest), frozenset([first, *by_size[: self.blocks - 1]])))
        ]

    def lighter(self) -> Sequence[Active]:
        """Half as many repeated blocks, a quarter, and so on down to one."""
        return [replace(self, blocks=self.blocks >> k) for k in range(1, self.blocks.bit_length())]

    def _always(self, blocks: Blocks) -> frozenset[str]:
        """The parts that do not repeat and train at every step."""
        policy = {EMBEDDING: self.embedding, HEAD: self.head, REST: self.rest}
        return frozenset(block for block, rule in policy.items() if rule == "train" and block in blocks.members)


@dataclass(frozen=True)
class _OtherDraws(Active):
    """What a replica has instead of the draws of the first one."""

    rule: LISA
    replica: int

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        return self.rule._drawn(t, blocks, seed, self.replica)


ActiveRule = Annotated[All | LISA, Field(discriminator="name")]
