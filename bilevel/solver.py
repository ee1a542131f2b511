"""What a solver is: an object whose fields are its settings, with `init` and `step`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from bilevel.backend import Backend, Variable
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.plain import RECIPE_RULES
from bilevel.problem import Problem

Metrics = Mapping[str, float | Mapping[str, float]]
"""Numbers of one step, by themselves or by name. Those that others understand:

upper_loss, lower_loss, gap, penalty: f, g, the penalty gap g(y) - g(z), and its multiplier, where a solver has them;
    `upper_parts`, `lower_parts` and `gap_parts` are the same for each named part of a loss.
held: 1.0 in a step that leaves x where it is (a warm-up); left out otherwise.
average: by name, the x that is the solver's result, where that is a mean over its steps.
"""


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
        """Place the variables."""

    @abstractmethod
    def step(self, t: int, state: S, problem: Problem[Any], backend: Backend) -> Metrics:
        """Do step t (from 0) in place. May use nothing but its arguments: a resumed run must go on bit for bit."""

    def workload(self) -> Workload:
        """What one step asks of a backend. Raises `InputError` if the solver does not say, so that it cannot be planned."""
        raise InputError(f"the solver {type(self).__name__} does not say what a step takes, so it cannot be planned")
