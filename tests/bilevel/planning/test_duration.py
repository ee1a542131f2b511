"""The seconds of a step, against arithmetic on paper, with units chosen so that one thing at a time takes long."""

import dataclasses
from collections.abc import Mapping

import pytest

from bilevel import Active, All, Blocks, InputError, ScaleBiO
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import Plan, make_plan
from bilevel.solver import Workload
from tests.bilevel.planning.small import OUTSIDE, SIZES, TOTAL, small_cost
from tests.bilevel.planning.zero import Zero

PASSES = 3  # of a step of ScaleBiO, each of one micro-batch here
LINK, NODE_LINK = 1e-6, 1e-7  # GB/s, so that some bytes take seconds
FAST, SLOW = 1e9, 1e-12  # TFLOP/s: computing takes no time, or all of it
MACHINE = Hardware(
    gpus=4, mfu=1.0, link=LINK, node_link=NODE_LINK, gpus_per_node=2, memory_bandwidth=1e30, launch=0, gather_launch=0
)


@dataclasses.dataclass(frozen=True)
class Only(Active):
    """One block trains."""

    block: str

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        return frozenset([self.block])

    def heaviest(self, blocks: Blocks, sizes: Mapping[str, int]) -> list[frozenset[str]]:
        return [self.at(0, blocks, 0)]


THIRD = Only("layers.2")


def plan(backend: Zero, active: Active = THIRD, workload: Workload | None = None, **machine) -> Plan:  # type: ignore[no-untyped-def]
    hardware = dataclasses.replace(MACHINE, **{"gpus_per_node": 4, **machine})
    backend = dataclasses.replace(backend, dtype="bfloat16")
    setup = Setup(backend, active, workload or ScaleBiO().workload(), steps=50)
    return make_plan(Footprint(small_cost(), "bfloat16"), setup, hardware)


def one_way(size: float, processes: int = 4, speed: float = LINK) -> float:
    return size * (processes - 1) / processes / (speed * GB)


FORWARD, BACKWARD, FIRST = 2 * TOTAL, 2 * (SIZES[2] + SIZES[3] + OUTSIDE), 2 * (OUTSIDE + SIZES[0])
REDUCED = 4 * SIZES[2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gathers_go_down_to_the_lowest_active_block_and_serve_its_recomputation(checkpointing: bool) -> None:
    found = plan(Zero(activation_checkpointing=checkpointing), peak_tflops=FAST)
    assert found.step_seconds == pytest.approx(PASSES * one_way(FORWARD + BACKWARD + REDUCED))
    whole = plan(Zero(activation_checkpointing=checkpointing), All(), peak_tflops=FAST)
    assert whole.step_seconds == pytest.approx(PASSES * one_way(2 * FORWARD - 2 * OUTSIDE + 4 * TOTAL))


def test_what_stands_outside_the_blocks_is_gathered_once_where_it_stays_for_the_pass() -> None:
    found = plan(Zero(whole_units=True), peak_tflops=FAST)
    assert found.step_seconds == pytest.approx(PASSES * one_way(FORWARD + BACKWARD - 2 * OUTSIDE + REDUCED))


def test_computing_hides_all_but_the_first_gathers_and_the_last_reduction() -> None:
    found = plan(Zero(), peak_tflops=SLOW)
    assert found.seconds["communicating"] == pytest.approx(PASSES * one_way(FIRST + REDUCED))
    assert found.hidden == pytest.approx(PASSES * one_way(FORWARD + BACKWARD - FIRST))
    assert found.step_seconds == pytest.approx(found.seconds["computing"] + found.seconds["communicating"])
    every = plan(
        Zero(), All(), peak_tflops=SLOW
    )  # six blocks train, and the last of their reductions is the one in the open
    assert every.seconds["communicating"] == pytest.approx(PASSES * one_way(FIRST + 4 * TOTAL / 6))


def test_passes_without_gradients_gather_once() -> None:
    evaluation = Workload(ScaleBiO().workload().replicas, lower_forwards=1)
    assert plan(Zero(), workload=evaluation, peak_tflops=FAST).step_seconds == pytest.approx(one_way(FORWARD))


def test_what_is_gathered_is_copied_once_more() -> None:
    found = plan(Zero(), peak_tflops=FAST, link=1e30, memory_bandwidth=LINK)
    assert found.step_seconds == pytest.approx(PASSES * 2 * (FORWARD + BACKWARD) / (LINK * GB))


def test_whole_gradients_wait_for_the_step() -> None:
    states = {stage: plan(Zero(zero_stage=stage), peak_tflops=SLOW).seconds["communicating"] for stage in range(3)}
    updated = 2 * SIZES[2]
    assert states[0] == pytest.approx(2 * 2 * one_way(REDUCED))  # an all-reduce for each of the two replicas
    assert states[1] == pytest.approx(2 * one_way(REDUCED + updated))
    assert states[2] == pytest.approx(PASSES * one_way(REDUCED) + 2 * one_way(updated))


def test_groups_of_a_node_gather_at_its_speed_and_exchange_shards_of_gradients_alone() -> None:
    everywhere = plan(Zero(), peak_tflops=FAST, gpus_per_node=2)
    assert everywhere.step_seconds == pytest.approx(PASSES * one_way(FORWARD + BACKWARD + REDUCED, speed=NODE_LINK))
    hybrid = plan(Zero(shard_group=2), peak_tflops=FAST, gpus_per_node=2)
    across = 2 * one_way(REDUCED / 2, processes=2, speed=NODE_LINK)
    assert hybrid.step_seconds == pytest.approx(PASSES * (one_way(FORWARD + BACKWARD + REDUCED, processes=2) + across))


def test_groups_split_memory_among_themselves_alone() -> None:
    two, four = plan(Zero(shard_group=2)), plan(Zero())
    for part in ("parameters", "masters", "moments", "gradients"):
        assert two.gpu[part] == 2 * four.gpu[part] > 0
    assert two.gpu["activations"] == four.gpu["activations"]
    offloaded = Zero(shard_group=2, offload_optimizer=True, offload_parameters=True)
    in_one, in_two = plan(offloaded), plan(offloaded, gpus_per_node=2)
    assert in_one.cpu["parameters"] == 2 * in_two.cpu["parameters"] == 2 * 2 * 2 * TOTAL


def test_gpus_that_do_not_form_whole_groups_are_refused() -> None:
    with pytest.raises(InputError, match="4 GPUs are not groups of 3"):
        plan(Zero(shard_group=3))


def test_a_pass_takes_as_long_as_the_cpu_needs_to_start_its_operations() -> None:
    model = Footprint(small_cost(), "bfloat16")
    operations = model.passing(2, THIRD.at(0, model.blocks, 0), recompute=False).operations
    found = plan(Zero(), peak_tflops=FAST, link=1e30, launch=1.0, gather_launch=100.0)
    assert found.step_seconds == pytest.approx(PASSES * (operations + 100 * (6 + 3)))
    assert plan(Zero(), peak_tflops=SLOW, launch=1e-9).seconds["starting kernels"] == 0
