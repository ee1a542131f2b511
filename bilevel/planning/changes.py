"""What would make a run fit: settings that save memory, alone and together, the cheapest in time first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from bilevel.active import LISA, All
from bilevel.backend import Backend
from bilevel.errors import InputError
from bilevel.planning.footprint import Footprint, share
from bilevel.planning.hardware import Hardware
from bilevel.planning.plan import Plan, Setup, make_plan

MOST_GPUS = 64


@dataclass(frozen=True)
class Option:
    """One setting changed.

    words: as one writes it behind `bilevel plan RECIPE`.
    """

    words: tuple[str, ...]
    apply: Callable[[Setup, Hardware], tuple[Setup, Hardware]]


@dataclass(frozen=True)
class Change:
    """One or more settings changed, and the plan that follows."""

    words: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """What could be done about a run that does not fit.

    cheapest: the change to make. Settings that leave the results as they are come first: the fewest of them, and of as many
        those that cost least time. Failing these, fewer blocks that train at a time; failing these, more GPUs. None:
        nothing that was tried fits.
    alone: every single setting that could be changed, and what it gives.
    """

    cheapest: Change | None
    alone: list[Change] = field(default_factory=list)


def advise(model: Footprint, setup: Setup, hardware: Hardware) -> Advice:
    """Find what would make the run fit. Only settings that the run's own backend and active rule have are tried."""

    def change(options: tuple[Option, ...]) -> Change | None:
        changed, machine = setup, hardware
        try:
            for option in options:
                changed, machine = option.apply(changed, machine)
            return Change(tuple(w for option in options for w in option.words), make_plan(model, changed, machine))
        except (ValueError, InputError):  # settings that do not go together
            return None

    neutral = [options for options in _neutral(model, setup, hardware) if options]
    fewer, more = _fewer_blocks(setup), _more_gpus(hardware)
    alone = [made for options in [*neutral, fewer, more] for option in options if (made := change((option,)))]
    for required in ([], [fewer], [more], [fewer, more]):
        if not all(required):
            continue
        for size in range(len(neutral) + 1):
            fitting = [
                found
                for others in combinations(neutral, size)
                for options in product(*required, *others)
                if options and (found := change(options)) and found.plan.fits
            ]
            if fitting:
                return Advice(min(fitting, key=lambda c: c.plan.step_seconds * c.plan.hardware.gpus), alone)
    return Advice(None, alone)


def _neutral(model: Footprint, setup: Setup, hardware: Hardware) -> Iterator[list[Option]]:
    """Settings that change no result: for each, its values from the nearest on."""
    placement = setup.backend.placement(hardware.gpus)
    yield _set(setup.backend, "activation_checkpointing", [True])
    most = max(share(rows, hardware.gpus) for rows in (model.cost.lower_rows, model.cost.upper_rows))
    rows = min(placement.micro_batch_size or most, most)
    yield _set(setup.backend, "micro_batch_size", [rows >> k for k in range(1, rows.bit_length())])
    stage = getattr(setup.backend, "zero_stage", None)
    yield _set(setup.backend, "zero_stage", list(range(stage + 1, 4)) if isinstance(stage, int) else [])
    yield _set(setup.backend, "offload_optimizer", [True])
    yield _set(setup.backend, "offload_parameters", [True])


def _set(backend: Backend, key: str, values: list[Any]) -> list[Option]:
    """Options that set a field of the backend, if it has one of that name with another value."""
    if not any(f.name == key for f in dataclasses.fields(backend)):  # type: ignore[arg-type]
        return []

    def option(value: Any) -> Option:
        written = str(value).lower() if isinstance(value, bool) else str(value)
        return Option(
            (f"--set backend.{key}={written}",),
            lambda setup, hardware: (replace(setup, backend=_with(setup.backend, key, value)), hardware),
        )

    return [option(value) for value in values if value != getattr(backend, key)]


def _with(backend: Backend, key: str, value: Any) -> Backend:
    return dataclasses.replace(backend, **{key: value})  # type: ignore[type-var]


def _fewer_blocks(setup: Setup) -> list[Option]:
    """Train less at a time. That is another algorithm, so other settings come first."""
    if isinstance(setup.active, All):
        words: tuple[str, ...] = ("--set active.name=lisa", "--set active.blocks=2")
        return [Option(words, lambda setup, hardware: (replace(setup, active=LISA(blocks=2)), hardware))]
    if not isinstance(setup.active, LISA):
        return []

    def option(blocks: int) -> Option:
        return Option(
            (f"--set active.blocks={blocks}",),
            lambda setup, hardware: (replace(setup, active=_lisa(setup, blocks)), hardware),
        )

    return [option(setup.active.blocks >> k) for k in range(1, setup.active.blocks.bit_length())]


def _lisa(setup: Setup, blocks: int) -> LISA:
    assert isinstance(setup.active, LISA)
    return replace(setup.active, blocks=blocks)


def _more_gpus(hardware: Hardware) -> list[Option]:
    def option(gpus: int) -> Option:
        return Option((f"--gpus {gpus}",), lambda setup, machine: (setup, replace(machine, gpus=gpus)))

    return [option(hardware.gpus << k) for k in range(1, 7) if hardware.gpus << k <= MOST_GPUS]
