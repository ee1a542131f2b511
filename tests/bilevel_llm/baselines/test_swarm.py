"""Swarm regression: its runs against plain training, and two dialects whose best mix is known."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bilevel import LISA, SGD, InputError, RunError
from bilevel.cli import app
from bilevel.optimizer import AdamW
from bilevel.plugins import Plugins
from bilevel.run_reader import read_run
from bilevel.schedule import Cosine
from bilevel.solvers.scalebio import ScaleBiO
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.mixed_batches import DrawnByWeight
from bilevel_llm.baselines.swarm import Swarm, validation_losses
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import SIZES, make_tokenizer, sentences, write_rows

Make = Callable[..., Task]
SMALL = Swarm(runs=6, steps=3, lr=0.3, optimizer=SGD())


@pytest.fixture
def losses_of_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The mixes and the losses of rows that a swarm found."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = Swarm.weighed

    def watching(self: Swarm, problem: LLMReweighting, mixes: np.ndarray, losses: np.ndarray) -> Any:
        seen.append((mixes, losses))
        return original(self, problem, mixes, losses)

    monkeypatch.setattr(Swarm, "weighed", watching)
    return seen


def row_loss(model: Any, table: TokenTable, row: int) -> torch.Tensor:
    """The mean loss of one row, through the plain model and without padding."""
    ids, labels = (torch.from_numpy(part.copy()) for part in table.row(row))
    logits = model.model(input_ids=ids[None].long()).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")[labels[1:]].mean()


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_run_is_plain_training_on_its_mix_from_the_same_weights(
    task: Make, losses_of_rows: list[Any], micro_batch_size: int | None
) -> None:
    """Runs 1 and 5 again, one row at a time. 1e-5: float32 losses, summed in another order, over three steps."""
    t = dataclasses.replace(task(seed=7), backend=TorchBackend(device="cpu", micro_batch_size=micro_batch_size))
    SMALL.find(t)
    ((mixes, losses),) = losses_of_rows
    tables = list(t.problem.source_tables.values())
    (target,) = t.problem.validation_tables.values()
    for run in (1, 5):
        model = t.problem.lower()
        sampler = DrawnByWeight(tuple(map(len, tables)), 10, 3, tuple(mixes[run].tolist()))
        for step in range(3):
            model.zero_grad()
            rows = sampler.batch(step, 7)
            assert len(rows) == 10
            torch.stack([row_loss(model, tables[s], row) for s, row in rows]).mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.3 * p.grad  # type: ignore[operator]
        with torch.no_grad():
            expected = [float(row_loss(model, target, row)) for row in range(30)]
        np.testing.assert_allclose(losses[run], expected, rtol=1e-5)
    assert np.ptp(losses.mean(1)) > 1e-3, "the runs do not differ"


def test_restarts_are_complete(task: Make, losses_of_rows: list[Any]) -> None:
    """Equal mixes end with equal losses, to the bit: weights and moments of the optimizer are those of the start."""
    mixes = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]])
    t = dataclasses.replace(task(), active=LISA(blocks=1, period=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Swarm, "mixes", lambda self, task: mixes)
        dataclasses.replace(SMALL, optimizer=AdamW(), lr=1e-2).find(t)
    ((_, losses),) = losses_of_rows
    np.testing.assert_array_equal(losses[0], losses[2])
    assert not np.array_equal(losses[0], losses[1])


def test_a_stopped_swarm_goes_on_bit_for_bit(task: Make, tmp_path: Path, losses_of_rows: list[Any]) -> None:
    """Stopped within a run, and at the end of one; and resumed when all runs are done."""
    plain = task()

    def find(output: str, *, resume: bool = False, stop: int | None = None) -> Any:
        run = dataclasses.replace(plain.run, output=str(tmp_path / output), checkpoint_every=1)
        t = dataclasses.replace(plain, backend=TorchBackend(device="cpu"), run=run, resume=resume)
        with pytest.MonkeyPatch.context() as patch:
            original = TorchBackend.step
            done = [0]

            def failing(self: Any, variable: Any, *, lr: float) -> float:
                if done[0] == stop:
                    raise RunError("the machine went away")
                done[0] += 1
                return original(self, variable, lr=lr)

            patch.setattr(TorchBackend, "step", failing)
            if stop is None:
                return SMALL.find(t)
            with pytest.raises(RunError, match="went away"):
                SMALL.find(t)

    whole = find("whole")
    find("parts", stop=4)
    find("parts", resume=True, stop=6)  # at step 3, the last checkpoint, and 6 more: at the end of a run
    parts = find("parts", resume=True)
    again = find("parts", resume=True)
    assert whole.weights == parts.weights == again.weights
    assert whole.cost.tokens == parts.cost.tokens
    np.testing.assert_array_equal(losses_of_rows[0][1], losses_of_rows[1][1])
    np.testing.assert_array_equal(losses_of_rows[0][1], losses_of_rows[2][1])


def test_defaults_follow_the_data_and_the_recipe(task: Make) -> None:
    short, long = task(steps=25), task(steps=300)
    assert Swarm().mixes(long).shape == (20, 3)  # 4 * 3 + 8
    assert (Swarm()._length(short), Swarm()._length(long), Swarm(steps=60)._length(short)) == (25, 40, 60)
    taken = Swarm().completed(lambda: ScaleBiO(lr_z=3e-4, optimizer_z=AdamW(weight_decay=0.1)))
    assert (taken.lr, taken.optimizer) == (3e-4, AdamW(weight_decay=0.1))
    schedule = Cosine(1e-3, 10)
    assert Swarm().completed(lambda: ScaleBiO(lr_z=schedule)).lr == schedule


def test_mixes_are_drawn_around_the_prior(task: Make) -> None:
    t = task()
    mixes = Swarm(runs=400, prior={"clean": 6, "other": 3, "noise": 1}, concentration=5.0).mixes(t)
    np.testing.assert_allclose(mixes[0], [0.6, 0.3, 0.1])
    np.testing.assert_allclose(mixes.mean(0), [0.6, 0.3, 0.1], atol=0.03)  # standard errors below 0.007
    variance = np.array([0.24, 0.21, 0.09]) / (15 + 1)  # of a Dirichlet with parameters that sum to 15
    np.testing.assert_allclose(mixes[1:].var(0), variance, rtol=0.4)
    np.testing.assert_allclose(Swarm(prior="size").mixes(t)[0], np.array([40, 30, 24]) / 94)
    np.testing.assert_array_equal(Swarm(runs=10).mixes(t), Swarm(runs=20).mixes(t)[:10])
    assert not np.array_equal(Swarm(runs=10).mixes(t), Swarm(runs=10).mixes(task(seed=1)))


def dialect(swap: bool, rows: int, seed: int) -> list[dict[str, str]]:
    """Words of two letters: the second follows from the first, and in the other dialect it is the other one."""
    draw = random.Random(seed)
    firsts = [draw.randrange(2) for _ in range(rows)]
    return [{"instruction": "say", "input": "", "output": "pq"[f] + "xy"[f ^ swap]} for f in firsts]


def junk(rows: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"instruction": "say", "input": "", "output": "".join(draw.choices("QRSTUVWX", k=2))} for _ in range(rows)]


@pytest.fixture
def dialects(task: Make, tmp_path: Path) -> Task:
    """70% of the target are of one dialect and 30% of the other: what predicts it best has seen them in these proportions."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    make_tokenizer(None).save_pretrained(tmp_path / "model")
    files = {
        "first": dialect(False, 200, 1),
        "second": dialect(True, 200, 2),
        "junk": junk(200, 3),
        "target": dialect(False, 35, 4) + dialect(True, 15, 5),
    }
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    return task(
        model=str(tmp_path / "model"),
        sources=[Source(name, paths[name]) for name in ("first", "second", "junk")],
        validation=[ValidationSet(paths["target"])],
        batch_size=16,
        steps=40,
    )


def test_the_best_mix_of_two_dialects_is_that_of_the_target(dialects: Task, losses_of_rows: list[Any]) -> None:
    """The truth is 0.7, where uniform weights are 0.33."""
    swarm = Swarm(lr=1e-2, optimizer=AdamW())
    outcome = swarm.find(dialects)
    assert 0.58 < outcome.weights["first"] < 0.82
    assert outcome.weights["junk"] < 0.03
    assert [(f.name, f.flagged) for f in outcome.findings] == [("law-fit", False)], outcome.findings
    ((mixes, losses),) = losses_of_rows
    # the same runs, as the opposite target sees them: of its 50 rows, 15 of the first dialect
    rows = np.concatenate([np.arange(15), 35 + np.arange(15), 35 + np.arange(15), 35 + np.arange(5)])
    opposite = swarm.weighed(dialects.problem, mixes, losses[:, rows])
    assert 0.58 < opposite.weights["second"] < 0.9
    bounded = dataclasses.replace(swarm, floor=0.1, at_most={"first": 0.5}).weighed(dialects.problem, mixes, losses)
    assert bounded.weights == {"first": pytest.approx(0.5), "second": pytest.approx(0.4), "junk": pytest.approx(0.1)}


def test_sets_weigh_as_in_the_recipe(task: Make, tmp_path: Path, data: dict[str, str]) -> None:
    other = write_rows(tmp_path / "other-target.jsonl", sentences(8, 10))
    t = task(validation=[ValidationSet(data["target"], weight=3.0), ValidationSet(other, name="second", weight=1.0)])
    losses = np.random.default_rng(0).random((6, 40))
    expected = 0.75 * losses[:, :30].mean(1) + 0.25 * losses[:, 30:].mean(1)
    np.testing.assert_allclose(validation_losses(t.problem, losses), expected)


def test_losses_that_no_law_explains_are_not_to_be_used(task: Make) -> None:
    t = task()
    losses = np.exp(0.2 * np.random.default_rng(0).standard_normal((20, 30)))
    outcome = Swarm().weighed(t.problem, Swarm().mixes(t), losses)
    (finding,) = outcome.findings
    assert (finding.name, finding.flagged) == ("law-fit", True)
    assert "do not use these weights; raise baseline.runs, baseline.steps or baseline.lr" in finding.sentence


def test_models_that_stand_still_are_reported(task: Make) -> None:
    found = dataclasses.replace(SMALL, lr=1e-9, steps=12).find(task())
    (still, _) = found.findings
    assert (still.name, still.flagged) == ("nothing-learned", True)
    assert "its step size of 1e-09" in still.sentence


def test_the_cost_counts_training_and_scoring(task: Make) -> None:
    t = task(seed=2)
    outcome = SMALL.find(t)
    tables = list(t.problem.source_tables.values())
    trained = 0
    for mix in SMALL.mixes(t):
        sampler = DrawnByWeight(tuple(map(len, tables)), 10, 3, tuple(mix.tolist()))
        trained += sum(len(tables[s].row(row)[0]) for step in range(3) for s, row in sampler.batch(step, 2))
    scored = 6 * len(t.problem.validation_tables["validation"].ids)
    assert outcome.cost.backward_tokens == trained
    assert outcome.cost.tokens == trained + scored
    assert outcome.cost.seconds > 0


def test_what_it_cannot_do_is_said_first(task: Make) -> None:
    t = task()
    for settings, message in (
        ({"runs": 4}, r"4 runs do not determine a law of 3 sources; set baseline\.runs to at least 5"),
        ({"at_most": 0.3}, r"the upper ones to 0\.9, and a mix sums to 1"),
        ({"floor": 0.4}, r"the lower bounds sum to 1\.2"),
        ({"at_most": {"nobody": 0.3}}, r"baseline\.at_most: 'nobody' is not a source"),
        ({"prior": {"clean": 1.0}}, r"baseline\.prior: .* is missing"),
    ):
        with pytest.raises(InputError, match=message):
            Swarm(**settings).check(t)  # type: ignore[arg-type]
    Swarm(at_most=1 / 3, floor=1 / 3).check(t)
    for bad in ({"runs": 0}, {"steps": 0}, {"concentration": 0}, {"ridge": -1}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Swarm(**bad)  # type: ignore[arg-type]


def test_the_command_writes_weights_runs_and_findings(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: plugins)
    words = ("--set", "baseline.runs=6", "--set", "baseline.steps=2", "--set", "baseline.at_most=0.6")
    app(["baseline", "swarm", str(recipe), *words], standalone_mode=False)
    written = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert written["method"]["lr"] == 2e-3, "the recipe's"
    assert max(written["sources"].values()) <= 0.6 + 1e-9
    run = read_run(tmp_path / "run")
    assert run.complete
    assert run.account is not None
    assert [finding.name for finding in run.account.findings] == [finding["name"] for finding in written["findings"]]
    (table,) = run.account.tables
    assert list(table.columns) == ["run", "clean", "other", "noise", "validation loss", "predicted by the others"]
    assert len(table.rows) == 6
    assert table.rows[0][:4] == [1, pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3)]
    losses = [record.metrics["upper_loss"] for record in run.history if "upper_loss" in record.metrics]
    assert [row[4] for row in table.rows] == pytest.approx(losses)
    assert "the run on the prior had" in " ".join(capsys.readouterr().out.split())
    app(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")], standalone_mode=False)
    assert "Runs of the swarm" in (tmp_path / "report.html").read_text()
