"""A claim that cannot fail says nothing: every wrong implementation must be caught, and its right twin must not.

One of the wrong implementations that a claim must catch is tried every time; all of them in the slow suite.
"""

from collections import Counter
from typing import Any

import pytest

from bilevel.verify.claims import Check
from bilevel.verify.run import judge
from bilevel_theory.bome_rate import BOMERate
from bilevel_theory.linear_rate import LinearRate
from bilevel_theory.meha_rate import MEHARate
from bilevel_theory.pbgd_rate import PBGDRate
from bilevel_theory.penalty_bias import PenaltyBias
from bilevel_theory.shared_minibatch import SharedMinibatch
from tests.bilevel_theory.mutants import MUTANTS, Mutant, Wrong, WrongBOME, WrongMEHA, WrongPBGD, wrong


def of_each_claim() -> list[Any]:
    seen: Counter[type[Check]] = Counter()
    parameters = []
    for mutant in MUTANTS:
        seen[mutant.check] += 1
        marks = [pytest.mark.slow] if seen[mutant.check] > 1 else []
        parameters.append(pytest.param(mutant, id=f"{mutant.check.__name__}: {mutant.name}", marks=marks))
    return parameters


@pytest.mark.parametrize("mutant", of_each_claim())
def test_a_wrong_implementation_is_caught(mutant: Mutant) -> None:
    assert mutant.caught_by() is not None


@pytest.mark.parametrize(
    ("check", "twin"),
    [
        (PenaltyBias, Wrong),
        (LinearRate, Wrong),
        (SharedMinibatch, Wrong),
        (PBGDRate, WrongPBGD),
        (BOMERate, WrongBOME),
        (MEHARate, WrongMEHA),
    ],
)
def test_the_twin_without_an_error_is_not_caught(check: type[Check], twin: type[Any]) -> None:
    verdict, readings, reason = judge(check(quick=True, solver=wrong(twin)))
    assert verdict == "holds", (readings, reason)
