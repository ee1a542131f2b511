"""How many rows a run takes at a time, where that follows from what fits: with a CPU that says how much room it has."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bilevel import All, InputError, ScaleBiO, fit
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import FILLED, make_plan
from bilevel.problem import Forward
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.hyper_cleaning import HyperCleaning

PROBLEM = HyperCleaning(rows=12, validation_rows=12)
SOLVER = ScaleBiO(warmup=0)


@dataclass
class Roomy(TorchBackend):
    """A device with that many bytes of memory."""

    bytes: ClassVar[int]

    @property
    def room(self) -> int | None:
        return self.bytes if self.micro_batch_size == "auto" else None


def needed(rows: int) -> int:
    """Bytes of memory in which micro-batches of so many rows fit, and no larger ones."""
    model = Footprint(PROBLEM.cost(), None)
    setup = Setup(TorchBackend(device="cpu", micro_batch_size=rows), All(), SOLVER.workload(), 0, 4)
    return round(make_plan(model, setup, Hardware()).gpu_bytes / FILLED) + 1


def run(room: int, **settings: Any) -> tuple[Any, Roomy]:
    backend = Roomy(device="cpu")
    Roomy.bytes = room
    return fit(PROBLEM, SOLVER, backend, **{"steps": 4, **settings}), backend


@pytest.mark.parametrize("rows", [12, 3])
def test_the_largest_micro_batch_that_fits_is_taken_and_told(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bilevel"):
        result, backend = run(needed(rows))
    assert backend.shard.micro_batch_size == rows
    assert f"each process takes {rows} rows at a time" in caplog.text
    assert f"{needed(rows) / GB:.1f} GB of each GPU" in caplog.text
    whole = fit(PROBLEM, SOLVER, TorchBackend(device="cpu"), steps=4)
    for name, value in whole.x.items():
        torch.testing.assert_close(result.x[name], value, rtol=1e-9, atol=1e-12)  # in float64: sums in another order


def test_a_resumed_run_takes_as_many_rows_as_before_wherever_it_goes_on(tmp_path: Path) -> None:
    uninterrupted, _ = run(needed(6))
    output = tmp_path / "run"
    run(needed(6), steps=2, output=output)
    assert json.loads((output / "micro_batch.json").read_text()) == {"rows": 6}
    assert "auto" in (output / "recipe.yaml").read_text()
    resumed, backend = run(needed(12), output=output, resume=True)
    assert backend.shard.micro_batch_size == 6
    for name, value in uninterrupted.x.items():
        assert torch.equal(resumed.x[name], value)


def test_the_process_with_the_least_room_decides() -> None:
    class Two(Roomy):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, needed(3)] if isinstance(value, int) and value > GB else [value]

    Roomy.bytes = needed(12)
    backend = Two(device="cpu")
    fit(PROBLEM, SOLVER, backend, steps=1)
    assert backend.shard.micro_batch_size == 3


def test_what_cannot_be_planned_takes_its_whole_share_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Curious(HyperCleaning):
        def lower_loss(self, x: Forward, y: Forward, batch: Any) -> Any:
            return super().lower_loss(x, y, batch) * (1 + 0 * float(x().sum()))

    backend = Roomy(device="cpu")
    Roomy.bytes = 1
    fit(Curious(rows=12, validation_rows=12), SOLVER, backend, steps=1)
    assert backend.shard.micro_batch_size is None
    assert "cannot be planned, so each process takes its whole share: Curious.lower_loss cannot be traced" in caplog.text


def test_a_gpu_that_is_too_small_is_refused_with_the_numbers_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes 1\.0 GB on each GPU even with 1 row at a time, and there are 0\.5 GB; "):
        run(round(GB / 2), output=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_number_in_the_recipe_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a GPU's whole memory counts, so that runs on the same kind of GPU are cut alike."""
    card = SimpleNamespace(total_memory=85_520_809_984)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    auto = TorchBackend(device="cpu")
    assert auto.room is None
    auto._device = torch.device("cuda")
    assert auto.room == card.total_memory
    given = dataclasses.replace(auto, micro_batch_size=4)
    given._device = torch.device("cuda")
    assert given.room is None
    assert given.shard.micro_batch_size == 4
