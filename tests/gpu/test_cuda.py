"""The torch backend on CUDA against the CPU, and its promises there. Run by `make test-gpu`."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bilevel import LISA, SGD, AdamW, ScaleBiO, fit
from bilevel.testing.contract import check_backend
from bilevel_backends.module_backend import to_device
from bilevel_backends.staging import Staging
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)
from tests.bilevel_llm.model.test_experts import FAMILIES as EXPERTS
from tests.bilevel_llm.test_waiting import require_no_waiting
from tests.bilevel_llm.tiny import FAMILIES, make_tokenizer

pytestmark = pytest.mark.gpu
Make = Callable[..., LLMReweighting]
SOLVER = ScaleBiO(penalty=2.0, lr_x=0.05, lr_z=0.05, optimizer_x=SGD(), optimizer_z=SGD(), warmup=3)


def weights(problem: LLMReweighting, device: str, **settings: Any) -> list[dict[str, float]]:  # noqa: F811
    backend = TorchBackend(device=device, micro_batch_size=4, **settings)
    result = fit(problem, SOLVER, backend, steps=12, active=LISA(blocks=1, period=3))
    return [record.upper for record in result.history]


def test_the_trajectory_is_that_of_the_cpu(problem: Make) -> None:  # noqa: F811
    """float32 with TF32 off: 1e-4 absolute on weights of about 1/3, after 12 steps."""
    for on_cpu, on_gpu in zip(weights(problem(), "cpu"), weights(problem(), "cuda"), strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bfloat16_stays_near_float32(problem: Make, family: str) -> None:  # noqa: F811
    """Rounding of activations leaves some 1e-2 in a loss; times penalty 2 and step 0.05 over 9 steps: 2e-2 on a weight."""
    exact, rounded = weights(problem(family), "cuda"), weights(problem(family), "cuda", dtype="bfloat16")
    assert rounded[-1] == pytest.approx(exact[-1], abs=2e-2)


def test_the_same_seed_gives_the_same_run_bit_for_bit(problem: Make) -> None:  # noqa: F811
    assert weights(problem(), "cuda", dtype="bfloat16") == weights(problem(), "cuda", dtype="bfloat16")


def test_copies_for_a_checkpoint_are_page_locked_and_as_the_tensors_were() -> None:
    staging = Staging(torch.device("cuda"))
    tensors = [torch.randn(1000, device="cuda"), torch.randn(77, 3, device="cuda", dtype=torch.bfloat16), torch.tensor(7.0)]
    before = [tensor.clone().cpu() for tensor in tensors]
    copies = staging.copy(tensors)
    for tensor in tensors:
        tensor.zero_()
    assert all(copy.is_pinned() and torch.equal(copy, then) for copy, then in zip(copies, before, strict=True))
    staging.free()


def test_resume_is_bit_for_bit(problem: Make, tmp_path: Path) -> None:  # noqa: F811
    def go(where: str, steps: int, resume: bool = False) -> Any:
        solver = ScaleBiO(penalty=2.0, lr_z=1e-3, optimizer_z=AdamW(), warmup=3)
        backend = TorchBackend(device="cuda", dtype="bfloat16", micro_batch_size=4)
        fit(problem(), solver, backend, steps=steps, active=LISA(blocks=1, period=3), output=tmp_path / where, resume=resume)
        return json.loads((tmp_path / where / "weights.json").read_text())

    whole = go("whole", 10)
    go("cut", 5)
    assert go("cut", 10, resume=True) == whole


def test_a_switch_frees_the_memory_of_what_it_freezes(problem: Make) -> None:  # noqa: F811
    backend = TorchBackend(device="cuda", dtype="bfloat16")
    backend.start(seed=0)
    p = problem()
    state = SOLVER.init(p, backend)
    z = state.replicas["z"]
    held = []
    for switch in range(30):
        backend.activate(z, frozenset({z.blocks.repeated[switch % 3]}))
        backend.backward(lambda b: p.lower_loss(state.x, z, b), p.lower_batch(switch, backend.shard), wrt={z: 1.0})
        backend.step(z, lr=1e-3)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    backend.close()
    assert max(held[3:]) <= 1.01 * held[2]


def test_the_contract_of_a_backend_is_kept() -> None:
    assert TorchBackend().device == "auto"
    check_backend(TorchBackend)


@contextmanager
def without_waiting() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a prototype feature", said once a process
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_waits_for_nothing(problem: Make, family: str) -> None:  # noqa: F811
    require_no_waiting(problem(family), torch.device("cuda"), without_waiting)


def test_a_batch_is_copied_while_the_gpu_computes(problem: Make) -> None:  # noqa: F811
    """CUDA's debug mode does not see copies that wait: here the GPU is busy for about a second, and must still be after them."""
    batch = list(problem().lower_batch(0, TorchBackend().shard))
    to_device(batch, torch.device("cuda"))  # allocates the pinned memory, which may wait
    torch.cuda._sleep(2_000_000_000)
    to_device(batch, torch.device("cuda"))
    assert not torch.cuda.current_stream().query()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_the_same_every_time(problem: Make, family: str, tmp_path: Path) -> None:  # noqa: F811
    """In deterministic mode, which refuses kernels that are not."""
    AutoModelForCausalLM.from_config(EXPERTS[family]()).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    runs = [weights(problem(model=str(tmp_path)), "cuda", dtype="bfloat16") for _ in range(2)]
    assert runs[0] == runs[1]
