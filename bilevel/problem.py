"""A bilevel problem as its author writes it: two losses, two variables and their data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from bilevel.account import RUN, Finding, Labels, NextStep, Table, Verdict
from bilevel.blocks import Blocks, find_blocks
from bilevel.boundary import guard
from bilevel.checked import Checked
from bilevel.constraint import Constraint
from bilevel.cost import Cost
from bilevel.errors import InputError, ProblemError
from bilevel.plain import RECIPE_RULES
from bilevel.record import Record
from bilevel.regularizer import Regularizer
from bilevel.traced_cost import Level, traced_cost

if TYPE_CHECKING:
    from rich.console import RenderableType

B = TypeVar("B")
T = TypeVar("T")
M = TypeVar("M")

_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_initialization() -> Iterator[None]:
    """Within this context `Problem.lower` may defer the initialization of its module; see there. Backends enter it."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def initialization_may_be_deferred() -> bool:
    """Whether the backend that calls `Problem.lower` takes a module whose parameters are on the meta device."""
    return _deferred.get()


class Forward(Protocol):
    """A variable as a loss sees it: a callable. Calling it runs the module's forward pass and returns new tensors.

    Losses cannot use the parameters behind it, as on a sharded backend no process holds them all: any attribute, item or
    arithmetic is a `ProblemError`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""


Loss = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""A scalar, or a scalar with its named parts (for reports). Both are sums over micro-batches: the loss of a global
batch is the sum of the losses of its micro-batches, so each micro-batch must carry its share of the weight."""


class Measure(Protocol):
    """What `Problem.examine` is given, to see the lower variable where it is."""

    def __call__(self, what: Callable[[Forward, M], Mapping[str, Tensor]], batch: M) -> Mapping[str, float]:
        """The numbers that `what` returns for the lower variable and the batch; see `Problem.examine`."""


@dataclass(frozen=True)
class Shard:
    """The part of a global batch that one process takes, and the micro-batches into which it is divided.

    seed: seed of the run; a batch is a pure function of (index, seed), so that a resumed run sees the same data.
    rank, world_size: the number of this process, and of all processes.
    micro_batch_size: samples of one forward pass; None takes the process's whole share at once.
    fold: take samples of one fold of the data alone, (its number, of how many). Folds are disjoint, so that what is
        measured on different ones is independent, also as far as the data are a sample of something larger. None: of all.
    """

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None
    fold: tuple[int, int] | None = None

    def split(self, samples: Sequence[T]) -> list[Sequence[T]]:
        """This process's samples (every world_size-th, from rank on), divided into micro-batches.

        Raises `InputError` if the processes would not get equally many samples: they wait for each other in every pass.
        """
        if len(samples) % self.world_size:
            raise InputError(
                f"a batch of {len(samples)} cannot be dealt evenly to {self.world_size} processes; "
                f"choose a batch size that is a multiple of {self.world_size}"
            )
        mine = samples[self.rank :: self.world_size]
        size = self.micro_batch_size or max(1, len(mine))
        return [mine[start : start + size] for start in range(0, len(mine), size)]


class Problem(Checked, ABC, Generic[B]):
    """min_x f(x, y*(x))  subject to  y*(x) in argmin_y g(x, y).

    `x` is the upper variable, `y` the lower variable; `f` is `upper_loss`, `g` is `lower_loss`.
    A subclass is usually a dataclass: its fields are what a recipe may set.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    smooth: ClassVar[bool | None] = None
    """Whether the losses have the second derivatives that some solvers need. None: unknown; False: those solvers refuse."""
    strongly_convex: ClassVar[bool | None] = None
    """Whether g is strongly convex in y. None: unknown; False: solvers that need it refuse the problem."""

    upper_data: B
    """All data of the upper loss, where it takes them at once: the batch, unless there is a method `upper_batch`."""
    lower_data: B
    """The same for the lower loss."""

    upper_constraint: Constraint | Mapping[str, Constraint] | None = None
    """Where x may be: `Box`, `NonNegative`, `Simplex`, or a set of yours. After each step of x, whatever its optimizer, x is
    projected onto it, in the Euclidean norm. It is for every parameter of x, or for those of its names. x starts inside."""
    lower_regularizer: Regularizer | None = None
    """A term that is added to g, once for each batch: `WeightDecay` or `Proximity`. `lower_loss` leaves it out."""

    labels: ClassVar[Labels] = Labels()
    """What the numbers of its runs are called, on the terminal and in reports."""
    resumed_by: ClassVar[tuple[str, ...]] = ("bilevel", "run", "--resume", RUN)
    """The command line that resumes one of its runs; see `NextStep.words`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        guard(cls)

    def prepare(self) -> None:
        """Read and check everything that can be wrong before a large module is built.

        Called once, first. Raise `InputError` for what the user has to correct. Does nothing by default.
        """

    def fingerprint(self) -> str:
        """A hash of what `prepare` has read (data, model). Processes must agree on it, and so must a resumed run.

        "" by default: there is nothing to compare.
        """
        return ""

    # Not typed `nn.Module | Tensor`: what an author may return and what a caller gets differ.
    @abstractmethod
    def upper(self) -> Any:
        """A module that holds x. It is small, is kept in full precision, and every process has all of it.

        If x is a single tensor, return that: its value at the start, in floating-point numbers. It becomes a module whose
        call, x(), returns the tensor, and which every caller of this method gets. If x has several parts, return a mapping
        from their names to modules or tensors (or an `nn.ModuleDict`): a call then begins with a name, x("scale").
        """

    @abstractmethod
    def lower(self) -> Any:
        """A module that holds y at its initial value, a tensor, or several of them by name, as for `upper`. Random
        initialization is seeded by the backend.

        Where `initialization_may_be_deferred()` is true, a large module may leave its parameters on the meta device, if it
        has a method `stored_weight(name) -> Tensor`: the backend then materializes them on their devices, one after the
        other, so that no process holds them all.
        """

    @abstractmethod
    def upper_loss(self, x: Forward, y: Forward, batch: B) -> Loss:
        """f(x, y) on one micro-batch: its share of the global batch's loss."""

    @abstractmethod
    def lower_loss(self, x: Forward, y: Forward, batch: B) -> Loss:
        """g(x, y) on one micro-batch: its share of the global batch's loss."""

    def upper_batch(self, index: int, shard: Shard) -> Sequence[B]:
        """The micro-batches that this process takes of upper batch number `index`: a pure function of both arguments.

        A batch is a tensor, or a tuple, mapping or dataclass of tensors. If it has an integer attribute `size`
        (rows, tokens), throughput is reported in that unit.

        By default the one batch is `upper_data`, as a single sample, which cannot be cut into micro-batches. Raises
        `InputError` if it has to be divided over several processes or folds, and `ProblemError` if there is none.
        """
        return self._whole("upper", shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[B]:
        """The micro-batches that this process takes of lower batch number `index`; otherwise as `upper_batch`."""
        return self._whole("lower", shard)

    def _whole(self, level: str, shard: Shard) -> Sequence[B]:
        name = type(self).__name__
        if not hasattr(self, f"{level}_data"):
            raise ProblemError(
                f"{name} has neither a method {level}_batch nor an attribute {level}_data; give it the one that draws "
                "batches, or the other, with all the data that a loss needs (None, if it needs none)"
            )
        if shard.world_size > 1 or shard.fold is not None:
            into = f"{shard.world_size} processes" if shard.world_size > 1 else "folds"
            raise InputError(
                f"{name} takes all of {level}_data as one sample, which cannot be divided over {into}; give it a method "
                f"{level}_batch, and let its loss weigh each part"
            )
        return [getattr(self, f"{level}_data")]

    def examine(self, measure: Measure) -> None:
        """Check what can only be seen of the lower variable where it is. Every process calls it once, before the first step.

        Raise `InputError` for a module that the losses cannot work with. Does nothing by default.

        measure: takes a function of (y, batch), which calls y and returns named numbers, and a batch; returns the numbers,
            which are the same in every process. They must be finite; as tensors they have no dimensions.
        """

    def blocks(self, module: nn.Module) -> Blocks:
        """How the lower module's parameters group into blocks, of which a subset may train at a time."""
        return find_blocks(module)

    def cost(self, labelled_share: float = 1.0) -> Cost:
        """What a planner has to know: the lower module without values, and the losses of a micro-batch.

        By default the problem is prepared, both variables are built, and the losses are traced on the first batches. A
        problem with a large lower module overrides this, so that it can be planned without its weights and its data.

        labelled_share: part of a batch's units that carry a loss, above 0 and at most 1. Only for problems with a cost of
            their own: the default takes the first batches as they are.

        Raises `InputError` for another share by default. Tracing happens later: it raises `InputError`, naming the loss, if
        the computation of a loss depends on the values of its variables.
        """
        if labelled_share != 1:
            raise InputError(
                f"{type(self).__name__} is planned from its first batches as they are, so that no other share of labels can "
                "be assumed; leave out --labelled-share"
            )
        self.prepare()

        def level(loss: Callable[..., Any], batch: Callable[[int, Shard], Sequence[Any]]) -> Level:
            name = f"{type(self).__name__}.{loss.__name__}"
            return Level(name, loss, lambda size: batch(0, Shard(micro_batch_size=size)))

        def lower() -> nn.Module:
            with deferred_initialization():
                module: nn.Module = self.lower()
                return module

        return traced_cost(
            self.upper,
            lower,
            self.blocks,
            level(self.upper_loss, self.upper_batch),
            level(self.lower_loss, self.lower_batch),
        )

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The upper variable in a few named numbers, recorded at every step and drawn as curves. None by default."""
        return {}

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """Files (name: text) that the run directory should hold after the last step of `history`. None by default.

        facts: what the run knows about itself, as plain data: `seed`, `versions`, `findings` (those of `findings`, each as
            {name, flagged, sentence, passed}), `verdict` ({decision, reason, steps}, or None) and `intervals`.
        """
        return {}

    def snapshot(self, x: Mapping[str, Tensor]) -> Mapping[str, str | bytes]:
        """Files (name: content) that say what was learned, written with every checkpoint. None by default.

        They are meant for what does not fit into the records of steps.

        x: the upper variable's parameters by name, as `Result.x` has them.
        """
        return {}

    def findings(self, history: Sequence[Record]) -> Sequence[Finding]:
        """What a person should know before using the result: reasons not to trust it, and what was tested and holds.

        Kept in account.json, and shown by `bilevel report`. None by default.
        """
        return ()

    def verdict(self, history: Sequence[Record]) -> Verdict | None:
        """What to do with the result: use it, run longer, or do not use it. Shown at the end. None by default.

        A run with `steps: auto` ends when this says "use".
        """
        return None

    def next_steps(self, history: Sequence[Record]) -> Sequence[NextStep]:
        """Commands that make sense now, the best first. How to run longer, and the report, need not be among them.

        Shown at the end of a run and on top of its report. None by default.
        """
        return ()

    def intervals(self, history: Sequence[Record]) -> Mapping[str, tuple[float, float]]:
        """The 95% intervals of the entries of `summary`, where there is evidence for any; none by default."""
        return {}

    def tables(self, history: Sequence[Record]) -> Sequence[Table]:
        """Tables that `bilevel report` shows below the charts. None by default."""
        return ()

    def identity(self) -> Mapping[str, Any]:
        """What a run is about, as plain data: hashes of data and model. Runs that differ in it are not seeds of one recipe.

        Kept in account.json. Nothing by default, beyond the recipe.
        """
        return {}

    def report(self, history: Sequence[Record]) -> "RenderableType | None":
        """What a person should read when the run ends (anything `rich` prints). Nothing by default."""
        return None
