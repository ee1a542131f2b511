"""Memory and time of a small module, against arithmetic on paper."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bilevel import LISA, SGD, All, InputError, ScaleBiO
from bilevel.active import Active
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import Plan, make_plan
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.planning.small import OUTSIDE, SIZES, TOTAL, WIDTH, small_cost
from tests.bilevel.planning.zero import Zero

BARE = Hardware(context=0, communicator=0, fragmentation=0, process=0)


def plan(
    backend: TorchBackend,
    active: Active | None = None,
    gpus: int = 1,
    solver: ScaleBiO | None = None,
    copied: bool = True,
    **machine,
) -> Plan:  # type: ignore[no-untyped-def]
    hardware = dataclasses.replace(BARE, gpus=gpus, **machine)
    setup = Setup(backend, active or All(), (solver or ScaleBiO()).workload(), steps=50, copied=copied)
    return make_plan(Footprint(small_cost(), backend.dtype), setup, hardware)


def states(found: Plan) -> tuple[int, ...]:
    return tuple(found.gpu[part] for part in ("parameters", "masters", "moments", "gradients"))


def test_bfloat16_has_float32_masters_moments_and_gradients_of_what_trains() -> None:
    assert states(plan(TorchBackend(dtype="bfloat16"))) == (2 * 2 * TOTAL, 2 * 4 * TOTAL, 2 * 8 * TOTAL, 2 * 4 * TOTAL)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float64", 8), (None, 4)])
def test_other_precisions_are_their_own_masters(dtype, width: int) -> None:  # type: ignore[no-untyped-def]
    n = 2 * width * TOTAL
    assert states(plan(TorchBackend(dtype=dtype))) == (n, 0, 2 * n, n)


def test_lisa_counts_the_largest_blocks() -> None:
    trained = sum(sorted(SIZES)[-2:])
    found = plan(TorchBackend(dtype="bfloat16"), LISA(blocks=2))
    assert found.active == trained
    assert states(found)[1:] == (8 * trained, 16 * trained, 8 * trained)
    with_head = plan(TorchBackend(dtype="bfloat16"), LISA(blocks=2, head="train"))
    assert with_head.active == trained + OUTSIDE


def test_lisa_keeps_the_activations_of_a_draw_with_the_first_block() -> None:
    """One block: the largest is the third, and the first makes all four keep activations. The worse of the two counts."""
    draws = LISA(blocks=1).heaviest(Footprint(small_cost(), None).blocks, dict(zip(["layers.0", "layers.1", "layers.2", "layers.3"], SIZES, strict=True)))  # fmt: skip
    assert draws == [frozenset({"layers.2"}), frozenset({"layers.0"})]
    many = Footprint(small_cost(lower_rows=4096), "bfloat16")
    found = make_plan(many, Setup(TorchBackend(dtype="bfloat16"), LISA(blocks=1), ScaleBiO().workload()), BARE)
    assert found.gpu["activations"] == many.passing(4096, draws[1], recompute=False).kept
    assert found.gpu["activations"] > many.passing(4096, draws[0], recompute=False).kept


@pytest.mark.parametrize(("optimizer", "moments"), [(SGD(), 0), (SGD(momentum=0.9), 1)])
def test_moments_are_those_of_the_optimizer(optimizer: SGD, moments: int) -> None:
    found = plan(TorchBackend(dtype="bfloat16"), solver=ScaleBiO(optimizer_z=optimizer))
    assert found.gpu["moments"] == 2 * moments * 4 * TOTAL


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_splits_one_thing_more(stage: int) -> None:
    whole = states(plan(Zero(zero_stage=0, dtype="bfloat16"), gpus=4))
    split = states(plan(Zero(zero_stage=stage, dtype="bfloat16"), gpus=4))
    parts = {"parameters": stage >= 3, "masters": stage >= 1, "moments": stage >= 1, "gradients": stage >= 2}
    assert split == tuple(size // 4 if is_split else size for size, is_split in zip(whole, parts.values(), strict=True))


LARGEST, SECOND = sorted(SIZES)[:-3:-1]
REDUCED = 4 * (LARGEST + SECOND + LARGEST // 4)  # bytes of a block's message, the next one, and this process's share of one


def test_stage_three_gathers_a_block_beside_the_next_while_messages_come_and_go() -> None:
    found = plan(Zero(dtype="bfloat16"), gpus=4)
    assert found.gpu["communication"] == 2 * (LARGEST + SECOND) + REDUCED
    assert plan(Zero(dtype="bfloat16", zero_stage=2), gpus=4).gpu["communication"] == REDUCED
    assert (
        plan(Zero(dtype="bfloat16", zero_stage=1), gpus=4).gpu["communication"] == 0
    )  # whole gradients, summed at the step
    assert plan(Zero(dtype="bfloat16", zero_stage=2)).gpu["communication"] == 0
    parts = plan(Zero(dtype="bfloat16", zero_stage=2, message=100), gpus=4)
    assert parts.gpu["communication"] == 4 * (100 + 100 + 100 // 4)


def test_units_are_gathered_and_reduced_whole() -> None:
    """The head stays; the embedding is gone when two blocks are there."""
    found = plan(Zero(dtype="bfloat16", whole_units=True), gpus=4)
    assert found.gpu["communication"] == 2 * (LARGEST + SECOND + OUTSIDE) + 6 * LARGEST + 2 * TOTAL // 4


def test_where_the_loss_takes_most_what_blocks_need_for_communication_does_not_count() -> None:
    """At the loss, only the head is gathered, and no gradient is on its way."""

    def loss(module: nn.Module, rows: int) -> Tensor:
        return module(torch.empty(rows, dtype=torch.int64, device="meta")).float().repeat(1, 500).exp().sum()

    model = Footprint(dataclasses.replace(small_cost(), loss=loss), "bfloat16")
    setup = Setup(Zero(dtype="bfloat16", whole_units=True), All(), ScaleBiO().workload())
    found = make_plan(model, setup, dataclasses.replace(BARE, gpus=4))
    assert found.gpu["communication"] == 2 * OUTSIDE
    assert found.gpu["output, loss and working memory"] >= 2 * 2 * 10 * 500 * 4  # the exponentials and their gradient


def test_what_may_stay_gathered_counts() -> None:
    found = plan(Zero(dtype="bfloat16", live_parameters=TOTAL - 100), gpus=4)
    assert found.gpu["communication"] == 2 * (TOTAL - 100) + REDUCED
    more = plan(Zero(dtype="bfloat16", live_parameters=2 * TOTAL), gpus=4)
    assert more.gpu["communication"] == 2 * TOTAL + REDUCED


@pytest.mark.parametrize(("fetched", "buffer"), [(1, max(SIZES)), (max(SIZES) + 5, max(SIZES) + 5), (10 * TOTAL, TOTAL)])
def test_a_buffer_to_gather_into_counts(fetched: int, buffer: int) -> None:
    without = plan(Zero(dtype="bfloat16"), gpus=4).gpu["communication"]
    found = plan(Zero(dtype="bfloat16", fetched_parameters=fetched), gpus=4)
    assert found.gpu["communication"] == without + 2 * buffer


def test_what_is_offloaded_is_in_the_memory_of_the_cpu() -> None:
    found = plan(Zero(dtype="bfloat16", offload_optimizer=True, offload_parameters=True), gpus=4)
    assert states(found) == (0, 0, 0, 0)
    assert found.cpu["parameters"] == 2 * 2 * TOTAL
    assert found.cpu["masters, moments, gradients"] == 2 * 16 * TOTAL
    unsplit = plan(Zero(dtype="bfloat16", zero_stage=0, offload_optimizer=True), gpus=4)
    assert states(unsplit) == (2 * 2 * TOTAL, 0, 0, 2 * 4 * TOTAL)  # gradients wait on the GPU until they are summed
    assert unsplit.cpu["masters, moments, gradients"] == 4 * 2 * 12 * TOTAL
    full = plan(Zero(dtype="float32", offload_optimizer=True), gpus=4)
    assert full.cpu["masters, moments, gradients"] == 2 * 16 * TOTAL  # a master beside the parameter, as it is elsewhere


def test_a_checkpoint_passes_through_the_memory_of_the_cpu() -> None:
    assert plan(Zero(dtype="bfloat16"), gpus=4).cpu["writing a checkpoint"] == 2 * (2 + 12) * TOTAL
    assert plan(TorchBackend(dtype="float32")).cpu["writing a checkpoint"] == 2 * (4 + 8) * TOTAL
    assert plan(TorchBackend(dtype="float32"), copied=False).cpu["writing a checkpoint"] == 4 * 512  # its largest matrix


def test_writing_masters_back_counts_where_it_is_more_than_a_pass() -> None:
    one = plan(TorchBackend(dtype="bfloat16", micro_batch_size=1))
    assert one.gpu["activations"] + one.gpu["output, loss and working memory"] == 10 * WIDTH * 64


def test_reserve_and_limits() -> None:
    found = plan(Zero(dtype="bfloat16"), gpus=4, context=1.0, communicator=0.5, fragmentation=0.1, gpu_memory=1.5)
    held = sum(size for part, size in found.gpu.items() if part != "CUDA, NCCL and allocator")
    assert found.gpu["CUDA, NCCL and allocator"] == round(1.5e9 + 0.1 * held)
    assert not found.fits
    assert plan(TorchBackend(), gpu_memory=1.5).fits
    assert not plan(TorchBackend(), gpu_memory=1.5, cpu_memory=1e-9).fits


def test_time_is_flops_over_what_the_gpus_do() -> None:
    one = plan(Zero(dtype="bfloat16"), peak_tflops=2.0, mfu=0.5, launch=0)
    model = Footprint(small_cost(), "bfloat16")
    assert one.flops == 3 * 8 * model.passing(1, model.blocks.names, recompute=False).flops
    assert one.step_seconds == one.seconds["computing"] == one.flops / 1e12
    assert one.units == 3 * 8
    four = plan(Zero(dtype="bfloat16"), gpus=4, peak_tflops=2.0, mfu=0.5)
    assert four.seconds["computing"] == one.seconds["computing"] / 4
    assert four.seconds["communicating"] > 0
    twice = plan(Zero(dtype="bfloat16"), peak_tflops=2.0, mfu=0.5, solver=ScaleBiO(lower_steps=2))
    assert twice.flops == 2 * one.flops


def test_mean_flops_follow_the_draws_of_the_run() -> None:
    """With one active block of four the backward pass ends there; the run's own draws say how often each is drawn."""
    model = Footprint(small_cost(), None)
    rule = LISA(blocks=1, period=1)
    drawn = [rule.at(t, model.blocks, 0) for t in range(50)]
    exact = sum(model.passing(1, draw, recompute=False).flops for draw in drawn) / 50
    found = plan(TorchBackend(), rule)
    assert found.flops / (3 * 8) == pytest.approx(exact, rel=0.1)  # a line between the ends; these blocks are unequal
    assert found.flops < plan(TorchBackend()).flops


def test_gpus_that_cannot_share_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="8 rows, which 3 GPUs cannot share"):
        plan(Zero(), gpus=3)


def test_the_torch_backend_plans_one_device() -> None:
    with pytest.raises(InputError, match="one device, not 2"):
        plan(TorchBackend(), gpus=2)


@pytest.mark.parametrize(
    "bad",
    [
        {"gpus": 0},
        {"gpu_memory": 0},
        {"mfu": 1.5},
        {"mfu": 0},
        {"cpu_memory": -1},
        {"peak_tflops": -1},
        {"link": 0},
        {"node_link": -1},
        {"gpus_per_node": 0},
    ],
)
def test_impossible_machines_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="--"):
        Hardware(**bad)  # type: ignore[arg-type]
