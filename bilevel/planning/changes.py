"""Find what makes a run fit: settings that save memory, alone and together, the cheapest in time first; and, for a run that
fits, what makes it quicker.

What may be set is for the parts to say: `Backend.savings`, `Backend.speedups`, `Active.lighter` and, in words,
`Cost.savings` and `Workload.savings`.
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
from bilevel.planning.load import Setup
from bilevel.planning.plan import Plan, make_plan

MOST_GPUS = 64
WORTH_SAYING = 0.9
"""Of the present time: what is not quicker than this, within what a plan's seconds are good for, is not proposed."""


@dataclass(frozen=True)
class Option:
    """A change that could be made to a run.

    words: the options to append to `bilevel plan RECIPE`.
    """

    words: tuple[str, ...]
    apply: Callable[[Setup, Hardware], tuple[Setup, Hardware]]


@dataclass(frozen=True)
class Change:
    """A change of one or more settings, and the plan that results."""

    words: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """What could be done about a run that does not fit.

    cheapest: the change to make. Settings that leave the results as they are come first: the fewest of them, and of as many
        those that cost least time. Failing these, fewer blocks that train at a time; failing these, more GPUs. None:
        nothing that was tried fits.
    alone: every single setting that could be changed, and the plan that results.
    others: further settings that the problem and the solver name, which were not tried.
    """

    cheapest: Change | None
    alone: list[Change] = field(default_factory=list)
    others: tuple[str, ...] = ()


def advise(model: Footprint, setup: Setup, hardware: Hardware) -> Advice:
    """Find what would make the run fit. It tries more GPUs and the settings that the run's backend and active rule name."""

    def change(options: tuple[Option, ...]) -> Change | None:
        return _change(model, setup, hardware, options)

    def fitting(options: tuple[Option, ...]) -> Iterator[Change]:
        """The change, if it fits, and with one more setting that would make it quicker."""
        made = change(options)
        if made is not None and made.plan.fits:
            yield made
            more = (change((*options, quicker)) for quicker in _speedups(setup, made.plan.hardware))
            yield from (found for found in more if found is not None and found.plan.fits)

    neutral = [options for options in _of_backend(model, setup, hardware) if options]
    fewer, more = [_use(rule, setup.active) for rule in setup.active.lighter()], _more_gpus(hardware)
    others = (*model.cost.savings, *setup.workload.savings)
    alone = [made for options in [*neutral, fewer, more] for option in options if (made := change((option,)))]
    for required in ([], [fewer], [more], [fewer, more]):
        if not all(required):
            continue
        for size in range(len(neutral) + 1):
            found = [
                made
                for settings in combinations(neutral, size)
                for options in product(*required, *settings)
                if options
                for made in fitting(options)
            ]
            if found:
                return Advice(min(found, key=lambda c: c.plan.step_seconds * c.plan.hardware.gpus), alone, others)
    return Advice(None, alone, others)


def quicken(model: Footprint, setup: Setup, plan: Plan) -> Change | None:
    """The setting of the backend that makes a run that fits quickest; None if there is none that is worth saying.

    plan: that of the run as it is.
    """
    made = [_change(model, setup, plan.hardware, (option,)) for option in _speedups(setup, plan.hardware)]
    quicker = [c for c in made if c and c.plan.fits and c.plan.step_seconds < WORTH_SAYING * plan.step_seconds]
    return min(quicker, key=lambda c: c.plan.step_seconds, default=None)


def _change(model: Footprint, setup: Setup, hardware: Hardware, options: tuple[Option, ...]) -> Change | None:
    """These options together, and the plan that results; None if they do not go together."""
    try:
        for option in options:
            setup, hardware = option.apply(setup, hardware)
        return Change(tuple(w for option in options for w in option.words), make_plan(model, setup, hardware))
    except (ValueError, InputError):
        return None


def _speedups(setup: Setup, hardware: Hardware) -> list[Option]:
    """The settings of the backend that would save time on this machine."""
    values = setup.backend.speedups(hardware.gpus, hardware.gpus_per_node)
    return [_set(key, value) for key, tried in values.items() for value in tried if value != getattr(setup.backend, key)]


def _of_backend(model: Footprint, setup: Setup, hardware: Hardware) -> Iterator[list[Option]]:
    """The values of each setting of the backend that differ from the present one."""
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
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _more_gpus(hardware: Hardware) -> list[Option]:
    if hardware.on_cpu:
        return []

    def option(gpus: int) -> Option:
        return Option((f"--gpus {gpus}",), lambda setup, machine: (setup, replace(machine, gpus=gpus)))

    return [option(hardware.gpus << k) for k in range(1, 7) if hardware.gpus << k <= MOST_GPUS]
