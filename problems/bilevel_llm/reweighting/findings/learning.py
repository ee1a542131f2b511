"""Whether the model learns anything in a round, and whether that serves the validation set."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.account import Finding
from bilevel.response import half_range
from bilevel.statistics import t_quantile
from bilevel_llm.reweighting.trust import Trust, has_evidence

LEVEL = 0.02  # one side of it: 1% of the runs that learn nothing are said to learn
NOTHING = 1e-4  # of the validation loss: less than two runs of one training differ by


def learning(trust: Trust) -> Sequence[Finding]:
    """Compares the losses of the first and the last quarter of each round, by Student's t over rounds."""
    if not has_evidence(trust):
        return []
    found = []
    training, validation = (trust.change_over_round(metric) for metric in ("lower_loss", "upper_loss"))
    if _surely(-training):
        words = f"the model learns: its training loss falls by {-training.mean():.1%} in a round of {trust.horizon} steps"
        found.append(Finding("nothing-learned", False, words, passed=True))
    elif (promised := _promised(trust)) < NOTHING:
        words = (
            f"the model learns nothing in {trust.horizon} steps: no change of the mix promises more than {promised:.1e} "
            "of the validation loss; raise solver.lr_z, or solver.horizon"
        )
        found.append(Finding("nothing-learned", True, words))
    else:
        words = f"in a round, the training loss changes by {training.mean():+.1%}, which is within the noise of its batches"
        found.append(Finding("nothing-learned", False, words))
    if _surely(validation):
        words = (
            f"the validation loss rises by {validation.mean():.1%} in a round: training on these sources makes the model "
            "worse at the target, or goes too fast; lower solver.lr_z, and look at the sources"
        )
        found.append(Finding("validation-risen", True, words))
    elif _surely(-validation):
        words = f"training serves the target: the validation loss falls by {-validation.mean():.1%} in a round"
        found.append(Finding("validation-risen", False, words, passed=True))
    return found


def _promised(trust: Trust) -> float:
    """How much of the validation loss the best source gains over the worst, for all of the weight, by the signals."""
    loss = float(np.mean([record.metrics["upper_loss"] for records in trust.rounds for record in records]))
    if trust.evidence is None:
        return float("inf")
    return 2 * float(np.sqrt((half_range(trust.evidence.signals) ** 2).mean())) / loss


def _surely(values: NDArray[np.float64]) -> bool:
    """Whether the mean is above 0 beyond doubt."""
    error = float(values.std(ddof=1)) / np.sqrt(len(values))
    return bool(values.mean() > t_quantile(len(values) - 1, LEVEL) * error)
