"""A model on a backend, whole or split over processes, has the scores and gives the answers that it has and gives alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel import Shard
from bilevel_llm.evaluation.placed_model import deal
from bilevel_llm.evaluation.scores import evaluate
from tests.bilevel_backends.distributed.conftest import launch
from tests.bilevel_llm.evaluation.score_in_processes import SPLIT, WHOLE, found
from tests.bilevel_llm.tiny import sentences, write_rows


def test_processes_share_the_work_and_one_that_has_less_of_it_takes_part_in_that_of_the_others(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against scores in one process without a backend; 1e-6: in float32, with sums in another order."""
    model, data = str(model_directory("llama")), write_rows(tmp_path / "rows.jsonl", sentences(5, 7))
    (reference,) = evaluate(model, [data], max_length=64, device="cpu").values()
    _, whole = found(WHOLE["torch"], model, data)
    np.testing.assert_allclose(whole["losses"], reference.losses, rtol=1e-6)
    assert whole["correct"] == reference.correct.tolist()
    assert any(whole["answers"])

    script = str(Path(__file__).with_name("score_in_processes.py"))
    ended = launch(script, model, data, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for name in SPLIT:
        parts: list[dict[str, Any]] = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        np.testing.assert_allclose(np.sum([part["losses"] for part in parts], 0), reference.losses, rtol=1e-6)
        assert np.sum([part["correct"] for part in parts], 0).tolist() == reference.correct.tolist()
        answers = list(zip(*(part["answers"] for part in parts), strict=True))
        assert [sum(text is not None for text in texts) for texts in answers] == [1] * 5, name
        assert [next(text for text in texts if text is not None) for texts in answers] == whole["answers"], name


@pytest.mark.parametrize("batches", [1, 2, 3, 6])
def test_every_batch_counts_once_and_all_processes_have_as_many(batches: int) -> None:
    dealt = [deal(range(batches), Shard(rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(part) for part in dealt}) == 1
    assert sorted(one.batch for part in dealt for one in part if one.counts) == list(range(batches))
