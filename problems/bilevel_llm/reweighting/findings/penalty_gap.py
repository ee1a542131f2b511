"""Whether the penalty has closed the gap between y and z."""

from collections.abc import Sequence

import numpy as np

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust

OPEN_GAP = 0.02  # as a share of the lower loss: y is then measurably worse on the training mix than the optimum is


def penalty_gap(trust: Trust) -> Sequence[Finding]:
    """Looks at the gap g(y) - g(z) over the last quarter of the steps that could move the weights."""
    last = trust.moving[-max(1, len(trust.moving) // 4) :]
    gap = float(np.mean([record.metrics["gap"] for record in last]))
    share = gap / float(np.mean([record.metrics["lower_loss"] for record in last]))
    if share > OPEN_GAP:
        words = (
            f"penalty gap open: y is {share:.1%} above z in lower loss, so the weights serve a compromise; "
            "raise solver.penalty"
        )
        return [Finding("gap-open", True, words)]
    if share < -OPEN_GAP:
        words = (
            f"z is behind y, by {-share:.1%} in lower loss, so the lower level is far from its optimum; "
            "use a longer solver.warmup, more steps or a larger solver.lr_z"
        )
        return [Finding("gap-open", True, words)]
    return [Finding("gap-open", False, f"penalty gap closed: y is {share:+.2%} from z in lower loss")]
