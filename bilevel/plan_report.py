"""The plan of a recipe, as tables to read and as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from bilevel.answer import in_words
from bilevel.backend import Placement
from bilevel.config import Config
from bilevel.errors import InputError
from bilevel.planning.changes import Advice, Change, advise, quicken
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.here import measure
from bilevel.planning.load import Setup
from bilevel.planning.plan import Plan, make_plan

LEAST = 5_000_000
"""Bytes that round to 0.01 GB."""
QUICK = 1e-3
"""Seconds below which what a GPU does is not worth naming."""


@dataclass(frozen=True)
class PlanReport:
    """A plan, which rich can print.

    otherwise: the bytes of the activations if activation checkpointing were switched.
    advice: what to do if it does not fit; None if it does.
    quicker: a setting that would make it quicker, if it fits and there is one.
    steps: those of the run.
    """

    plan: Plan
    steps: int
    otherwise: int
    advice: Advice | None
    quicker: Change | None

    def to_json(self) -> str:
        """All numbers: bytes, seconds, FLOPs, and the assumptions."""
        content = {**_plain(self.plan), "steps": self.steps, "activations_otherwise": self.otherwise, "advice": None}
        content["quicker"] = _plain_change(self.quicker)
        if self.advice is not None:
            content["advice"] = {
                "cheapest": _plain_change(self.advice.cheapest),
                "alone": [_plain_change(change) for change in self.advice.alone],
                "others": self.advice.others,
            }
        return json.dumps(content, indent=1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plan = self.plan
        yield Text(_headline(plan))
        yield _memory(_computing(plan.hardware), plan.gpu)
        checkpointed = plan.placement.activation_checkpointing
        yield Text(
            f"activations {'without' if checkpointed else 'with'} checkpointing: {_gb(self.otherwise)}\n", style="dim"
        )
        beside = "beside it" if plan.hardware.on_cpu else f"CPU memory, all processes{_of_node(plan.hardware)}"
        yield _memory(beside, plan.cpu)
        yield Text()
        yield Text(_speed(plan, self.steps))
        yield Text()
        yield _verdict(plan)
        if self.advice is not None:
            yield from _advice(self.advice, plan.placement)
        if self.quicker is not None:
            yield Text(f"quicker: {' '.join(self.quicker.words)}", style="bold")
            yield Text(_in_short(self.quicker.plan))


def plan_run(config: Config, hardware: Hardware | None, *, labelled_share: float = 1.0) -> PlanReport:
    """Plan the run of a recipe. What is read depends on the problem's cost: for a language model, neither data nor weights.

    hardware: None: the machine at hand, which is measured.
    labelled_share: the share of a batch's units that carry a loss.

    Raises `InputError` for a recipe that cannot be planned, or cannot run on that many GPUs.
    """
    if not isinstance(config.problem, config.solver.takes):
        raise InputError(
            f"the solver {type(config.solver).__name__} solves a {config.solver.takes.__name__}, "
            f"not a {type(config.problem).__name__}; change solver.name or problem.name"
        )
    run = config.run
    copied = run.checkpoint_in_background and run.checkpoint_every is not None
    setup = Setup(config.backend, config.active, config.solver.workload(), run.seed, run.limit, copied)
    placement = config.backend.placement(1 if hardware is None else hardware.gpus)
    model = Footprint(config.problem.cost(labelled_share), placement.dtype)
    if hardware is None:
        hardware = measure(model, setup)
    plan = make_plan(model, setup, hardware)
    draws = config.active.heaviest(model.blocks, model.sizes)
    otherwise = max(model.passing(plan.rows, d, recompute=not placement.activation_checkpointing).kept for d in draws)
    advice = None if plan.fits else advise(model, setup, hardware)
    return PlanReport(plan, run.limit, otherwise, advice, quicken(model, setup, plan) if plan.fits else None)


def _headline(plan: Plan) -> str:
    rows = f"{plan.rows} row{'s' if plan.rows > 1 else ''} at a time"
    return (
        f"{_billions(plan.parameters)} parameters in each replica, {_billions(plan.active)} of them train at a time; "
        f"{plan.placement.name}, {rows}\n"
    )


def _memory(title: str, parts: Mapping[str, int]) -> Table:
    table = Table(title, "GB", box=None, header_style="bold", pad_edge=False, show_footer=True)
    table.columns[1].justify = "right"
    for part, size in parts.items():
        table.add_row(part, _number(size))
    table.columns[0].footer, table.columns[1].footer = "in all", f"{sum(parts.values()) / GB:.2f}"
    return table


def _computing(hardware: Hardware) -> str:
    if hardware.on_cpu:
        return "memory of this machine"
    return f"each of {hardware.gpus} GPUs" if hardware.gpus > 1 else "the GPU"


def _speed(plan: Plan, steps: int) -> str:
    hardware = plan.hardware
    if not hardware.measured and plan.step_seconds - plan.seconds["starting kernels"] < QUICK:
        return (
            f"{plan.flops / 1e9:,.3g} GFLOP and {plan.units:,.0f} {plan.unit} a step: so little that the time is that of "
            "Python and of starting kernels, which no plan knows"
        )
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in plan.seconds.items() if value)
    if plan.hidden >= QUICK:
        seconds += f"; communicating behind the computing {plan.hidden:.2f}"
    speed = (
        f"{plan.flops / 1e12:,.3g} TFLOP a step at {hardware.peak_tflops:.3g} TFLOP/s, measured here in passes of this model"
        if hardware.measured
        else f"{plan.flops / 1e12:,.1f} TFLOP a step at {hardware.mfu:.0%} of {hardware.peak_tflops:g} TFLOP/s"
    )
    return (
        f"about {3600 / plan.step_seconds:,.0f} steps an hour, {plan.units / plan.step_seconds:,.0f} {plan.unit} a second; "
        f"{steps:,} steps take about {in_words(steps * plan.step_seconds)}\n"
        f"{plan.step_seconds:.2g} s a step ({seconds}); {speed}"
    )


def _verdict(plan: Plan) -> Text:
    hardware = plan.hardware
    found = f"{_gb(plan.gpu_bytes)} of {hardware.gpu_memory:g} GB on each GPU"
    if hardware.on_cpu:
        found = f"{_gb(plan.gpu_bytes + plan.cpu_bytes)} of the {hardware.gpu_memory:.1f} GB that are free"
    elif hardware.cpu_memory is not None:
        found += f", {_gb(plan.cpu_bytes)} of {hardware.cpu_memory:g} GB of CPU memory{_of_node(hardware)}"
    return Text(f"{'fits' if plan.fits else 'does not fit'}: {found}", style="green" if plan.fits else "red")


def _advice(advice: Advice, placement: Placement) -> Iterator[RenderableType]:
    if advice.alone:
        table = Table("one change alone", "GB", "CPU GB", "s a step", "", box=None, header_style="bold", pad_edge=False)
        for column in table.columns[1:4]:
            column.justify = "right"
        for change in advice.alone:
            table.add_row(*_row(change))
        yield Text()
        yield table
    yield Text()
    if advice.cheapest is None:
        left = [*advice.others, "larger GPUs"]
        if not placement.split_parameters:
            left.append("a backend that splits the lower variable over several GPUs")
        yield Text(f"nothing that was tried makes it fit with the {placement.name} backend; what is left is {_or(left)}")
        return
    yield Text(f"cheapest change that fits: {' '.join(advice.cheapest.words)}", style="bold")
    yield Text(_in_short(advice.cheapest.plan))


def _in_short(plan: Plan) -> str:
    if plan.hardware.on_cpu:
        return f"{_gb(plan.gpu_bytes + plan.cpu_bytes)}, {plan.step_seconds:.2g} s a step"
    cpu = f"{_gb(plan.cpu_bytes)} of CPU memory{_of_node(plan.hardware)}"
    return f"{_gb(plan.gpu_bytes)} on each GPU, {cpu}, {plan.step_seconds:.2f} s a step"


def _of_node(hardware: Hardware) -> str:
    return " of a node" if hardware.gpus > hardware.gpus_per_node else ""


def _or(phrases: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _row(change: Change) -> tuple[str, ...]:
    plan = change.plan
    sizes = (f"{plan.gpu_bytes / GB:.2f}", f"{plan.cpu_bytes / GB:.2f}", f"{plan.step_seconds:.2f}")
    return (" ".join(change.words), *sizes, "fits" if plan.fits else "")


def _plain_change(change: Change | None) -> dict[str, object] | None:
    return None if change is None else {"set": change.words, **_plain(change.plan)}


def _plain(plan: Plan) -> dict[str, object]:
    return {
        **asdict(plan),
        "fits": plan.fits,
        "gpu_bytes": plan.gpu_bytes,
        "cpu_bytes": plan.cpu_bytes,
        "step_seconds": plan.step_seconds,
    }


def _number(size: int) -> str:
    return f"{size / GB:.2f}" if size == 0 or size >= LEAST else "<0.01"


def _gb(size: int) -> str:
    return f"{_number(size)} GB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e7 else f"{count:,}"
