"""Count what the steps of a solver ask of a backend, and compare it with what `Solver.workload` says."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bilevel.active import Active
from bilevel.backend import Backend, SecondDerivatives, Variable
from bilevel.optimizer import SGD, AdamW
from bilevel.problem import Problem
from bilevel.solver import Solver, Workload
from bilevel.testing.contract import ContractError
from bilevel.testing.session import Session, default_backend

COUNTS = ("lower_passes", "upper_passes", "lower_forwards", "upper_forwards", "products")


def check_workload(
    solver: Solver[Any], problem: Problem[Any], *, skip: int = 1, steps: int = 4, active: Active | None = None
) -> None:
    """Check that the solver's `workload` states the replicas, optimizers and passes that its steps have.

    skip: the number of first steps that are left out, such as a warm-up.
    steps: the number of steps over which the mean is taken; a multiple of any period that the solver has.

    Raises `ContractError`, naming what differs. `Workload.vectors` is not checked.
    """
    said, done = solver.workload(), count_workload(solver, problem, skip=skip, steps=steps, active=active)
    wrong = [
        f"{name} is {getattr(said, name)!r}, and a step has {getattr(done, name)!r}"
        for name in ("replicas", *COUNTS)
        if getattr(said, name) != getattr(done, name)
    ]
    if wrong:
        raise ContractError(f"the workload of {type(solver).__name__} does not match its steps: {'; '.join(wrong)}")


def count_workload(
    solver: Solver[Any],
    problem: Problem[Any],
    *,
    skip: int = 1,
    steps: int = 4,
    backend: Backend | None = None,
    active: Active | None = None,
) -> Workload:
    """What a step asks of the backend, as the mean over `steps` steps after the first `skip`."""
    counter = _Counter(problem, backend or default_backend())
    with Session(counter.problem, solver, counter.backend, active=active) as session:
        session.step(skip)
        before = dict(counter.counts)
        session.step(steps)
    means = {name: (counter.counts[name] - before[name]) / steps for name in COUNTS}
    return dataclasses.replace(Workload(counter.optimizers), **means)  # type: ignore[arg-type]


class _Counter:
    """A problem and a backend that record what is asked of them.

    One lower variable that is called within a `backward` makes it one pass, however many micro-batches there are.
    """

    def __init__(self, problem: Problem[Any], backend: Backend) -> None:
        self.problem = copy.copy(problem)
        self.backend = backend
        self.counts = dict.fromkeys(COUNTS, 0)
        self.optimizers: dict[str, SGD | AdamW] = {}
        self._upper_batches: list[Sequence[Any]] = []
        self._called: set[int] = set()
        _shadow(self.problem, {"lower": self._lower, "upper_batch": self._upper_batch})
        noted: dict[str, Callable[..., Any]] = {"place": self._place, "replicate": self._replicate}
        for name in ("backward", "evaluate", "backward_along"):
            noted[name] = self._noting(getattr(backend, name), products=name == "backward_along")
        noted["second_derivatives"] = self._noting_products(backend.second_derivatives)
        self._place_in, self._replicate_in = backend.place, backend.replicate
        self._lower_of, self._upper_batch_of = problem.lower, problem.upper_batch
        _shadow(backend, noted)

    def _lower(self) -> nn.Module:
        module = self._lower_of()
        module.register_forward_hook(lambda called, *_: self._called.add(id(called)))  # a copy of the module has it too
        return module

    def _upper_batch(self, *args: Any) -> Sequence[Any]:
        batch = self._upper_batch_of(*args)
        self._upper_batches.append(batch)
        return batch

    def _place(self, name: str, build: Any, optimizer: SGD | AdamW, *, sharded: bool, **rest: Any) -> Variable:
        if sharded:
            self.optimizers[name] = optimizer
        return self._place_in(name, build, optimizer, sharded=sharded, **rest)

    def _replicate(self, source: Variable, name: str, optimizer: SGD | AdamW | None = None) -> Variable:
        if source.name in self.optimizers:
            self.optimizers[name] = optimizer or self.optimizers[source.name]
        return self._replicate_in(source, name, optimizer)

    def _noting(self, method: Callable[..., Any], *, products: bool) -> Callable[..., Any]:
        def noted(loss: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._called.clear()
            result = method(loss, batch, *args, **kwargs)
            level = "upper" if any(batch is drawn for drawn in self._upper_batches) else "lower"
            if products:
                key = "products"
            elif any(variable.name in self.optimizers for variable in kwargs.get("wrt", ())):
                key = f"{level}_passes"
            else:
                key = f"{level}_forwards"
            self.counts[key] += len(self._called)
            return result

        return noted

    def _noting_products(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def noted(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with method(*args, **kwargs) as derivatives:

                def once(key: str, call: Callable[..., Any]) -> Callable[..., Any]:
                    def counted(*given: Any) -> Any:
                        before = self.counts[key]
                        result = call(*given)
                        self.counts[key] = before + 1  # also where the backend calls another method, which is noted itself
                        return result

                    return counted

                yield SecondDerivatives(once("products", derivatives.product), once("lower_passes", derivatives.gradient))

        return noted


def _shadow(instance: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Give an instance, which may be frozen, methods of its own."""
    for name, method in methods.items():
        object.__setattr__(instance, name, method)
