"""What is advised about a run that does not fit."""

import dataclasses
from collections.abc import Mapping

import pytest

from bilevel import LISA, Active, All, Blocks, F2SAp, ScaleBiO
from bilevel.planning.changes import Advice, advise, quicken
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel.plugins import Plugins
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.planning.small import small_cost
from tests.bilevel.planning.zero import Zero


def bytes_of(backend, active, gpus: int = 4, rows: int = 4096) -> int:  # type: ignore[no-untyped-def]
    return make_plan(*arguments(backend, active, gpus, 80.0, rows)).gpu_bytes


def arguments(backend, active, gpus: int, memory: float, rows: int):  # type: ignore[no-untyped-def]
    machine = Hardware(gpus, memory, context=0, communicator=0, fragmentation=0)
    return Footprint(small_cost(rows, rows), backend.dtype), Setup(backend, active, ScaleBiO().workload(), steps=20), machine


def advice(backend, active, limit: int, gpus: int = 4, rows: int = 4096) -> Advice:  # type: ignore[no-untyped-def]
    return advise(*arguments(backend, active, gpus, limit / GB, rows))


def test_large_activations_ask_for_smaller_micro_batches_or_recomputation_whichever_is_quicker() -> None:
    start = bytes_of(Zero(dtype="bfloat16"), All())
    found = advice(Zero(dtype="bfloat16"), All(), limit=start - 1)
    assert found.cheapest is not None
    assert found.cheapest.plan.fits
    fitting = [
        change
        for change in found.alone
        if change.plan.fits and "active" not in change.words[0] and "gpus" not in change.words[0]
    ]
    assert found.cheapest.plan.step_seconds == min(change.plan.step_seconds for change in fitting)
    assert {change.words[0].split("=")[0] for change in found.alone} == {
        "--set backend.activation_checkpointing", "--set backend.micro_batch_size", "--set backend.offload_optimizer",
        "--set backend.offload_parameters", "--set active.name", "--gpus 8", "--gpus 16", "--gpus 32", "--gpus 64",
    }  # fmt: skip


def test_stages_are_raised_before_anything_is_offloaded() -> None:
    start = bytes_of(Zero(dtype="bfloat16", zero_stage=0), LISA(), rows=4)
    found = advice(Zero(dtype="bfloat16", zero_stage=0), LISA(), limit=start - 1, rows=4)
    assert found.cheapest is not None
    assert found.cheapest.words[0].startswith("--set backend.zero_stage=")


def test_two_settings_together_where_one_is_not_enough() -> None:
    target = bytes_of(Zero(dtype="bfloat16", activation_checkpointing=True, micro_batch_size=1), LISA())
    found = advice(Zero(dtype="bfloat16"), LISA(), limit=target)
    assert found.cheapest is not None
    assert len(found.cheapest.words) >= 2
    assert not any(change.plan.fits for change in found.alone if change.words == found.cheapest.words[:1])
    assert found.cheapest.plan.fits


def test_training_fewer_blocks_comes_after_what_changes_no_result() -> None:
    both = TorchBackend(dtype="bfloat16", activation_checkpointing=True, micro_batch_size=1)
    smallest = bytes_of(both, All(), gpus=1)
    enough = advice(TorchBackend(dtype="bfloat16", micro_batch_size=None), All(), limit=smallest, gpus=1)
    assert enough.cheapest is not None
    assert not any("active" in word for word in enough.cheapest.words)
    less = advice(TorchBackend(dtype="bfloat16", micro_batch_size=None), All(), limit=smallest - 1, gpus=1)
    assert less.cheapest is not None
    assert less.cheapest.words[0] == "--set active.name=lisa"


def test_fewer_blocks_are_written_as_the_key_that_differs() -> None:
    found = advice(
        TorchBackend(dtype="bfloat16", micro_batch_size=None), LISA(blocks=4, head="train"), limit=10, gpus=1, rows=8
    )
    words = [change.words for change in found.alone if "active" in change.words[0]]
    assert words == [("--set active.blocks=2",), ("--set active.blocks=1",)]


def test_a_rule_of_a_plugin_says_itself_what_is_lighter() -> None:
    @dataclasses.dataclass(frozen=True)
    class First(Active):
        count: int = 3
        name: str = "first"

        def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
            return frozenset(blocks.repeated[: self.count])

        def heaviest(self, blocks: Blocks, sizes: Mapping[str, int]) -> list[frozenset[str]]:
            return [self.at(0, blocks, 0)]

        def lighter(self) -> list[Active]:
            return [LISA(blocks=1)]

    found = advice(TorchBackend(dtype="bfloat16", micro_batch_size=None), First(), limit=10, gpus=1, rows=8)
    assert ("--set active.name=lisa", "--set active.blocks=1") in [change.words for change in found.alone]


def test_more_gpus_on_several_machines_shard_within_each_if_that_fits_and_is_quicker() -> None:
    """An option that is tried beside others, and proposed for a run that fits already."""
    smallest = Zero(dtype="bfloat16", activation_checkpointing=True, micro_batch_size=1, offload_optimizer=True)
    model, setup, machine = arguments(smallest, LISA(blocks=1), 2, 1.0, 64)
    machine = dataclasses.replace(machine, gpus_per_node=2, launch=0, gather_launch=0)
    on_two, everywhere, within = (
        make_plan(model, dataclasses.replace(setup, backend=dataclasses.replace(smallest, shard_group=group)), on)
        for group, on in (
            (None, machine),
            (None, dataclasses.replace(machine, gpus=4)),
            (2, dataclasses.replace(machine, gpus=4)),
        )
    )
    assert within.step_seconds < everywhere.step_seconds
    assert everywhere.gpu_bytes < within.gpu_bytes == on_two.gpu_bytes
    fits = dataclasses.replace(machine, gpus=4, gpu_memory=within.gpu_bytes / GB)
    found = quicken(model, setup, make_plan(model, setup, fits))
    assert found is not None
    assert found.words == ("--set backend.shard_group=2",)
    assert (
        quicken(model, setup, make_plan(model, setup, dataclasses.replace(fits, gpu_memory=(within.gpu_bytes - 1) / GB)))
        is None
    )
    grouped = dataclasses.replace(setup, backend=dataclasses.replace(smallest, shard_group=2))
    short = advise(model, grouped, dataclasses.replace(fits, gpu_memory=everywhere.gpu_bytes / GB))
    assert short.cheapest is not None
    assert short.cheapest.words == ("--set backend.shard_group=null",)


def test_what_problem_and_solver_name_besides_is_passed_on() -> None:
    cost = dataclasses.replace(small_cost(), savings=("shorter rows (problem.length)",))
    setup = Setup(TorchBackend(), All(), F2SAp(p=4).workload())
    found = advise(Footprint(cost, None), setup, Hardware(gpu_memory=1e-6))
    assert found.cheapest is None
    assert found.others == ("shorter rows (problem.length)", "a lower order (solver.p)")


def test_a_backend_is_asked_for_nothing_that_it_has_not() -> None:
    found = advice(TorchBackend(dtype="bfloat16", micro_batch_size=None), LISA(blocks=2), limit=10, gpus=1, rows=8)
    assert found.cheapest is None
    assert {change.words[0].split("=")[0] for change in found.alone} == {
        "--set backend.activation_checkpointing", "--set backend.micro_batch_size", "--set active.blocks",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "deepspeed", "fsdp"])
def test_what_a_backend_would_set_are_its_fields_at_other_values(name: str, plugins: Plugins) -> None:
    kind = plugins.find("backends", name).load()
    assert kind().savings(8)["micro_batch_size"] == []  # it is chosen by what fits
    backend = kind(micro_batch_size=None)
    savings = backend.savings(8)
    assert savings["micro_batch_size"] == [4, 2, 1]
    for key, values in savings.items():
        assert key in {field.name for field in dataclasses.fields(backend)}
        assert getattr(backend, key) not in values


def test_settings_that_contradict_each_other_are_not_advised() -> None:
    found = advice(Zero(dtype="bfloat16", zero_stage=2), LISA(), limit=10, rows=8)
    assert "--set backend.offload_parameters=true" not in [change.words[0] for change in found.alone]


@pytest.mark.parametrize("limit", [20_000, 60_000, 200_000])
def test_advice_is_what_a_plan_of_it_says(limit: int) -> None:
    found = advice(Zero(dtype="bfloat16", micro_batch_size=16), LISA(), limit=limit, rows=64)
    if found.cheapest is not None:
        assert found.cheapest.plan.gpu_bytes <= limit
