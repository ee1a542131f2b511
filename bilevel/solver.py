"""What a solver is: an object whose fields are its settings, with `init` and `step`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from bilevel.active import Active
from bilevel.backend import Backend, Variable
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.plain import RECIPE_RULES
from bilevel.problem import Problem

Metrics = Mapping[str, float | Mapping[str, float]]
"""The numbers that a solver reports for one step. `gap` is the penalty gap g(y) - g(z), where a solver has one."""


@dataclass
class State:
    """What a solver carries from step to step.

    x: the upper variable.
    replicas: the lower variables by name; all of them train the same blocks.
    memory: plain numbers and lists that a checkpoint must keep. Everything else is a function of the step.
    """

    x: Variable
    replicas: dict[str, Variable]
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> list[Variable]:
        """x and the replicas."""
        return [self.x, *self.replicas.values()]

    def activate(self, active: Active, t: int, seed: int, backend: Backend) -> frozenset[str]:
        """Let the blocks that `active` chooses for step t train in every replica, and no others. Returns their names."""
        blocks = active.at(t, next(iter(self.replicas.values())).blocks, seed)
        for replica in self.replicas.values():
            backend.activate(replica, blocks)
        return blocks


@dataclass(frozen=True)
class Workload:
    """What one step of a solver asks of a backend: what a planner needs to know of it.

    replicas: the lower variables, and the optimizer of each. The gradients of all are taken to exist at the same time.
    lower_passes, upper_passes: forward and backward passes over a lower batch, over an upper batch.
    """

    replicas: Mapping[str, SGD | AdamW]
    lower_passes: int
    upper_passes: int


S = TypeVar("S", bound=State)


class Solver(ABC, Generic[S]):
    """A bilevel algorithm. Subclasses are frozen dataclasses: the fields are the settings, there is no other config."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    @abstractmethod
    def init(self, problem: Problem[Any], backend: Backend) -> S:
        """Place the variables on the backend."""

    @abstractmethod
    def step(self, t: int, state: S, problem: Problem[Any], backend: Backend) -> Metrics:
        """Do step t (from 0) in place, using nothing but the arguments: a resumed run must equal an uninterrupted one."""

    def workload(self) -> Workload:
        """What one step asks of a backend. Raises `InputError` if the solver does not say, so that it cannot be planned."""
        raise InputError(f"the solver {type(self).__name__} does not say what a step takes, so it cannot be planned")
