"""Whether the weights have settled."""

from collections.abc import Sequence

import numpy as np

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust, has_evidence

MOVING = 0.03  # a change of a weight that a reader would notice


def still_moving(trust: Trust) -> Sequence[Finding]:
    """Compares the weights with those before the last third of the rounds; in a single loop, the means of two quarters."""
    if trust.has_one_source or (trust.of_rounds and not has_evidence(trust)) or len(trust.weights) < 4:
        return []
    if trust.of_rounds:
        part, span = "third of the rounds", max(1, len(trust.weights) // 3)
        change = trust.weights[-1] - trust.weights[-1 - span]
    else:
        part, span = "quarter", len(trust.weights) // 4
        change = trust.weights[-span:].mean(0) - trust.weights[-2 * span : -span].mean(0)
    most = int(np.abs(change).argmax())
    if abs(change[most]) > MOVING:
        words = f"still moving: the weight of {trust.names[most]!r} changed by {change[most]:+.3f} over the last {part}"
        return [Finding("still-moving", True, words)]
    if not trust.of_rounds:  # a loop that is about to turn looks settled
        return []
    words = f"settled: no weight changed by more than {max(abs(change[most]), 0.001):.3f} over the last {part}"
    return [Finding("still-moving", False, words, passed=True)]
