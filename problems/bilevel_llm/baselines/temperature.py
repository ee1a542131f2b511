"""Temperature: Arivazhagan et al., "Massively Multilingual Neural Machine Translation in the Wild" (arXiv 1907.05019).

    p_i = n_i^(1/T) / Σ_j n_j^(1/T)

T = 1 is proportional to size; T → ∞ is uniform.
"""

import math
from dataclasses import dataclass

import numpy as np

from bilevel_llm.baselines.base import Baseline, Outcome, Task
from bilevel_llm.baselines.proportional import Unit, sizes


@dataclass(frozen=True)
class Temperature(Baseline):
    """Weights between proportional and uniform.

    temperature: T. 5 is what the paper settles on for languages of very different sizes. XLM-R (arXiv 1911.02116) writes
        the exponent α = 1/T and takes 0.3, which is T = 3.3.
    by: whether to count rows, tokens or targets; see `Proportional`.
    """

    trains = False

    temperature: float = 5.0
    by: Unit = "rows"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}; `uniform` is the limit")

    def find(self, task: Task) -> Outcome:
        """n_i^(1/T), normalized; computed in logarithms, so that a low temperature does not overflow."""
        size = sizes(task.problem.source_tables, self.by)
        logs = np.log(list(size.values())) / self.temperature
        powers = np.exp(logs - logs.max())
        return Outcome(dict(zip(size, (powers / powers.sum()).tolist(), strict=True)))
