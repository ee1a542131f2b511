"""Whether the weights have settled."""

from collections.abc import Sequence

import numpy as np

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust

MOVING = 0.02  # a change of the mean weight from one quarter to the next that a reader would notice


def still_moving(trust: Trust) -> Sequence[Finding]:
    """Compares the mean weights over the last two quarters of the steps that could move them."""
    if trust.has_one_source:
        return []
    quarter = len(trust.weights) // 4
    change = trust.weights[-quarter:].mean(0) - trust.weights[-2 * quarter : -quarter].mean(0)
    most = int(np.abs(change).argmax())
    if abs(change[most]) > MOVING:
        words = (
            f"still moving: the weight of {trust.names[most]!r} changed by {change[most]:+.3f} over the last quarter; "
            "more steps would move it further"
        )
        return [Finding("still-moving", True, words)]
    words = f"settled: no weight changed by more than {max(abs(change[most]), 0.001):.3f} over the last quarter"
    return [Finding("still-moving", False, words)]
