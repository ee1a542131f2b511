"""What carries a weight: every source, every row, or a scorer that sees the features of a row.

All three are one distribution p over the rows of all sources, and the lower loss is Σ_rows p_r · L2_r, L2_r being the mean
over the row's labelled tokens:

    p_r = floor / n_i  +  (1 - k · floor) · softmax_r( log p⁰_r + s_r )        (i: the row's source, n_i its rows, k sources)

p⁰ spreads the start `initial` evenly over each source's rows. What differs is what may learn:

    per: source      s_r = s_i, one logit a source       (Pan et al., arXiv 2406.19976)
    per: sample      s_r free, one logit a row           (hyper-cleaning, Franceschi et al., arXiv 1703.01785)
    per: scorer      s_r = scorer(features of the row)

Hyper-cleaning weighs rows by a sigmoid each. Here they share a softmax: the sigmoids' common factor changes nothing about
the minimiser of an unregularised loss, but it lets all weights drift to 0, and with them the lower loss that the
penalty is measured by. The softmax has no such freedom, is a mixture (which is what a trainer can use), and has "per source"
as its special case.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True)
class PerSource:
    """One weight for each source."""

    per: Literal["source"] = "source"


@dataclass(frozen=True)
class PerSample:
    """One weight for each row. For small data: a row must be drawn several times before its weight says something.

    max_rows: more rows than this are refused. A row takes about 72 bytes (logit, gradient, two moments, and what a softmax
        over all rows needs in every forward), and its weight is a line of the result.
    """

    max_rows: int = 1_000_000
    per: Literal["sample"] = "sample"

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {self.max_rows}")


@dataclass(frozen=True)
class PerScorer:
    """The weight of a row is a function of its features: few parameters, so it also serves data too large to see whole.

    features: names of feature functions (`bilevel list`), one or several; their columns stand side by side.
    hidden: units of a hidden tanh layer. 0: a linear scorer, whose weights can be read.
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
        """The features as a list."""
        return [self.features] if isinstance(self.features, str) else list(self.features)


Granularity = Annotated[PerSource | PerSample | PerScorer, Field(discriminator="per")]
