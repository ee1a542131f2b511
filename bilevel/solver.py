"""What a solver is: an object whose fields are its settings, with `init` and `step`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from bilevel.active import Active
from bilevel.backend import Backend, Variable
from bilevel.checked import Checked
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.plain import RECIPE_RULES
from bilevel.problem import Problem
from bilevel.schedule import at

Metrics = Mapping[str, float | Mapping[str, float]]
"""The numbers that a solver reports for one step, by themselves or by name. Those that others understand:

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

    def activate(self, active: Active, t: int, seed: int, backend: Backend) -> frozenset[str]:
        """Let the blocks that `active` chooses for step t train in every replica, and no others.

        Returns the names of those that train in any of them.
        """
        trained: frozenset[str] = frozenset()
        for number, replica in enumerate(self.replicas.values()):
            blocks = active.of_replica(number).at(t, replica.blocks, seed)
            backend.activate(replica, blocks)
            trained |= blocks
        return trained


@dataclass(frozen=True)
class Workload:
    """What one step of a solver asks of a backend, which is what a planner has to know about it.

    A step here is one after any warm-up. Counts are means over many steps, or upper bounds where they depend on the data.

    replicas: the lower variables by name, with the optimizer of each.
    lower_passes, upper_passes: forward and backward passes of one lower variable over a lower batch, over an upper batch.
    lower_forwards, upper_forwards: passes in which no lower variable gets a gradient: x alone does, or nothing.
    products: calls of `Backend.backward_along`; planned as over lower batches.
    vectors: gradients that wait for a step and `Vector`s of a lower variable, as many as exist beside a pass at the same
        time. None: a gradient of each replica.
    marked: the steps after which the variable that `Backend.mark` was called for is rewound; 0: none is marked. Whatever is
        active within that time is kept as it was, in the precision of the parameters.
    savings: what would reduce the memory of a step at the expense of the results, as phrases: "a lower order (solver.p)".
    """

    replicas: Mapping[str, SGD | AdamW]
    lower_passes: float = 0
    upper_passes: float = 0
    lower_forwards: float = 0
    upper_forwards: float = 0
    products: float = 0
    vectors: int | None = None
    marked: int = 0
    savings: tuple[str, ...] = ()


S = TypeVar("S", bound=State)


class Solver(Checked, ABC, Generic[S]):
    """A bilevel algorithm. Subclasses are frozen dataclasses: the fields are the settings, there is no other config."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    takes: ClassVar[type[Problem[Any]]] = Problem  # type: ignore[type-abstract]
    """The problems that it solves: a subclass of `Problem`, where a solver needs more than that says."""

    @abstractmethod
    def init(self, problem: Problem[Any], backend: Backend) -> S:
        """Place the variables on the backend."""

    @abstractmethod
    def step(self, t: int, state: S, problem: Problem[Any], backend: Backend) -> Metrics:
        """Do step t (from 0) in place, using nothing but the arguments: a resumed run must equal an uninterrupted one."""

    def step_size(self, variable: str, t: int) -> tuple[str, float] | None:
        """The setting that decides how far a variable moves in step t, and its value: what to name if it goes too far.

        By default the first of the fields `lr_<variable>`, `lr_z` and `lr` that is there and is not None. None: there is no
        such field.
        """
        for name in (f"lr_{variable}", "lr_z", "lr"):
            if (value := getattr(self, name, None)) is not None:
                return name, at(value, t)
        return None

    def workload(self) -> Workload:
        """What one step asks of a backend; `bilevel.testing.workload.check_workload` compares it with what a step does.

        Raises `InputError` if the solver does not say, so that it cannot be planned.
        """
        raise InputError(
            f"the solver {type(self).__name__} does not say what a step takes, so it cannot be planned; "
            "give it a method `workload`"
        )


def begin(solver: Solver[S], problem: Problem[Any], backend: Backend) -> S:
    """Place the variables, and tell the backend of what the problem says beside its losses: its constraint and regularizer.

    Whatever runs a solver begins with this, so that no solver has to know of either.
    """
    state = solver.init(problem, backend)
    if problem.upper_constraint is not None:
        backend.constrain(state.x, problem.upper_constraint)
    if problem.lower_regularizer is not None:
        backend.regularize(list(state.replicas.values()), problem.lower_regularizer)
    return state
