"""LESS: its parts against truth, and planted cases."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bilevel import LISA, All, Backend, InputError, Shard
from bilevel.backend import Placement
from bilevel.blocks import Blocks
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.processes import Grid, Processes
from bilevel_backends.sharding.partitioned import Partitioned
from bilevel_backends.sharding.replicated import Replicated
from bilevel_backends.sharding.strategy import ShardingStrategy
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable
from bilevel_llm.baselines.base import Selection, Task
from bilevel_llm.baselines.less import ADAM, LESS, Adam
from bilevel_llm.baselines.projection import Projection
from bilevel_llm.baselines.row_gradients import How, RowBatch, RowGradients, row_batch, row_batches
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.token_losses import token_losses
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import FAMILIES, SIZES, make_tokenizer, sentences, write_rows

Make = Callable[..., Task]
CPU = torch.device("cpu")
SMALL = LESS(dimension=256, rank=4, warmup_steps=4, lr=1e-2)


def trained_names(model: LanguageModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def shaken(model: LanguageModel) -> LanguageModel:
    """Fresh adapters have a zero half, whose partner has a zero gradient: move both away from there."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_row_gradients_are_those_of_rows_taken_alone(task: Make, family: str, how: str) -> None:
    """Against a backward pass through the plain model for each row, without padding. 1e-4 of the largest entry: float32."""
    t = task(family)
    model = shaken(SMALL.model(t.problem, 0))
    table = t.problem.source_tables["other"]
    rows = [3, 8, 11, 20]
    assert len({len(table.row(row)[0]) for row in rows}) > 1
    found = RowGradients(model, trained_names(model), how)(row_batch(table, rows, CPU))  # type: ignore[arg-type]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for gradient, row in zip(found, rows, strict=True):
        ids, labels = (torch.from_numpy(part.copy()) for part in table.row(row))
        logits = model.model(input_ids=ids[None].long()).logits[0]
        loss = token_losses(logits[:-1], ids[1:].long())[labels[1:]].mean()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trained.values()))])
        assert expected.abs().max() > 1e-4
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gradients_of_chosen_blocks(task: Make) -> None:
    t = task()
    model = dataclasses.replace(SMALL, blocks=("model.model.layers.1",)).model(t.problem, 0)
    trained = trained_names(model)
    assert trained
    assert all(name.startswith("model.model.layers.1.") for name in trained)
    batch = row_batch(t.problem.source_tables["clean"], [0, 1, 2], CPU)
    by_vmap, by_loop = (RowGradients(model, trained, how)(batch) for how in ("vmap", "loop"))  # type: ignore[arg-type]
    assert by_loop.abs().max() > 1e-4
    torch.testing.assert_close(by_vmap, by_loop, rtol=1e-4, atol=1e-5 * float(by_loop.abs().max()))


def test_a_model_that_cannot_be_vectorized_is_looped_over(task: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(LanguageModel):
        def forward(self, ids, positions):  # type: ignore[no-untyped-def]
            if ids.sum().item() < 0:
                raise AssertionError
            return super().forward(ids, positions)

    t = task()
    plain = shaken(SMALL.model(t.problem, 0))
    stubborn = Stubborn(plain.model)
    batch = row_batch(t.problem.source_tables["clean"], [0, 1], CPU)
    trained = trained_names(plain)
    rows = RowGradients(stubborn, trained)
    torch.testing.assert_close(rows(batch), RowGradients(plain, trained, "loop")(batch))
    assert rows.how == "loop"
    assert "one by one" in caplog.text
    with pytest.raises(InputError, match=r"baseline\.gradients=loop"):
        RowGradients(stubborn, trained, "vmap")(batch)


def test_batches_of_like_length_hold_every_row_once(task: Make) -> None:
    table = task().problem.source_tables["clean"]
    batches = list(row_batches(table, range(1, 40, 2), 6, CPU))
    assert sorted(row for part, _ in batches for row in part) == list(range(1, 40, 2))
    lengths = [batch.ids.shape[1] for _, batch in batches]
    assert lengths == sorted(lengths)
    for part, batch in batches:
        torch.testing.assert_close(batch.weights.sum(1), torch.ones(len(part)))


def test_the_direction_is_the_next_step_of_adam() -> None:
    """torch's own AdamW, after five steps, takes a sixth with each row's gradient."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=ADAM.betas, eps=ADAM.eps, weight_decay=0)
    for _ in range(5):
        p.grad = torch.randn(6, dtype=torch.float64)
        optimizer.step()
    m, v = (optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    gradients = torch.randn(3, 6, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None]
    found = Adam(m, v, torch.full((6,), 5.0)).direction(gradients)
    before = {key: (value.clone()) for key, value in optimizer.state[p].items()}
    place = p.detach().clone()
    for gradient, direction in zip(gradients, found, strict=True):
        optimizer.state[p].update({key: value.clone() for key, value in before.items()})
        p.data.copy_(place)
        p.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(direction, (place - p.detach()) / 0.1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("active", [All(), LISA(blocks=1, period=2)])
def test_every_checkpoint_corrects_the_bias_of_its_own_step(
    task: Make, monkeypatch: pytest.MonkeyPatch, active: All | LISA
) -> None:
    """Γ at each checkpoint against the paper's formula. A wrong count scales Γ as a whole, which cosines hide, except for ε.

    LISA trains the adapters of another layer after two steps, so that these have taken two steps at the second checkpoint.
    """
    seen: list[tuple[Adam, torch.Tensor, torch.Tensor]] = []
    original = Adam.direction

    def watching(self: Adam, gradients: torch.Tensor) -> torch.Tensor:
        found = original(self, gradients)
        seen.append((self, gradients, found))
        return found

    monkeypatch.setattr(Adam, "direction", watching)
    dataclasses.replace(SMALL, checkpoints=2).scores(dataclasses.replace(task(), active=active))
    own_steps = [2, 4] if isinstance(active, All) else [2, 2]
    of_checkpoint = len(seen) // 2
    for position, (adam, gradients, found) in enumerate(seen):
        t = own_steps[position // of_checkpoint]
        m = (0.9 * adam.m + 0.1 * gradients) / (1 - 0.9 ** (t + 1))
        v = (0.999 * adam.v + 0.001 * gradients**2) / (1 - 0.999 ** (t + 1))
        torch.testing.assert_close(found, m / (v.sqrt() + 1e-8), rtol=1e-4, atol=1e-6)


def test_projections_keep_inner_products() -> None:
    """Right on average, with the variance of a dense matrix of signs: (1 + c² - 2 Σ x_i² y_i²) / d for a cosine of c.

    200 projections of 190 pairs: their mean within 5 standard errors, their variance within 5%, where a projection shifts
    pairs together.
    """
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(20, 5000) + 0.7)  # inner products about 1/3
    d, upper = 256, torch.triu_indices(20, 20, 1).unbind()
    truth = (vectors @ vectors.T)[upper]
    errors = []
    for seed in range(200):
        projected = Projection(5000, d, seed)(vectors)
        errors.append((projected @ projected.T)[upper] - truth)
    variance = (1 + truth**2 - 2 * (vectors**2 @ (vectors**2).T)[upper]) / d
    assert (torch.stack(errors).mean(0).abs() < 5 * (variance / 200).sqrt()).all()
    assert torch.stack(errors).var(0).mean() == pytest.approx(float(variance.mean()), rel=0.05)


def test_a_projection_is_linear_and_a_function_of_its_seed() -> None:
    torch.manual_seed(0)
    v = torch.randn(3, 2000)
    project = Projection(2000, 256, 5)
    found = project(v)
    torch.testing.assert_close(project(v[:1] + 2 * v[1:2]), found[:1] + 2 * found[1:2], rtol=1e-4, atol=1e-3)
    assert torch.equal(found, Projection(2000, 256, 5)(v))
    assert not torch.allclose(found, Projection(2000, 256, 6)(v), atol=0.1)
    columns = project(torch.eye(2000))
    assert ((columns != 0).sum(1) == 1).all(), "every number goes to one column"
    assert set(columns.sum(1).tolist()) == {-1.0, 1.0}
    assert columns.abs().sum(0).max() < 30, "of columns that 8 numbers go to on average"


def test_scores_are_the_mean_cosines_of_projected_gradients(task: Make) -> None:
    """The whole score, recomputed: warm-up by torch's AdamW on the mean over sources, then cosine by cosine."""
    t = task()
    less = dataclasses.replace(SMALL, checkpoints=2)
    found = less.find(t).selection
    assert found is not None
    model = less.model(t.problem, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=less.lr, weight_decay=0)
    project = Projection(sum(p.numel() for p in trained), 256, 0)
    rows = RowGradients(model, trained_names(model), "loop")
    expected = 0.0
    for step in range(4):
        (batch,) = t.problem.lower_batch(step, Shard(0))
        optimizer.zero_grad()
        (batch.weights @ token_losses(model(batch.ids, batch.positions), batch.targets)).mean().backward()
        optimizer.step()
        if step in (1, 3):
            m, v = (torch.cat([optimizer.state[p][k].flatten() for p in trained]) for k in ("exp_avg", "exp_avg_sq"))
            target = project(rows(row_batch(t.problem.validation_tables["validation"], range(30), CPU)))
            adam = Adam(m, v, torch.full_like(m, step + 1))
            direction = project(adam.direction(rows(row_batch(t.problem.source_tables["other"], range(8), CPU))))
            expected = expected + torch.cosine_similarity(direction[:, None], target[None], dim=2).mean(1) / 2
    np.testing.assert_allclose(found.scores["other"][:8], np.asarray(expected), atol=2e-4)


def test_rows_like_the_target_are_selected(task: Make, data: dict[str, str], tmp_path: Path) -> None:
    """`clean` comes from the target's distribution; the other sources are made of other letters."""
    digits = write_rows(tmp_path / "digits.jsonl", sentences(5, 30, [str(n) for n in range(100, 130)]))
    sources = [Source("digits", digits), Source("clean", data["clean"]), Source("noise", data["noise"])]
    outcome = dataclasses.replace(SMALL, share=0.3, warmup_steps=6).find(task(sources=sources))
    selection = outcome.selection
    assert selection is not None
    means = {name: scores.mean() for name, scores in selection.scores.items()}
    assert means["clean"] > max(means["digits"], means["noise"]) + 0.05, means
    assert len(selection) == 28
    assert outcome.weights == selection.shares
    assert outcome.weights["clean"] > 0.8
    assert sum(outcome.weights.values()) == pytest.approx(1)


def test_a_row_counts_for_the_set_that_it_serves_best(task: Make, data: dict[str, str], tmp_path: Path) -> None:
    """max over validation sets: a second one, like `noise`, lifts the rows of `noise`, and lowers no row."""
    second = write_rows(tmp_path / "second.jsonl", sentences(9, 20, [chr(c) * 3 for c in range(65, 91)]))
    sets = [ValidationSet(data["target"]), ValidationSet(second, name="second")]
    one, both = (SMALL.find(task(validation=v)).selection for v in (sets[:1], sets))
    assert one is not None
    assert both is not None
    for name in ("clean", "other", "noise"):
        assert (both.scores[name] >= one.scores[name] - 1e-4).all()
    assert both.scores["noise"].mean() > one.scores["noise"].mean() + 0.05


def test_the_same_task_gives_the_same_rows_and_the_cost_is_counted(task: Make) -> None:
    outcome, again = SMALL.find(task(seed=4)), SMALL.find(task(seed=4))
    assert outcome.selection is not None
    assert again.selection is not None
    assert list(outcome.selection) == list(again.selection)
    problem = task().problem
    sources = list(problem.source_tables.values())
    warm = sum(len(sources[s].row(row)[0]) for step in range(4) for s, row in problem.lower_rows(step, 4))
    everything = sum(len(table.ids) for table in [*sources, *problem.validation_tables.values()])
    assert outcome.cost.tokens == outcome.cost.backward_tokens == warm + everything
    assert outcome.cost.seconds > 0


def test_the_best_rows_are_taken_over_all_sources() -> None:
    scores = {"a": np.array([0.1, 0.9, 0.5]), "b": np.array([0.5, 0.7])}
    selection = Selection.best(scores, 3)
    assert list(selection) == [("a", 1, 0.9), ("b", 1, 0.7), ("a", 2, 0.5)]  # of equal ones, the earlier
    assert selection.shares == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}


def test_by_default_the_warm_up_is_as_long_as_in_the_paper_within_the_budget(task: Make) -> None:
    assert LESS()._steps(task(steps=50)) == 2  # 4 epochs of 5% of 94 rows, in batches of 10
    assert LESS()._steps(task(steps=1)) == 1


def test_one_key_gives_the_settings_of_the_paper() -> None:
    """The training details of arXiv 2402.04333: LoRA 128, learning rate 2e-5, four epochs, d = 8192, 5% selected."""
    assert dataclasses.asdict(LESS(settings="paper")) == {
        "settings": "paper", "share": 0.05, "dimension": 8192, "checkpoints": 4, "lr": 2e-5, "rank": 128,
        "warmup_steps": None, "blocks": (), "gradients": "auto",
    }  # fmt: skip
    assert (ADAM.betas, ADAM.eps, ADAM.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    own = LESS(settings="paper", dimension=64, lr=1e-3)
    assert (own.dimension, own.lr, own.rank, own.checkpoints) == (64, 1e-3, 128, 4)
    assert LESS() == LESS(settings="small", share=0.05, dimension=8192, checkpoints=1, lr=2e-4, rank=8)
    with pytest.raises(ValueError, match="settings must be one of small, paper"):
        LESS(settings="papr")  # type: ignore[arg-type]


@pytest.fixture
def smallest(tmp_path: Path) -> str:
    """A model with one layer of eight units, on which adapters of rank 128 are quick."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "smallest")
    make_tokenizer().save_pretrained(tmp_path / "smallest")
    return str(tmp_path / "smallest")


def test_the_settings_of_the_paper_run(
    task: Make, data: dict[str, str], smallest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what they say: rank and scale of the adapters, dimension, checkpoints, and which gradients go through Adam."""
    seen: list[tuple[int, str, int, int]] = []
    original = LESS._features

    def watching(self: LESS, table: Any, rows: RowGradients, project: Projection, adam: Adam | None, shard: Shard) -> Any:
        seen.append((len(table), "plain" if adam is None else "adam", rows.size, project.dimension))
        return original(self, table, rows, project, adam, shard)

    monkeypatch.setattr(LESS, "_features", watching)
    sources = [Source("clean", data["clean"]), Source("noise", data["noise"])]
    t = task(model=smallest, sources=sources, batch_size=2, steps=20)
    less = LESS(settings="paper")
    outcome = less.find(t)
    layer = less.model(t.problem, 0).model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (128, 8)
    assert layer.scaling["default"] == 4
    size = sum(p.numel() for p in less.model(t.problem, 0).parameters() if p.requires_grad)
    assert seen == [(30, "plain", size, 8192), (40, "adam", size, 8192), (24, "adam", size, 8192)] * 4
    assert outcome.selection is not None
    assert len(outcome.selection) == 3
    assert len(outcome.notes) == 1, "nothing departs from the paper"


def test_departures_from_the_paper_are_noted(task: Make) -> None:
    less = LESS(settings="paper", dimension=64, rank=2, checkpoints=1)
    notes = less._departures(task(steps=1))
    assert "dimension=64 (paper: 8192), checkpoints=1 (paper: 4), rank=2 (paper: 128)" in notes[0]
    assert "took 1 steps, by run.steps=1; the paper's four epochs would be 2" in notes[1]
    assert less._departures(task(steps=2))[1:] == []
    assert SMALL._departures(task()) == []


def test_what_it_cannot_do_is_said_first(task: Make) -> None:
    with pytest.raises(InputError, match=r"more than the budget run\.steps=3"):
        SMALL.check(task(steps=3))
    with pytest.raises(InputError, match="4 checkpoints need as many"):
        LESS(checkpoints=4).check(task(steps=3))
    with pytest.raises(InputError, match=r"baseline\.blocks: no block is named 'layer9'"):
        LESS(blocks=("layer9",)).find(task())
    bad = [{"share": 0}, {"share": 1.5}, {"dimension": 0}, {"rank": 0}, {"warmup_steps": 0}, {"lr": 0}, {"checkpoints": 0}]
    for settings in bad:
        with pytest.raises(ValueError, match="must be"):
            LESS(**settings)  # type: ignore[arg-type]


class Threads(Processes):
    """Threads that stand for processes."""

    def __init__(self, rank: int, meet: threading.Barrier, values: list[Any]) -> None:
        super().__init__(rank, len(values))
        self.meet, self.values = meet, values

    def all_gather_object(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meet.wait(60)
        found = list(self.values)
        self.meet.wait(60)
        return found

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.all_gather_object(tensor.clone())).sum(0))

    def reduce_scatter(self, rows: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        return mine.copy_(self.all_reduce(rows.clone())[self.rank])

    def all_gather(self, shard: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather_object(shard.clone()))

    def gather(self, shard: torch.Tensor, rank: int) -> torch.Tensor | None:
        whole = self.all_gather(shard).flatten()
        return whole if rank == self.rank else None


TURN = threading.Lock()  # threads share torch's random state, processes do not


@dataclasses.dataclass
class ThreadBackend(TorchBackend):
    """One of two processes that hold all parameters."""

    processes: Threads | None = None
    shards_moments: bool = False

    def start(self, seed: int) -> None:
        assert self.processes is not None
        self.begin(seed, CPU, Grid(self.processes, self.processes, Processes()))

    def placement(self, world_size: int) -> Placement:
        return Placement("threads", world_size)

    def place(self, *arguments: Any, **settings: Any) -> ModuleVariable:
        with TURN:
            return super().place(*arguments, **settings)

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        assert self.processes is not None
        if self.shards_moments:
            return Partitioned(module, self._grid, CPU, reduces_at_step=False)
        return Replicated(module, self.processes)


class InTurn(LESS):
    def model(self, problem: LLMReweighting, seed: int) -> LanguageModel:
        with TURN:
            return super().model(problem, seed)


@pytest.mark.parametrize("shards_moments", [False, True])
def test_processes_share_the_rows_and_agree_with_one(task: Make, shards_moments: bool) -> None:
    """Two threads as two processes. 1e-3: Adam's first steps are signs, which magnify rounding."""
    less = InTurn(**{**dataclasses.asdict(SMALL), "gradients": "loop", "warmup_steps": 2})
    meet, values = threading.Barrier(2), [None, None]
    tasks = [
        dataclasses.replace(
            task(), backend=ThreadBackend(processes=Threads(rank, meet, values), shards_moments=shards_moments)
        )
        for rank in range(2)
    ]
    taken: list[int] = []

    class Counting(RowGradients):
        def __call__(self, batch: RowBatch) -> torch.Tensor:
            taken.append(len(batch))
            return super().__call__(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilevel_llm.baselines.less.RowGradients", Counting)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(less.scores, tasks))
    rows = [*tasks[0].problem.source_tables.values(), *tasks[0].problem.validation_tables.values()]
    assert sum(taken) == sum(map(len, rows)), "every row is taken by one process"
    one = less.scores(task())
    for name, scores in one.items():
        np.testing.assert_array_equal(both[0][name], both[1][name])
        np.testing.assert_allclose(both[0][name], scores, atol=1e-3)


@pytest.mark.parametrize("backend", [FSDPBackend(), DeepSpeedBackend(zero_stage=3)], ids=["fsdp", "deepspeed"])
def test_a_backend_that_splits_parameters_is_refused_before_a_model_is_loaded(
    task: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = dataclasses.replace(task(), backend=backend)
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=rf"the backend {backend.placement(1).name} splits them; set backend\.name=torch"):
        SMALL.check(t)
    SMALL.check(dataclasses.replace(t, backend=DeepSpeedBackend(zero_stage=2)))


def test_settings_of_the_backend_change_no_score(task: Make) -> None:
    """1e-3: Adam's first steps are signs, which magnify rounding."""
    plain = SMALL.scores(task())
    backend = TorchBackend(device="cpu", micro_batch_size=3, activation_checkpointing=True)
    for name, scores in SMALL.scores(dataclasses.replace(task(), backend=backend)).items():
        np.testing.assert_allclose(scores, plain[name], atol=1e-3)


def test_in_bfloat16_the_scores_come_near(task: Make) -> None:
    plain = SMALL.scores(task())
    low = SMALL.scores(dataclasses.replace(task(), backend=TorchBackend(device="cpu", dtype="bfloat16")))
    every, near = (np.concatenate(list(scores.values())) for scores in (plain, low))
    assert np.isfinite(near).all()
    assert np.corrcoef(every, near)[0, 1] > 0.9


def test_gradients_are_those_of_the_blocks_that_train_at_the_checkpoint(task: Make) -> None:
    """LISA trains the adapters of one layer at a time, and in every period those of another."""
    seen: list[list[str]] = []

    class Watching(RowGradients):
        def __init__(self, model: nn.Module, names: list[str], how: How) -> None:
            seen.append(names)
            super().__init__(model, names, how)

    t = dataclasses.replace(task(seed=0), active=LISA(blocks=1, period=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilevel_llm.baselines.less.RowGradients", Watching)
        scores = dataclasses.replace(SMALL, checkpoints=2).scores(t)
    layers = [{name.split(".layers.")[1][0] for name in names} for names in seen]
    assert list(map(len, layers)) == [1, 1]
    assert layers[0] != layers[1]
    assert all(np.ptp(found) > 0 for found in scores.values())


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from bilevel.run_settings import RunSettings
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.reweighting.problem import LLMReweighting
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.less import LESS
given = json.loads(sys.argv[1])
problem = LLMReweighting(given["model"], [Source(n, p) for n, p in given["sources"].items()], validation=[ValidationSet(given["target"])], max_length=64, batch_size=10)
problem.prepare()
less = LESS(dimension=256, rank=4, warmup_steps=4, lr=1e-2)
selection = less.find(Task(problem, DeepSpeedBackend(zero_stage=given["stage"], dtype="float32"), RunSettings(6))).selection
json.dump({name: scores.tolist() for name, scores in selection.scores.items()}, open(sys.argv[2] + os.environ["RANK"], "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_of_a_launcher_agree_with_one(
    stage: int, task: Make, model_directory: Callable[[str], Path], data: dict[str, str], tmp_path: Path
) -> None:
    """DeepSpeed over gloo, as torchrun would launch it. 1e-3: Adam's first steps are signs, which magnify rounding."""
    sources = {name: data[name] for name in ("clean", "other", "noise")}
    given = json.dumps(
        {"model": str(model_directory("llama")), "sources": sources, "target": data["target"], "stage": stage}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path)}
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, given, str(tmp_path / "scores")],
            env={**os.environ, **launch, **no_gpu, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    outputs = [json.loads((tmp_path / f"scores{rank}").read_text()) for rank in range(2)]
    assert outputs[0] == outputs[1]
    one = SMALL.find(task()).selection
    assert one is not None
    for name, scores in one.scores.items():
        np.testing.assert_allclose(outputs[0][name], scores, atol=1e-3)
