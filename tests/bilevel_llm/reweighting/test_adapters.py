"""Reweighting with LoRA: y and z are two sets of adapters on one base that never changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilevel import LISA, All, InputError, Rounds, ScaleBiO, fit
from bilevel.active import Active
from bilevel.checkpoint import SavedVariable
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel.solver import Solver
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.model.export import export_model
from bilevel_llm.model.lora import LoRA
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_backends.distributed.cases import tensors

Make = Callable[..., LLMReweighting]
SOLVER = ScaleBiO(lr_x=0.1, lr_z=1e-2, warmup=1)
LORA: dict[str, Any] = {"lora": LoRA(rank=2), "max_length": 48, "batch_size": 3}


def run(
    problem: LLMReweighting,
    output: Path,
    steps: int = 4,
    active: Active | None = None,
    *,
    resume: bool = False,
    dtype: str = "float32",
) -> None:
    backend = TorchBackend(device="cpu", dtype=dtype)  # type: ignore[arg-type]
    fit(problem, SOLVER, backend, steps=steps, active=active, output=output, resume=resume)


@pytest.mark.parametrize("solver", [SOLVER, Rounds(horizon=2, lr_z=1e-2)])
def test_y_and_z_start_alike_and_move_apart_above_one_base(problem: Make, solver: Solver) -> None:  # type: ignore[type-arg]
    backend, reweighting = TorchBackend(device="cpu"), problem(**LORA)
    backend.start(seed=1)
    state = solver.init(reweighting, backend)
    y, z = state.replicas["y"].module, state.replicas["z"].module  # type: ignore[attr-defined]
    ids, places = torch.arange(20)[None], torch.arange(20)
    base = problem().lower()(ids, places)
    assert torch.equal(y(ids, places), base)
    assert torch.equal(z(ids, places), base)
    for t in range(3):
        state.activate(All(), t, 1, backend)
        solver.step(t, state, reweighting, backend)
    moved = {name for name, p in y.named_parameters() if not torch.equal(p, z.get_parameter(name))}
    assert moved
    assert all("lora_" in name for name in moved)
    assert {name for name, p in y.named_parameters() if p is z.get_parameter(name)} == {
        name for name, _ in y.named_parameters() if "lora_" not in name
    }
    backend.close()


@pytest.mark.parametrize(("active", "dtype"), [(None, "bfloat16"), (LISA(blocks=1, period=1), "float32")])
def test_a_run_resumes_bit_for_bit(problem: Make, tmp_path: Path, active: Active | None, dtype: str) -> None:
    run(problem(**LORA), tmp_path / "straight", 3, active, dtype=dtype)
    for steps, resume in ((2, False), (3, True)):
        run(problem(**LORA), tmp_path / "resumed", steps, active, resume=resume, dtype=dtype)
    straight, resumed = (tensors(tmp_path / name, 3) for name in ("straight", "resumed"))
    assert [name for name, tensor in straight.items() if not torch.equal(tensor, resumed[name])] == []
    assert all("lora_" in name for name in straight if not name.startswith("x/"))
    masters = [tensor for name, tensor in straight.items() if "/master/" in name]
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    assert bool(masters) == (dtype == "bfloat16")


def test_lisa_trains_the_adapters_of_the_blocks_that_it_draws(problem: Make, tmp_path: Path) -> None:
    run(problem(**LORA), tmp_path / "run", 3, LISA(blocks=1, period=9))
    moved = {
        name
        for name, tensor in tensors(tmp_path / "run", 3).items()
        if "lora_B" in name and tensor.any() and "weights" in name
    }
    assert len({name.split(".layers.")[1].split(".")[0] for name in moved}) == 1


def test_the_model_of_a_run_is_exported_with_its_adapters_merged(problem: Make, tmp_path: Path) -> None:
    run(problem(**LORA), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "model")
    saved = dict(SavedVariable(tmp_path / "run" / "checkpoints" / "step-00000004", "z").weights())
    exported = load_file(tmp_path / "model" / "model.safetensors")
    base = problem().lower().model.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    part = "model.base_model.model." + name.removesuffix(".weight")
    added = 16 * saved[f"{part}.lora_B.default.weight"] @ saved[f"{part}.lora_A.default.weight"]
    torch.testing.assert_close(exported[name], base[name] + added, rtol=1e-6, atol=1e-7)
    assert torch.equal(exported["lm_head.weight"], base["lm_head.weight"])


def test_a_base_that_has_changed_since_is_neither_exported_nor_gone_on_with(
    problem: Make, tmp_path: Path, copied_model: Callable[[], Path]
) -> None:
    model = copied_model()
    run(problem(model=str(model), **LORA), tmp_path / "run", 2)
    weights: dict[str, Tensor] = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"the model has changed since .*: .*layers\.0\.mlp\.up_proj"):
        export_model(tmp_path / "run", tmp_path / "model")
    with pytest.raises(InputError, match="different data or a different model"):
        run(problem(model=str(model), **LORA), tmp_path / "run", 4, resume=True)


def test_a_plan_counts_the_base_once(problem: Make) -> None:
    model = Footprint(problem(**LORA).cost(), "bfloat16")
    plan = make_plan(model, Setup(TorchBackend(dtype="bfloat16"), All(), SOLVER.workload()), Hardware())
    assert plan.gpu["parameters"] == pytest.approx(2 * plan.parameters + 2 * plan.active, abs=100)  # and small buffers
    assert plan.gpu["moments"] == 2 * 8 * plan.active
    assert plan.cpu["writing a checkpoint"] == pytest.approx(2 * (2 + 4 + 8) * plan.active, abs=100)


def test_a_misspelled_layer_is_named_before_the_first_step(problem: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"problem\.lora\.targets is \['q_project'\]"):
        run(problem(lora=LoRA(targets=["q_project"])), tmp_path / "run")
    assert not (tmp_path / "run").exists()
