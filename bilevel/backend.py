"""Backends hold the variables and compute their gradients. Solvers are written against this interface alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from bilevel.blocks import Blocks
from bilevel.boundary import Evaluated
from bilevel.checked import Checked
from bilevel.constraint import Constraint
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.plain import RECIPE_RULES
from bilevel.problem import Forward, Loss, Shard
from bilevel.regularizer import Regularizer
from bilevel.sealed import Seal

B = TypeVar("B")
T = TypeVar("T")


class Variable(Evaluated, ABC):
    """A module placed on a backend, with its optimizer. Losses call it; solvers pass it to the backend."""

    name: str
    blocks: Blocks
    active: frozenset[str]

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""


@dataclass(frozen=True)
class Evaluation:
    """A loss on one global batch: the sum over its micro-batches, in every process.

    value: the loss.
    parts: the named parts that the loss reported, summed likewise.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __sub__(self, other: Evaluation) -> Evaluation:
        """The difference of two losses, part by part."""
        return Evaluation(self.value - other.value, {k: self.parts[k] - other.parts[k] for k in self.parts})

    @staticmethod
    def mean(evaluations: Sequence[Evaluation]) -> Evaluation:
        """The mean of several, part by part."""
        n = len(evaluations)
        parts = {k: sum(e.parts[k] for e in evaluations) / n for k in evaluations[0].parts}
        return Evaluation(sum(e.value for e in evaluations) / n, parts)


@dataclass(frozen=True, eq=False)
class Vector:
    """A gradient, or the values of a variable's active parameters, with vector arithmetic: v + w, v - w, 2 * v.

    parts: parameter name -> the shard that this process holds, in the precision of the masters. The arithmetic is local;
        only `Backend.dot` communicates. Vectors of a variable and of its replicas can be combined.
    whole: whether every process holds all of it.
    """

    parts: Mapping[str, Tensor]
    whole: bool

    def __add__(self, other: Vector) -> Vector:
        return Vector({name: part + other.parts[name] for name, part in self.parts.items()}, self.whole)

    def __sub__(self, other: Vector) -> Vector:
        return Vector({name: part - other.parts[name] for name, part in self.parts.items()}, self.whole)

    def __rmul__(self, factor: float) -> Vector:
        return Vector({name: factor * part for name, part in self.parts.items()}, self.whole)


@dataclass(frozen=True)
class SecondDerivatives:
    """The second derivatives of a loss in one variable, at one point; see `Backend.second_derivatives`.

    product: takes a vector and weights, and does what `Backend.backward_along` does with `wrt=weights`. A call of the object
        is a call of this.
    gradient: returns the loss and its gradient in the variable at the same point, which solvers that need both would
        otherwise pay another pass for. What was accumulated for the variable before must have been taken.
    """

    product: Callable[[Vector, Mapping[Variable, float]], None]
    gradient: Callable[[], tuple[Evaluation, Vector]]

    def __call__(self, vector: Vector, weights: Mapping[Variable, float]) -> None:
        """Add weight * product of the second derivatives with the vector to every variable in `weights`."""
        self.product(vector, weights)


@dataclass(frozen=True)
class Placement:
    """How a backend holds the lower variables, which is what a planner has to know about it.

    processes: the number of processes, each of which has a device of its own.
    shard_group: over how many of the processes, with consecutive ranks, what is split is split. Each such group holds all of
        it, and groups exchange gradients alone (hybrid sharding, HSDP). None: over all of them.
    dtype: precision of the parameters; None keeps what the problem builds. Active parameters in bfloat16 have float32
        masters, gradients and moments; in another precision they are their own masters.
    micro_batch_size: rows of one forward and backward; None takes a process's whole share of the batch, "auto" as many of
        them as fit.
    activation_checkpointing: the repeated blocks are recomputed in the backward pass.
    split_parameters, split_gradients, split_optimizer: every process holds its share alone. "optimizer" is masters and
        moments. Split parameters are gathered block by block when they are used.
    offload_parameters, offload_optimizer: held in the CPU's memory; with the optimizer, the gradients that are summed over
        processes already.
    live_parameters: gathered parameters are freed only when there are more than this many.
    fetched_parameters: this many, or a whole block, are gathered into one buffer and copied out of it; 0: no such buffer.
    message: the gradients of a block are summed over processes together, or so many of them at a time.
    whole_units: the units that are gathered and reduced are the blocks, what stands before them, and what stands after them,
        which stays for the pass; reduced gradients are taken when the pass is over.
    """

    name: str
    processes: int = 1
    shard_group: int | None = None
    dtype: str | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    activation_checkpointing: bool = False
    split_parameters: bool = False
    split_gradients: bool = False
    split_optimizer: bool = False
    offload_parameters: bool = False
    offload_optimizer: bool = False
    live_parameters: int = 0
    fetched_parameters: int = 0
    message: int | None = None
    whole_units: bool = False

    @property
    def shards(self) -> int:
        """The number of processes that what is split is split over."""
        return self.shard_group or self.processes


class Backend(Checked, ABC):
    """One way to hold and train variables. Its dataclass fields are what a recipe may set.

    A backend is started once, by `fit`; what it holds afterwards is the variables and a few counters.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    processed: int = 0
    """Batch units (rows, tokens) that went through `backward` so far, in all processes; see `Problem.upper_batch`."""

    @abstractmethod
    def start(self, seed: int) -> None:
        """Prepare devices and processes. The seed decides random initialization and rounding.

        Raises `InputError` for a setting that this machine cannot serve.
        """

    @property
    @abstractmethod
    def shard(self) -> Shard:
        """This process's part of a global batch."""

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes (anything that pickles), by rank; all processes call it. By default there is one."""
        return [value]

    def placement(self, world_size: int) -> Placement:
        """How variables would be held by this many processes. By default nothing is split.

        Raises `InputError` for a number of processes that the backend cannot serve. Starts nothing.
        """
        return Placement(type(self).__name__, world_size)

    def savings(self, rows: int) -> Mapping[str, Sequence[Any]]:
        """Settings that would save memory, cost time alone and leave every result as it is: field -> values to try.

        A planner tries them, alone and together. By default there are none.

        rows: the most that one process has of a global batch.
        """
        return {}

    @property
    def room(self) -> int | None:
        """Bytes of memory of this process's device, if how many rows it takes at a time is to follow from that.

        `fit` then says how many, by `take_at_a_time`. None: there is nothing to choose, which is so by default.
        """
        return None

    def take_at_a_time(self, rows: int) -> None:
        """Make micro-batches of that many rows. Called after `start`, before there are variables, where there is `room`.

        Raises `InputError` if the backend cannot, which then has no `room`.
        """
        raise InputError(f"the backend {type(self).__name__} does not let `fit` choose how many rows it takes at a time")

    def speedups(self, processes: int, node: int) -> Mapping[str, Sequence[Any]]:
        """Settings that would save time, cost memory alone and leave every result as it is: field -> values to try.

        A planner tries them where there is memory for them. By default there are none.

        processes, node: the number of processes, and how many of them share a machine.
        """
        return {}

    def side_by_side(self, seeds: Sequence[int]) -> SideBySide:
        """A backend like this one that holds a run for each seed, all at once; see `bilevel.many`.

        Raises `InputError` if it cannot be done.
        """
        raise InputError(f"the backend {type(self).__name__} holds one run at a time; use the torch backend, or `fit`")

    @abstractmethod
    def place(
        self,
        name: str,
        build: Callable[[], nn.Module],
        optimizer: SGD | AdamW,
        *,
        sharded: bool,
        blocks: Callable[[nn.Module], Blocks] | None = None,
    ) -> Variable:
        """Build a module and put it on its device, or its shards on their devices.

        build: makes the module; called with torch's random state seeded, and for a sharded variable within
            `deferred_initialization`, if the backend takes modules whose parameters are on the meta device.
        sharded: whether this is a large variable, which the backend may cast, shard and train in part: none of its blocks
            is active before `activate` is called. Otherwise it keeps its precision, is whole in every process and all
            of it trains.
        blocks: groups the module's parameters; None makes it a single block.
        """

    @abstractmethod
    def replicate(self, source: Variable, name: str, optimizer: SGD | AdamW | None = None) -> Variable:
        """A second variable with the module, the weights and, if none is given, the optimizer settings of `source`."""

    def constrain(self, variable: Variable, constraint: Constraint | Mapping[str, Constraint]) -> None:
        """From now on, `step` projects the variable, which is whole in every process, onto the constraint.

        Called once, before the first step, and for x itself, never for its replicas: what they hold may be gradients.

        Raises `InputError` if the variable is outside of the constraint, or if the backend cannot.
        """
        raise InputError(
            f"the backend {type(self).__name__} does not project x onto a constraint; leave upper_constraint out"
        )

    def regularize(self, variables: Sequence[Variable], regularizer: Regularizer) -> None:
        """From now on, add the term of the regularizer to the lower loss of these variables, which are replicas.

        It belongs to the passes of `backward`, `evaluate` and the second derivatives in which the problem's `lower_loss` is
        computed (see `Variable.last_loss`), once for each pass. What the first variable holds now is what the term is
        anchored at, if it is. Called once, before the first step.

        Raises `InputError` if the backend cannot.
        """
        raise InputError(f"the backend {type(self).__name__} adds no lower_regularizer; write the term into lower_loss")

    @abstractmethod
    def assign(self, target: Variable, source: Variable) -> None:
        """Give `target` the weights and the optimizer state of `source`, a replica with the same active blocks."""

    def mark(self, variable: Variable) -> None:
        """Remember the weights that the variable has now, as those that `rewind` brings back.

        Only parameters that train afterwards take memory: what they were is kept beside them until the variable is marked
        anew, or rewound while they are not active.

        Raises `InputError` if the backend cannot.
        """
        raise InputError(f"the backend {type(self).__name__} cannot bring earlier weights back")

    def rewind(self, variable: Variable) -> None:
        """Give the variable the weights that it was marked with, bit for bit, and fresh optimizer state.

        What is active stays active. Raises `InputError` if the backend cannot.
        """
        raise InputError(f"the backend {type(self).__name__} cannot bring earlier weights back")

    @abstractmethod
    def activate(self, variable: Variable, blocks: frozenset[str]) -> None:
        """Let exactly these blocks train from now on.

        A block that leaves is frozen bit for bit and its optimizer state is freed; one that enters starts with fresh
        optimizer state; one that stays keeps its own.
        """

    @abstractmethod
    def backward(self, loss: Callable[[B], Loss], batch: Sequence[B], *, wrt: Mapping[Variable, float]) -> Evaluation:
        """Evaluate the loss over the micro-batches and add weight * gradient to every variable in `wrt`.

        wrt: variable -> weight. Variables that are not named get no gradient, nor does one that the loss ignores. At most
            one of them is sharded: each forward pass is followed at once by its own backward pass, which sharded engines
            need.

        Raises `NonFiniteError` if the loss is not finite, before any variable has stepped.
        """

    @abstractmethod
    def evaluate(self, loss: Callable[[B], Loss], batch: Sequence[B]) -> Evaluation:
        """Evaluate the loss without gradients."""

    def measure(
        self, variable: Variable, what: Callable[[Forward, B], Mapping[str, Tensor]], batch: B
    ) -> Mapping[str, float]:
        """The numbers that `what` finds about a variable, as means over processes, each of which has the whole batch."""

        def loss(batch: B) -> Loss:
            numbers = what(variable, batch)
            return torch.stack(list(numbers.values())).sum(), numbers

        parts = self.evaluate(loss, [batch]).parts
        return {name: value / self.shard.world_size for name, value in parts.items()}

    @abstractmethod
    def step(self, variable: Variable, *, lr: float) -> float:
        """Clip, update the active parameters, clear the gradient. Returns the gradient's norm before clipping.

        Under a constraint, the gradient mapping takes the place of the gradient, and the updated parameters are projected;
        see `bilevel.constraint`.

        Raises `NonFiniteError`, naming variable and parameter, and leaves the variable as it was, if a gradient is not
        finite.
        """

    @abstractmethod
    def take_gradient(self, variable: Variable) -> Vector:
        """Return the accumulated gradient, summed over processes, and clear it. It is zero where nothing was added."""

    @abstractmethod
    def add_gradient(self, variable: Variable, vector: Vector, weight: float = 1.0) -> None:
        """Add weight * vector to the accumulated gradient, as if a call of `backward` had given it.

        vector: a vector of this variable or of a replica with the same active blocks. In a sharded variable every process
            adds its own shard; in a whole one all add the same, which counts once, not once for each process.
        """

    @abstractmethod
    def read(self, variable: Variable) -> Vector:
        """A copy of the values of the active parameters (of their masters, where there are any)."""

    def numel(self, variable: Variable) -> int:
        """How many numbers `read` would copy. By default they are copied and counted."""
        return sum(part.numel() for part in self.read(variable).parts.values())

    @abstractmethod
    def write(self, variable: Variable, vector: Vector) -> None:
        """Set the values of the active parameters. Optimizer state and accumulated gradient stay as they are."""

    @abstractmethod
    def dot(self, v: Vector, w: Vector) -> float:
        """The inner product of two vectors of the same kind, over all processes: the same number in each of them."""

    @property
    def second_order(self) -> bool:
        """Whether `backward_along` is implemented. Solvers that need it ask in `init`, before anything has moved."""
        return False

    def backward_along(
        self,
        loss: Callable[[B], Loss],
        batch: Sequence[B],
        variable: Variable,
        vector: Vector,
        *,
        wrt: Mapping[Variable, float],
    ) -> float:
        """Add weight * gradient of <gradient of the loss in `variable`, vector> to every variable in `wrt`.

        That is a product of second derivatives with a vector: Hessian times vector for `variable` itself, the mixed
        derivative for another. Returns the inner product that was differentiated, summed over processes. `vector` is a
        constant.
        """
        raise InputError(f"the backend {type(self).__name__} has no second derivatives")

    @contextmanager
    def second_derivatives(
        self, loss: Callable[[B], Loss], batch: Sequence[B], variable: Variable, *, wrt: Collection[Variable]
    ) -> Iterator[SecondDerivatives]:
        """Within this context, take many products with the same second derivatives: those at the weights of now.

        The variables stay where they are meanwhile, and nothing but `take_gradient` and vector arithmetic is asked of the
        backend.

        wrt: the variables that any of the weights will name.

        By default each product is a call of `backward_along`, and the gradient one of `backward`; a backend may keep what
        they have in common.
        """

        def product(vector: Vector, weights: Mapping[Variable, float]) -> None:
            self.backward_along(loss, batch, variable, vector, wrt=weights)

        def gradient() -> tuple[Evaluation, Vector]:
            evaluation = self.backward(loss, batch, wrt={variable: 1})
            return evaluation, self.take_gradient(variable)

        yield SecondDerivatives(product, gradient)

    @abstractmethod
    def weights(self, variable: Variable) -> dict[str, Tensor]:
        """A copy of the variable's full state, by name, on the CPU (parameters and persistent buffers).

        All processes call it. The first one gets the state; so do the others if the variable is not sharded, else they get
        what they can have without holding all of it.
        """

    def whole_module(self, variable: Variable) -> nn.Module:
        """The variable's module with all its parameters, for what losses of batches cannot say, such as gradients of rows.

        It is to be called, not to be changed. What is computed with it is this process's own; gradients that reach its
        parameters are undefined, so take them in copies (`torch.func.functional_call`).

        Raises `InputError` if the backend splits the parameters over processes; `placement` says so beforehand.
        """
        raise InputError(f"the backend {type(self).__name__} gives no module that is whole in every process")

    def optimizer_state(self, variable: Variable) -> dict[str, dict[str, Tensor]]:
        """A copy of the optimizer's state, whole and in every process: active parameter -> torch's key -> tensor.

        Of AdamW: `exp_avg` and `exp_avg_sq`, with the parameter's shape, and `step`, a scalar: the steps taken since the
        parameter's block became active. A parameter without a step has no entries. All processes call it.

        Raises `InputError` if the backend does not tell.
        """
        raise InputError(f"the backend {type(self).__name__} does not tell its optimizer's state")

    @abstractmethod
    def optimizer_bytes(self, variable: Variable) -> int:
        """Bytes that this process holds for the variable beside its weights: masters, moments, gradients."""

    @abstractmethod
    def checkpoint_bytes(self, variables: Sequence[Variable]) -> int:
        """About how many bytes `save` will write."""

    @abstractmethod
    def save(self, directory: Path, variables: Sequence[Variable], *, copy: bool) -> Callable[[], Mapping[str, Seal]]:
        """Prepare to write weights, optimizer state and counters of the variables into a directory that all processes reach.

        All processes call it, with the same directory, which is empty. Each gets a function that writes this process's files
        and returns their seals, by name; see `bilevel.sealed`. One of all files is `variables.json`; see
        `bilevel.checkpoint`. The function is called once, perhaps in another thread, while the next steps are taken: it must
        not communicate.

        copy: whether the variables may change before the function has returned. What is written is their state now, so it is
            copied into the CPU's memory, where it stays until the next call. Otherwise nothing needs to be copied.
        """

    @abstractmethod
    def load(self, directory: Path, variables: Sequence[Variable]) -> None:
        """Restore what `save` wrote, bit for bit, into variables of the same problem.

        All processes call it. What is saved does not depend on the number of processes.

        Raises `InputError` if the files are incomplete or belong to other variables.
        """

    def load_weights(self, directory: Path, variables: Sequence[Variable]) -> None:
        """Give the variables the weights that `save` wrote for those of the same names, and leave all else as it is.

        All processes call it, before the variables have taken a step. Raises `InputError`, and changes nothing, if the files
        belong to other variables or another precision, and by default, as a backend need not be able to.
        """
        raise InputError(f"the backend {type(self).__name__} cannot begin from another run")

    @abstractmethod
    def close(self) -> None:
        """Release what `start` acquired."""


class SideBySide(Backend):
    """A backend that holds several runs.

    Its numbers (losses, norms, inner products) are `PerRun`s, and it takes them as weights and step sizes. Its tensors have
    a first dimension for the runs. It takes the batches of a `bilevel.many.ForSeeds`. A number that is not finite raises no
    error, since that would end the other runs, too.

    diverged: which runs have met a number that is not finite, in a loss or in the norm of a gradient. Shape: (runs,).
    """

    diverged: Tensor
