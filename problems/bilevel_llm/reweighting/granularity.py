"""What carries a weight: every source, every row, or a scorer that sees the features of a row.

All three are one distribution p over the rows of all sources, and the lower loss is Σ_rows p_r · L2_r, L2_r being the mean
over the row's labelled tokens:

    p_r = floor / n_i  +  (1 - k · floor) · softmax_r( log p⁰_r + s_r )        (i: the row's source, n_i its rows, k sources)

p⁰ spreads the start `initial` evenly over each source's rows. What differs is what may learn:

    per: source      s_r = s_i, one logit a source       (Pan et al., arXiv 2406.19976)
    per: sample      s_r free, one logit a row           (hyper-cleaning, Franceschi et al., arXiv 1703.01785)
    per: scorer      s_r = scorer(features of the row)

Hyper-cleaning weighs rows by a sigmoid each. Here they share a softmax: the sigmoids' common factor changes nothing about
the minimizer of an unregularized loss, but it lets all weights drift to 0, and with them the lower loss that the
penalty is measured by. The softmax has no such freedom, is a mixture (which is what a trainer can use), and has "per source"
as its special case.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from bilevel import InputError

BYTES_OF_A_ROW = 72
"""What a row with a weight of its own takes: its logit, gradient and two moments, and its part of the softmax."""


@dataclass(frozen=True)
class PerSource:
    """One weight for each source."""

    per: Literal["source"] = "source"


@dataclass(frozen=True)
class PerSample:
    """One weight for each row. This is for small data: a row must be drawn several times before its weight means something.

    max_rows: the largest number of rows that is accepted. Each row takes about `BYTES_OF_A_ROW` bytes, and its weight is a
        line of the result.
    """

    max_rows: int = 1_000_000
    per: Literal["sample"] = "sample"

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {self.max_rows}")

    def check(self, rows: int) -> None:
        """Raise `InputError` if there are more rows than are allowed."""
        if rows > self.max_rows:
            raise InputError(
                f"problem.granularity: one weight for each of {rows:,} rows takes {BYTES_OF_A_ROW * rows / 1e6:,.0f} MB, "
                "and a softmax over all of them in every forward; take {per: scorer}, fewer rows, or raise "
                f"problem.granularity.max_rows ({self.max_rows:,})"
            )


@dataclass(frozen=True)
class PerScorer:
    """The weight of a row is a function of its features. With few parameters, it also suits data too large to see whole.

    features: the names of one or several feature functions (`bilevel list` shows them); their columns are put side by side.
    hidden: the number of units of a hidden tanh layer. With 0, the scorer is linear, and its weights can be interpreted.
    """

    features: str | list[str]
    hidden: int = 0
    per: Literal["scorer"] = "scorer"

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("features: name at least one; `bilevel list` shows them")
        if len(set(self.names)) < len(self.names):
            raise ValueError("features: a name is given twice")
        if self.hidden < 0:
            raise ValueError(f"hidden must be at least 0, not {self.hidden}")

    @property
    def names(self) -> list[str]:
        """The names of the features, as a list."""
        return [self.features] if isinstance(self.features, str) else list(self.features)


Granularity = Annotated[PerSource | PerSample | PerScorer, Field(discriminator="per")]
