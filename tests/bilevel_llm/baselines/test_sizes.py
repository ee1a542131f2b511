"""Uniform, proportional and temperature weights, against arithmetic."""

from collections.abc import Callable

import pytest

from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.proportional import Proportional
from bilevel_llm.baselines.temperature import Temperature
from bilevel_llm.baselines.uniform import Uniform

Make = Callable[..., Task]
ROWS = {"clean": 40, "other": 30, "noise": 24}


def test_uniform_gives_every_source_the_same(task: Make) -> None:
    assert Uniform().find(task()).weights == dict.fromkeys(ROWS, pytest.approx(1 / 3))


def test_proportional_follows_the_rows(task: Make) -> None:
    weights = Proportional().find(task()).weights
    assert weights == {name: pytest.approx(rows / 94) for name, rows in ROWS.items()}


@pytest.mark.parametrize("by", ["tokens", "targets"])
def test_proportional_counts_what_the_model_sees(task: Make, by: str) -> None:
    t = task(max_length=48)
    tables = t.problem.source_tables.values()
    assert any(table.truncated for table in tables)
    counted = [
        sum((len(ids), int(labels.sum()))[by == "targets"] for ids, labels in map(table.row, range(len(table))))
        for table in tables
    ]
    weights = Proportional(by=by).find(t).weights  # type: ignore[arg-type]
    assert list(weights.values()) == pytest.approx([n / sum(counted) for n in counted])


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0, 1e6])
def test_temperature_takes_the_root_of_the_size(task: Make, temperature: float) -> None:
    powers = {name: (rows / 40) ** (1 / temperature) for name, rows in ROWS.items()}
    weights = Temperature(temperature=temperature).find(task()).weights
    assert weights == {name: pytest.approx(power / sum(powers.values()), abs=1e-12) for name, power in powers.items()}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_no_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        Temperature(temperature=temperature)
