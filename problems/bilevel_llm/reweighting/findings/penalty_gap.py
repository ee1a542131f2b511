"""Whether y stays close enough to z for their difference to be a derivative."""

from collections.abc import Sequence

import numpy as np

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust, has_evidence

OPEN_GAP = 0.02  # as a share of the lower loss: y is then measurably worse, or better, on the training mix than z is


def penalty_gap(trust: Trust) -> Sequence[Finding]:
    """Looks at the gap g(y) - g(z) over the last quarter of each round, or of the steps that could move the weights."""
    if trust.of_rounds:
        late = [records[-max(1, trust.horizon // 4) :] for records in trust.rounds]
    else:
        late = [trust.moving[-max(1, len(trust.moving) // 4) :]]
    if trust.has_one_source or not late or not late[-1] or "gap" not in late[-1][-1].metrics:
        return []
    numbers = [(record.metrics["gap"], record.metrics["lower_loss"]) for records in late for record in records]
    gaps, losses = zip(*numbers, strict=True)
    share = float(np.mean(gaps)) / float(np.mean(losses))
    if share > OPEN_GAP:
        words = (
            f"penalty gap open: y is {share:.1%} above z in training loss, so the weights serve a compromise; "
            "raise solver.penalty"
        )
        return [Finding("gap-open", True, words)]
    if share < -OPEN_GAP:
        remedy = "lower solver.lr_z, or raise solver.penalty" if trust.of_rounds else "use solver.name=rounds"
        words = (
            f"z is behind y, by {-share:.1%} in training loss: the two part for other reasons than the validation loss, "
            f"and the signals are not the derivative that they should be; {remedy}"
        )
        return [Finding("gap-open", True, words)]
    words = f"y stays close to z: their training losses differ by {share:+.2%}"
    return [Finding("gap-open", False, words, passed=has_evidence(trust))]
