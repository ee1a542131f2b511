import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import InputError
from bilevel.report.comparison import difference_rows, read_comparison, score_rows
from tests.bilevel.report.conftest import COMPARISON

Make = Callable[..., Path]


def test_scores_are_means_over_seeds_with_students_interval_and_the_best_marked(make_comparison: Make) -> None:
    comparison = read_comparison(make_comparison())
    uniform, learned = score_rows(comparison)
    loss = learned.scores[0]
    assert loss is not None
    assert loss.interval.mean == pytest.approx(2.32)
    assert loss.interval.high - loss.interval.mean == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert loss.best
    assert not uniform.scores[0].best  # type: ignore[union-attr]
    assert learned.gpu_seconds == pytest.approx(61.0)
    assert learned.size == 100_000


def test_a_cell_that_could_not_be_scored_is_left_out(make_comparison: Make) -> None:
    assert read_comparison(make_comparison()).values("learned", "exact match") == [0.2, 0.2]


def test_differences_say_which_way_is_better_and_when_nothing_can_be_said(make_comparison: Make) -> None:
    assert [(row.metric, row.verdict) for row in difference_rows(read_comparison(make_comparison()))] == [
        ("loss/target", "better"),  # lower is better, and it is lower; in the order of metric_info
        ("exact match", "not told apart"),
    ]


def test_a_higher_loss_is_worse(make_comparison: Make) -> None:
    worse = [{"method": "learned", "against": "uniform", "metric": "loss/target", "mean": 0.1, "low": 0.05, "high": 0.2}]
    assert difference_rows(read_comparison(make_comparison(differences=worse)))[0].verdict == "worse"


def test_missing_cells_and_unequal_budgets_are_noted(make_comparison: Make) -> None:
    cells = copy.deepcopy(COMPARISON["cells"])[:-1]
    cells[0]["cost"]["size"] = 150_000
    notes = read_comparison(make_comparison(cells=cells)).all_findings()
    found = {finding.name: finding.sentence for finding in notes if finding.flagged}
    assert "1 of 6 cells are missing (learned, seed 2)" in found["not-finished"]
    assert "unequal budgets: cells trained on 100,000 to 150,000 tokens" in found["unequal-budgets"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "uniform"}, "methods: "),
        ({"cells": [{"method": "other", "seed": 0, "metrics": {}}]}, "names the method 'other'"),
        ({"cells": [{"method": "uniform", "seed": 9, "metrics": {}}]}, "names the seed 9"),
        ({"metric_info": {}}, "metric_info does not describe 'loss/target'"),
        ({"metric_info": {"loss/target": {"better": "smaller"}}}, "metric_info.loss/target.better"),
    ],
)
def test_a_file_of_another_form_is_refused_naming_what_is_wrong(make_comparison: Make, changes: Any, words: str) -> None:
    with pytest.raises(InputError, match="comparison.json") as caught:
        read_comparison(make_comparison(**changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [json.dumps(COMPARISON)[:-5], "[" * 100_000])
def test_a_file_that_is_no_json_is_refused(make_comparison: Make, text: str) -> None:
    where = make_comparison()
    (where / "comparison.json").write_text(text)
    with pytest.raises(InputError, match="not JSON"):
        read_comparison(where)
