import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from bilevel import SGD, AdamW, InputError, Interrupted, NonFiniteError, ScaleBiO, fit
from bilevel.account import Verdict
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

SOLVER = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=0.2, optimizer_x=AdamW(), optimizer_z=AdamW(), warmup=3)


class Watch:
    """Calls back at every step, and remembers the end."""

    def __init__(self, at_step: Callable[[Run, int], None] = lambda run, t: None) -> None:
        self.at_step, self.error, self.starts = at_step, None, []

    def bilevel_run_start(self, *, run: Run) -> None:
        self.starts.append(run.start)

    def bilevel_step_end(self, *, run: Run, record: Any) -> None:
        self.at_step(run, record.step)

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> None:
        self.error = error


def run(output: Path | None, steps: int = 20, **options: Any) -> Any:
    return fit(Distance(noise=0.3), SOLVER, TorchBackend(), steps=steps, seed=1, output=output, **options)


def interrupt_at(step: int) -> Watch:
    return Watch(lambda run, t: os.kill(os.getpid(), signal.SIGINT) if t == step else None)


def metrics(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, second = run(None), run(None)
    assert torch.equal(first.x["value"], second.x["value"])
    other = fit(Distance(noise=0.3), SOLVER, TorchBackend(), steps=20, seed=2)
    assert not torch.equal(first.x["value"], other.x["value"])


def test_the_run_directory_holds_recipe_metrics_and_checkpoints(tmp_path: Path) -> None:
    result = run(tmp_path / "run", checkpoint_every=6)
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(20))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000018", "step-00000020"]
    assert metrics(tmp_path / "run")[-1]["upper"]["x0"] == pytest.approx(float(result.x["value"][0]), abs=1e-12)


@pytest.mark.parametrize("stop", [1, 2, 3, 9])  # within the warm-up, at its end, and after
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    watch = interrupt_at(stop)
    with pytest.raises(Interrupted, match="--resume"):
        run(tmp_path / "cut", observer=watch)
    assert isinstance(watch.error, Interrupted)
    resumed = run(tmp_path / "cut", resume=True, observer=(after := Watch()))
    assert after.starts == [stop + 1]
    assert torch.equal(resumed.x["value"], whole.x["value"])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_repeats_the_steps_after_it(tmp_path: Path) -> None:
    def die(run: Run, t: int) -> None:
        if t == 12:
            raise SystemExit("killed")

    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", checkpoint_every=5, observer=Watch(die))
    assert len(metrics(tmp_path / "cut")) == 13
    left = tmp_path / "cut" / "checkpoints" / f".step-00000015.{'0' * 32}.part"
    left.mkdir()  # as a kill during saving leaves it
    resumed = run(tmp_path / "cut", checkpoint_every=5, resume=True)
    assert torch.equal(resumed.x["value"], whole.x["value"])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert not left.exists()


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", steps=15)
    run(tmp_path / "part", steps=8)
    assert torch.equal(run(tmp_path / "part", steps=15, resume=True).x["value"], whole.x["value"])
    with pytest.raises(InputError, match="has done 15 steps already"):
        run(tmp_path / "part", steps=9, resume=True)


def test_an_output_directory_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds another run"):
        run(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        run(tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "mine" / "thesis.txt")


def test_a_run_that_failed_before_its_first_step_does_not_block_its_directory(tmp_path: Path) -> None:
    class Broken(Distance):
        def lower_loss(self, x, y, batch):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Broken(), SOLVER, TorchBackend(), steps=3, output=tmp_path / "run")
    run(tmp_path / "run", steps=3)


def test_resume_refuses_another_recipe_and_names_the_difference(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2)
    with pytest.raises(InputError, match=r"run\.seed was 1 and is now 2"):
        fit(Distance(noise=0.3), SOLVER, TorchBackend(), steps=4, seed=2, output=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"problem\.fields\.noise was 0\.3 and is now 0\.1"):
        fit(Distance(noise=0.1), SOLVER, TorchBackend(), steps=4, seed=1, output=tmp_path / "run", resume=True)


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        run(tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="needs the output directory"):
        run(None, resume=True)


@pytest.mark.parametrize("damage", ["x-00001-of-00001.safetensors", "variables.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    run(tmp_path / "run", steps=2)
    (tmp_path / "run" / "checkpoints" / "step-00000002" / damage).unlink()
    with pytest.raises(InputError, match=rf"step-00000002/{damage} cannot be read: .*; no checkpoint in .* is whole"):
        run(tmp_path / "run", steps=4, resume=True)


def test_numbers_that_blow_up_stop_the_run_with_step_and_variable_and_keep_the_checkpoint(tmp_path: Path) -> None:
    wild = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=1e60, optimizer_x=SGD(), optimizer_z=SGD(), warmup=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: .*(g\(y\)|gradient of variable).*lr_z = 1e\+60"):
        fit(Distance(), wild, TorchBackend(), steps=50, output=tmp_path / "run", checkpoint_every=1)
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_too_little_disk_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match="not enough disk"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_there_already_counts_as_room_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", steps=4, checkpoint_every=2)
    monkeypatch.setattr(TorchBackend, "checkpoint_bytes", lambda self, variables: 1_500)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_600})())
    with pytest.raises(
        InputError, match=r"has 1\.6 kB free, and needs 4\.5 kB more for 3 checkpoints of about 1\.5 kB; free"
    ):
        run(tmp_path / "new")
    run(tmp_path / "run", steps=5, resume=True)


@pytest.mark.parametrize(
    ("value", "when"), [(torch.zeros(2), 0), (torch.zeros(2), 2), ((1, 2), 0), ({1: 2}, 0), ([{"a": torch.zeros(1)}], 0)]
)
def test_memory_that_a_checkpoint_cannot_keep_is_found_at_once(tmp_path: Path, value: Any, when: int) -> None:
    class Keeps(ScaleBiO):
        def step(self, t, state, problem, backend):  # type: ignore[no-untyped-def]
            assert t <= when
            metrics = ScaleBiO.step(self, t, state, problem, backend)
            if t == when:
                state.memory["kept"] = value
            return metrics

    with pytest.raises(
        InputError, match=r"the solver Keeps cannot be saved: State\.memory\['kept'\].*; keep None, booleans"
    ):
        fit(Distance(), Keeps(lr_x=0.1, lr_z=0.2), TorchBackend(), steps=9, output=tmp_path / "run")


def test_a_second_run_in_the_same_directory_is_refused_before_it_reads_its_data(tmp_path: Path) -> None:
    class Unread(Distance):
        def prepare(self) -> None:
            raise AssertionError("it has read its data")

    Unread.__qualname__, Unread.__module__ = Distance.__qualname__, Distance.__module__
    refused = []

    def second(run: Run, t: int) -> None:
        for resume in (False, True):
            thread = Thread(target=start, args=(resume,))
            thread.start()
            thread.join()

    def start(resume: bool) -> None:
        with pytest.raises(InputError) as caught:
            fit(Unread(noise=0.3), SOLVER, TorchBackend(), steps=1, seed=1, output=tmp_path / "run", resume=resume)
        refused.append(str(caught.value))

    whole = run(tmp_path / "whole", steps=2)
    assert torch.equal(run(tmp_path / "run", steps=2, observer=Watch(second)).x["value"], whole.x["value"])
    assert ["holds another run" in reason for reason in refused] == [True, False, True, False]
    assert [f"in use by process {os.getpid()} on" in reason for reason in refused] == [False, True, False, True]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("failing", ["append", "write", "begin_checkpoint", "finish_checkpoint"])
def test_a_disk_that_fails_ends_the_run_tells_the_observers_and_leaves_what_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    watch = Watch(lambda run, t: monkeypatch.setattr(RunDirectory, failing, full) if t == 3 else None)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "run", checkpoint_every=2, observer=watch)
    assert isinstance(watch.error, OSError)
    monkeypatch.undo()
    run(tmp_path / "run", resume=True, observer=(after := Watch()))
    assert after.starts in ([2], [4], [6])  # where the checkpoint of 4 steps was still being written, that of 2


def test_bad_problem_settings_leave_no_directory_behind(tmp_path: Path) -> None:
    class Unready(Distance):
        def prepare(self) -> None:
            raise InputError("no data")

    with pytest.raises(InputError, match="no data"):
        fit(Unready(), SOLVER, TorchBackend(), steps=3, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Judged(Distance):
    """Says to use its result after a number of steps."""

    enough = 6

    def verdict(self, history: Any) -> Verdict:
        done = len(history)
        return Verdict("use", "it is good") if done >= self.enough else Verdict("run longer", "it is young", 2 * done)


def test_a_run_until_its_result_is_usable_ends_when_the_problem_says_so(tmp_path: Path) -> None:
    result = fit(Judged(), SOLVER, TorchBackend(), steps=20, until_usable=True, output=tmp_path / "run")
    assert len(result.history) == 6
    account = json.loads((tmp_path / "run" / "account.json").read_text())
    assert account["verdict"] == {"decision": "use", "reason": "it is good", "steps": None}
    again = fit(Judged(), SOLVER, TorchBackend(), steps=20, until_usable=True, output=tmp_path / "run", resume=True)
    assert len(again.history) == 6


def test_a_run_whose_result_never_is_ends_with_its_last_step() -> None:
    assert len(fit(Distance(), SOLVER, TorchBackend(), steps=8, until_usable=True).history) == 8
    assert len(fit(Judged(), SOLVER, TorchBackend(), steps=4, until_usable=True).history) == 4


def test_a_run_that_is_not_asked_to_end_early_does_not() -> None:
    assert len(fit(Judged(), SOLVER, TorchBackend(), steps=9).history) == 9


def test_a_step_exchanges_one_object_between_processes() -> None:
    """Each exchange of objects makes all processes wait for each other."""
    exchanged: list[Any] = []

    class Counted(TorchBackend):
        def all_gather(self, value: Any) -> list[Any]:
            exchanged.append(value)
            return super().all_gather(value)

    counts = []
    for steps in (3, 7):
        exchanged.clear()
        fit(Distance(), ScaleBiO(warmup=0), Counted(device="cpu"), steps=steps)
        counts.append(len(exchanged))
    assert counts[1] - counts[0] == 4
