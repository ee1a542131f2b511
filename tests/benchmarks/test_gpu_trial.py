"""The trial for a machine with GPUs, as far as it goes without running it. `python benchmarks/gpu.py --tiny` runs it anywhere."""

from pathlib import Path

import pytest

from benchmarks.gpu import SECTIONS, Command, Trial, run
from benchmarks.idle import covered
from benchmarks.random_models import SIZES, write_recipe
from bilevel.config import load_config
from bilevel.plugins import load_plugins


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("section", SECTIONS)
def test_every_command_of_the_trial_measures_a_recipe_that_is_valid(section: str, tiny: bool, tmp_path: Path) -> None:
    trial = Trial(tmp_path, tiny=tiny, processes=2)
    made = set()
    for command in getattr(trial, section)():
        words = list(command.arguments)
        if "benchmarks.random_models" in words:
            made.add(Path(words[-2]))
            Path(words[-2]).mkdir(parents=True, exist_ok=True)
            write_recipe(Path(words[-2]), SIZES[words[-1]].length)
        recipes = [Path(word) for word in words if word.endswith("recipe.yaml")]
        assert {recipe.parent for recipe in recipes} <= made
        for recipe in recipes:
            load_config(recipe, load_plugins(), changes=[words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_kernels_side_by_side_are_busy_once() -> None:
    assert covered([(0, 4), (1, 2), (6, 8), (3, 5)]) == 5 + 2


def test_a_command_that_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    """The shell's child holds the pipe open: were it left, reading would not end."""
    assert not run(Command(["sh", "-c", "echo begun; sleep 60 & wait"], limit=0.3), tmp_path / "REPORT.md")
    written = (tmp_path / "REPORT.md").read_text()
    assert "begun" in written
    assert "it was killed after 0.3 s" in written
