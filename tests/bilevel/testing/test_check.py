"""`bilevel check`."""

from pathlib import Path

import pytest

from bilevel import InputError
from bilevel.testing.check import check
from bilevel.testing.contract import ContractError

BROKEN = """
from tests.conftest import Distance

class Loose(Distance):
    def lower_loss(self, x, y, batch):
        return super().lower_loss(x, y, batch) * len(batch)  # counts the micro-batch

recipe = {
    "problem": Loose(noise=1.0), "solver": {"name": "scalebio"}, "backend": {"name": "torch"}, "run": {"steps": 1, "output": "out"},
}
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("torch", "backend"), ("f2sa", "solver"), ("scalebio", "solver"), ("quadratic", "problem")]
)
def test_first_party_parts_keep_the_contract(name: str, kind: str) -> None:
    assert check(name) == f"the {kind} {name}"


def test_the_problem_of_a_recipe_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(BROKEN)
    with pytest.raises(ContractError, match="the lower loss on micro-batches of one sample"):
        check(str(file))
    file.write_text(BROKEN.replace("Loose(noise", "Distance(noise"))
    assert check(str(file)) == f"the problem of {file}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llm-reweighting", "needs model, validation, sources; check it with a recipe"),
        ("nothing", "neither a recipe file nor an installed part is named 'nothing'; known: aid, "),
        ("mix", "'mix' is one of the commands"),
    ],
)
def test_what_cannot_be_checked_is_said(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(name)
