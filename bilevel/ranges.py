"""Numbers as settings have them: finite, and in a range. A recipe's values are held to them by pydantic."""

from typing import Annotated

from pydantic import Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that is kept at a step: with 1 nothing new would ever come in."""
Count = Annotated[int, Field(ge=1, le=10**12)]
"""A number of steps, rows or tokens. What is larger is a slip: 10^12 steps of a millisecond take 30 years."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
