"""What would make a run fit: settings that save memory, alone and together, the cheapest in time first.

What may be set is for the parts to say: `Backend.savings`, `Active.lighter` and, in words, `Cost.savings` and
`Workload.savings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from bilevel.active import Active
from bilevel.errors import InputError
from bilevel.plain import to_plain
from bilevel.planning.footprint import Footprint, share
from bilevel.planning.hardware import Hardware
from bilevel.planning.plan import Plan, Setup, make_plan

MOST_GPUS = 64


@dataclass(frozen=True)
class Option:
    """One changed setting.

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
    others: what the problem and the solver name besides, which was not tried.
    """

    cheapest: Change | None
    alone: list[Change] = field(default_factory=list)
    others: tuple[str, ...] = ()


def advise(model: Footprint, setup: Setup, hardware: Hardware) -> Advice:
    """Find what would make the run fit. Tried are the settings that the run's own backend and active rule name, and GPUs."""

    def change(options: tuple[Option, ...]) -> Change | None:
        changed, machine = setup, hardware
        try:
            for option in options:
                changed, machine = option.apply(changed, machine)
            return Change(tuple(w for option in options for w in option.words), make_plan(model, changed, machine))
        except (ValueError, InputError):  # settings that do not go together
            return None

    neutral = [options for options in _of_backend(model, setup, hardware) if options]
    fewer, more = [_use(rule, setup.active) for rule in setup.active.lighter()], _more_gpus(hardware)
    others = (*model.cost.savings, *setup.workload.savings)
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
                return Advice(min(fitting, key=lambda c: c.plan.step_seconds * c.plan.hardware.gpus), alone, others)
    return Advice(None, alone, others)


def _of_backend(model: Footprint, setup: Setup, hardware: Hardware) -> Iterator[list[Option]]:
    """For each setting of the backend, the values that differ from what it is."""
    rows = max(share(of_batch, hardware.gpus) for of_batch in (model.cost.lower_rows, model.cost.upper_rows))
    for key, values in setup.backend.savings(rows).items():
        yield [_set(key, value) for value in values if value != getattr(setup.backend, key)]


def _set(key: str, value: Any) -> Option:
    def apply(setup: Setup, hardware: Hardware) -> tuple[Setup, Hardware]:
        return replace(setup, backend=dataclasses.replace(setup.backend, **{key: value})), hardware  # type: ignore[type-var]

    return Option((f"--set backend.{key}={_written(value)}",), apply)


def _use(rule: Active, instead_of: Active) -> Option:
    """Another active rule, in the words for what differs: from the present one, or from its class's defaults."""
    old = to_plain(instead_of)
    if type(rule) is not type(instead_of):
        old = {f.name: f.default for f in dataclasses.fields(rule) if f.name != "name"}  # type: ignore[arg-type]
    changed = {key: value for key, value in to_plain(rule).items() if key not in old or old[key] != value}
    name_first = sorted(changed, key=lambda key: key != "name")
    words = tuple(f"--set active.{key}={_written(changed[key])}" for key in name_first)
    return Option(words, lambda setup, hardware: (replace(setup, active=rule), hardware))


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _more_gpus(hardware: Hardware) -> list[Option]:
    def option(gpus: int) -> Option:
        return Option((f"--gpus {gpus}",), lambda setup, machine: (setup, replace(machine, gpus=gpus)))

    return [option(hardware.gpus << k) for k in range(1, 7) if hardware.gpus << k <= MOST_GPUS]
