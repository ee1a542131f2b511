"""Many runs of one problem side by side: other seeds, other settings, one set of tensor operations for all of them."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.agreement import check_batches
from bilevel.backend import Backend, SideBySide
from bilevel.batch import leaves, map_tensors, tensors_of
from bilevel.blocks import Blocks
from bilevel.errors import InputError
from bilevel.per_run import PerRun
from bilevel.problem import Forward, Loss, Measure, Problem, Shard
from bilevel.schedule import EachRun
from bilevel.solver import Metrics, Solver, begin


@dataclass(frozen=True)
class Runs:
    """What many runs have found. Their first two dimensions are those of the solvers and of the seeds.

    x: the upper variable's parameters at the end, by name. Shape: (solvers, seeds, *shape of the parameter).
    trajectory: the same after each recorded step. Shape: (solvers, seeds, recorded steps, *shape).
    metrics: the numbers that the solver reports for each recorded step, by name; a named part of one is `metric/part`.
        NaN where a step does not report it. Shape: (solvers, seeds, recorded steps).
    steps: the numbers of the recorded steps, from 0.
    diverged: which runs met a number that is not finite, where `fit` would stop. Their x is NaN. Shape: (solvers, seeds).
    """

    x: Mapping[str, Tensor]
    trajectory: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    steps: Sequence[int]
    diverged: Tensor


def fit_many(
    problem: Problem[Any],
    solvers: Solver[Any] | Sequence[Solver[Any]],
    backend: Backend,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    record_every: int = 1,
) -> Runs:
    """Solve min_x f(x, y*(x)) with every solver and every seed, all runs at once.

    Each run ends where `fit` with its solver and its seed ends, up to rounding. For small problems, on which the time of a
    step is that of calling torch rather than of computing, many runs take little longer than one.

    solvers: of one class, alike but for schedules (step sizes, penalties) and other settings that are real numbers.
    backend: one that can hold many runs: `torch`.
    steps: the number of steps of each run.
    seeds: the seeds of each solver's runs: they decide initial values and batches, as in `fit`.
    record_every: steps from one record to the next; the last step is recorded in any case.

    A run that diverges does not end the others; see `Runs.diverged`.

    Raises `InputError` for what the user has to correct: solvers that differ in other settings, a backend that holds one run
    only, a loss that `torch.func.vmap` cannot compute for many, or a solver that decides something by a number on which the
    runs do not agree. The message names that part; `fit` serves all of these.
    """
    chosen = [solvers] if isinstance(solvers, Solver) else list(solvers)
    for name, value in (("steps", steps), ("record_every", record_every)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    problem, solver, runs = side_by_side(problem, chosen, backend, seeds)
    x: list[Mapping[str, Tensor]] = []
    metrics: list[Mapping[str, Any]] = []
    recorded = [t for t in range(steps) if (t + 1) % record_every == 0 or t + 1 == steps]
    problem.prepare()
    runs.start(seeds[0])
    try:
        check_batches(problem, runs)
        state = begin(solver, problem, runs)
        for replica in state.replicas.values():
            runs.activate(replica, replica.blocks.names)
        problem.examine(_refuse_to_measure)
        wanted = set(recorded)
        for t in range(steps):
            found = solver.step(t, state, problem, runs)
            if t in wanted:
                x.append(runs.weights(state.x))
                metrics.append(_flat(found, len(runs.diverged)))
        diverged = runs.diverged.cpu()
    finally:
        runs.close()

    def by_run(values: Sequence[Tensor]) -> Tensor:
        """(records, runs, *shape) -> (solvers, seeds, records, *shape)."""
        joined = torch.stack(list(values), 1)
        return joined.view(len(chosen), len(seeds), *joined.shape[1:])

    trajectory = {name: by_run([point[name] for point in x]) for name in x[0]}
    nothing = torch.full(diverged.shape, torch.nan, dtype=torch.float64)
    names = dict.fromkeys(name for found in metrics for name in found)
    numbers = {name: by_run([found.get(name, nothing) for found in metrics]) for name in names}
    lost = diverged.view(len(chosen), len(seeds))
    end = {name: path[:, :, -1].clone() for name, path in trajectory.items()}
    for last in end.values():
        last[lost] = torch.nan
    return Runs(end, trajectory, numbers, recorded, lost)


def side_by_side(
    problem: Problem[Any], solvers: Sequence[Solver[Any]], backend: Backend, seeds: Sequence[int] = (0,)
) -> tuple[Problem[Any], Solver[Any], SideBySide]:
    """A problem, a solver and a backend that are together a run of every solver with every seed.

    Whatever runs a solver on a problem takes them. Tensors then have a first dimension for the runs: those of the first
    solver, then those of the second, each in the order of the seeds. Raises `InputError` as `fit_many` does.
    """
    if not solvers or not len(seeds):
        raise InputError("there is nothing to run: give at least one solver and one seed")
    every = [seed for _ in solvers for seed in seeds]
    return ForSeeds(problem, every), _merge(solvers, len(seeds)), backend.side_by_side(every)


@dataclass(frozen=True, eq=False)
class Together:
    """The batches of all runs.

    batch: the batch of one of them, of which only the form counts: every tensor stands for one of `tensors`.
    tensors: the tensors of all runs, in the order of `bilevel.batch.leaves`. They have a first dimension for the runs,
        unless the batch is `shared`.
    shared: whether all runs have the same batch.
    """

    batch: Any
    tensors: Sequence[Tensor]
    shared: bool

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """What two batches that differ in the values of their tensors only have in common."""
        queue = iter(self.tensors)
        leaf_forms = [(next(queue).shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves(self.batch)]
        return (self.shared, *leaf_forms)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """A batch of this form with other tensors."""
        queue = iter(tensors)
        return map_tensors(lambda _: next(queue), self.batch)

    def to(self, device: torch.device) -> Together:
        """The same batches on a device."""
        if all(tensor.device == device for tensor in self.tensors):
            return self
        return Together(self.batch, [tensor.to(device) for tensor in self.tensors], self.shared)


class ForSeeds(Problem[Any]):
    """A problem of which every run has the batches of its own seed."""

    def __init__(self, problem: Problem[Any], seeds: Sequence[int]) -> None:
        self.problem = problem
        self.seeds = seeds
        self.different = list(dict.fromkeys(seeds))
        repeated = len(self.different) != len(seeds)
        self.which = torch.tensor([self.different.index(seed) for seed in seeds]) if repeated else None
        self._shared: dict[str, Together] = {}
        # solvers ask for these; so does whoever looks at a run
        self.smooth, self.strongly_convex = problem.smooth, problem.strongly_convex  # type: ignore[misc]
        self.upper_constraint, self.lower_regularizer = problem.upper_constraint, problem.lower_regularizer
        self.upper_loss, self.lower_loss = problem.upper_loss, problem.lower_loss  # type: ignore[method-assign]

    def prepare(self) -> None:
        """Prepare the problem."""
        self.problem.prepare()

    def upper(self) -> Any:
        """The module of one run."""
        return self.problem.upper()

    def lower(self) -> Any:
        """The module of one run."""
        return self.problem.lower()

    def blocks(self, module: nn.Module) -> Blocks:
        """The blocks of the module of one run."""
        return self.problem.blocks(module)

    def upper_loss(self, x: Forward, y: Forward, batch: Any) -> Loss:
        """f of one run."""
        raise AssertionError("replaced by the problem's own")

    lower_loss = upper_loss

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Together]:
        """The batches of all runs."""
        return self._together("upper", self.problem.upper_batch, index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Together]:
        """The batches of all runs."""
        return self._together("lower", self.problem.lower_batch, index, shard)

    def examine(self, measure: Measure) -> None:
        """Let the problem examine the lower variable."""
        self.problem.examine(measure)

    def _together(
        self, level: str, batch: Callable[[int, Shard], Sequence[Any]], index: int, shard: Shard
    ) -> Sequence[Together]:
        mine = [batch(index, dataclasses.replace(shard, seed=seed)) for seed in self.different]
        return [self._stack(level, parts) for parts in zip(*mine, strict=True)]

    def _stack(self, level: str, batches: Sequence[Any]) -> Together:
        first = batches[0]
        if all(batch is first for batch in batches):
            if level not in self._shared or self._shared[level].batch is not first:  # the whole data is, at every step
                self._shared[level] = Together(first, list(tensors_of(first)), shared=True)
            return self._shared[level]
        tensors = []
        for same in zip(*map(leaves, batches), strict=False):
            if not _alike(same):
                raise InputError(
                    f"the batches of different seeds of {type(self.problem).__name__} differ in more than the values of "
                    "their tensors, so that these runs cannot go side by side; call `fit` for each"
                )
            if isinstance(same[0], Tensor):
                stacked = torch.stack(same)
                tensors.append(stacked if self.which is None else stacked[self.which])
        return Together(first, tensors, shared=not tensors)


def _alike(values: Sequence[Any]) -> bool:
    """Whether these are tensors of one shape, or other values that are equal."""
    first = values[0]
    if isinstance(first, Tensor):
        return all(isinstance(value, Tensor) and value.shape == first.shape for value in values)
    return all(not isinstance(value, Tensor) and value == first for value in values)


def _merge(solvers: Sequence[Solver[Any]], seeds: int) -> Solver[Any]:
    """One solver whose settings are those of each run, where they differ."""
    first = solvers[0]
    if any(type(solver) is not type(first) for solver in solvers):
        kinds = ", ".join(dict.fromkeys(type(solver).__name__ for solver in solvers))
        raise InputError(f"runs side by side have one class of solver, not {kinds}")
    merged = copy.copy(first)
    hints = typing.get_type_hints(type(first))
    for field in dataclasses.fields(first):  # type: ignore[arg-type]  # solvers are dataclasses
        values = [getattr(solver, field.name) for solver in solvers]
        if all(value == values[0] for value in values):
            continue
        every = [value for value in values for _ in range(seeds)]
        if _is_schedule(hints[field.name]) and all(value is not None for value in values):
            object.__setattr__(merged, field.name, EachRun(every))
        elif hints[field.name] is float and all(isinstance(value, int | float) for value in values):
            object.__setattr__(merged, field.name, PerRun.of(every))
        else:
            raise InputError(
                f"{type(first).__name__}: {field.name} differs between solvers ({values[0]!r}, {_other(values)!r}); runs "
                "side by side may differ in step sizes, penalties and other real numbers only; call fit_many for each value"
            )
    return merged


def _other(values: Sequence[Any]) -> Any:
    return next(value for value in values if value != values[0])


def _is_schedule(hint: Any) -> bool:
    """Whether a field takes any function of the step."""
    return any(typing.get_origin(part) is Callable for part in typing.get_args(hint))


def _refuse_to_measure(what: Callable[[Forward, Any], Mapping[str, Tensor]], batch: Any) -> Mapping[str, float]:
    raise InputError(
        "this problem examines its lower variable, which many runs side by side do not let it; call `fit` for each"
    )


def _flat(metrics: Metrics, runs: int) -> dict[str, Tensor]:
    """Every number of a step as a tensor of shape (runs,)."""
    found = {}
    for name, value in metrics.items():
        parts = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        for key, number in parts.items():
            found[key] = number.values if isinstance(number, PerRun) else torch.full((runs,), number, dtype=torch.float64)
    return found
