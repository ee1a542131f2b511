"""What a user writes: the two losses of a bilevel problem, its variables and its data."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from bilevel.account import Finding, Labels, Table
from bilevel.blocks import Blocks, find_blocks
from bilevel.cost import Cost
from bilevel.errors import InputError
from bilevel.plain import RECIPE_RULES
from bilevel.record import Record

if TYPE_CHECKING:
    from rich.console import RenderableType

B = TypeVar("B")
T = TypeVar("T")

_memoryless: ContextVar[bool] = ContextVar("memoryless", default=False)


@contextmanager
def memoryless() -> Iterator[None]:
    """Within, `Problem.lower` may return a module without memory for its weights; see there. For backends."""
    token = _memoryless.set(True)
    try:
        yield
    finally:
        _memoryless.reset(token)


def may_be_memoryless() -> bool:
    """Whether `Problem.lower` is called by a backend that takes a module without memory."""
    return _memoryless.get()


class Forward(Protocol):
    """A variable as a loss sees it: something to call. Calling it runs the module's forward and returns new tensors.

    Losses must not reach for the parameters behind it: on a sharded backend no process holds them all.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""


Loss = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""A scalar, or a scalar with its named parts (for reports). Both are sums over micro-batches: the loss of a global
batch is the sum of the losses of its micro-batches, so each micro-batch must carry its share of the weight."""


@dataclass(frozen=True)
class Shard:
    """Which part of a global batch one process takes, and in which pieces.

    seed: seed of the run; a batch is a pure function of (index, seed), so that a resumed run sees the same data.
    rank, world_size: this process among all processes.
    micro_batch_size: samples of one forward; None takes the process's whole share at once.
    """

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None

    def split(self, samples: Sequence[T]) -> list[Sequence[T]]:
        """This process's samples (every world_size-th, from rank on), cut into micro-batches.

        Raises `InputError` if the processes would not get equally many: they wait for each other in every forward pass.
        """
        if len(samples) % self.world_size:
            raise InputError(
                f"a batch of {len(samples)} cannot be dealt evenly to {self.world_size} processes; "
                f"choose a batch size that is a multiple of {self.world_size}"
            )
        mine = samples[self.rank :: self.world_size]
        size = self.micro_batch_size or max(1, len(mine))
        return [mine[start : start + size] for start in range(0, len(mine), size)]


class Problem(ABC, Generic[B]):
    """min_x f(x, y*(x))  subject to  y*(x) in argmin_y g(x, y).

    `x` is the upper variable, `y` the lower variable; `f` is `upper_loss`, `g` is `lower_loss`.
    A subclass is usually a dataclass: its fields are what a recipe may set.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    smooth: ClassVar[bool | None] = None
    """Whether the losses have the second derivatives that some solvers need. None: not said; False: those solvers refuse."""
    strongly_convex: ClassVar[bool | None] = None
    """Whether g is strongly convex in y. None: not said; False: solvers that cannot do without refuse."""

    labels: ClassVar[Labels] = Labels()
    """What the numbers of its runs are called, on the terminal and in reports."""

    def prepare(self) -> None:
        """Read and check everything that can be wrong before a large module is built.

        Called once, first. Raise `InputError` for what the user has to mend. Does nothing by default.
        """

    def fingerprint(self) -> str:
        """A hash of what `prepare` read (data, model): processes that differ in it, or a resumed run, are refused.

        "" by default: nothing to compare.
        """
        return ""

    @abstractmethod
    def upper(self) -> nn.Module:
        """A module that holds x. It is small, kept in full precision and present whole in every process."""

    @abstractmethod
    def lower(self) -> nn.Module:
        """A module that holds y, at its initial value. Random initialisation is seeded by the backend.

        Where `may_be_memoryless()` says so, a large module may leave its parameters on the meta device, if it has a method
        `stored_weight(name) -> Tensor`: the backend then makes them where they are to live, one after the other, so that
        no process holds them all.
        """

    @abstractmethod
    def upper_loss(self, x: Forward, y: Forward, batch: B) -> Loss:
        """f(x, y) on one micro-batch: its share of the global batch's loss."""

    @abstractmethod
    def lower_loss(self, x: Forward, y: Forward, batch: B) -> Loss:
        """g(x, y) on one micro-batch: its share of the global batch's loss."""

    @abstractmethod
    def upper_batch(self, index: int, shard: Shard) -> Sequence[B]:
        """The micro-batches that this process takes of upper batch number `index`: a pure function of both arguments.

        A batch is a tensor, or a tuple, mapping or dataclass of tensors. If it has an integer attribute `size`
        (rows, tokens), throughput is reported in that unit.
        """

    @abstractmethod
    def lower_batch(self, index: int, shard: Shard) -> Sequence[B]:
        """The same for the lower level."""

    def blocks(self, module: nn.Module) -> Blocks:
        """How the lower module's parameters group into blocks, of which a subset may train at a time."""
        return find_blocks(module)

    def cost(self, labelled_share: float = 1.0) -> Cost:
        """What a planner has to know: the lower module on the meta device, and a forward pass of it. Reads no data.

        labelled_share: part of a batch's units (tokens) that carry a loss, above 0 and at most 1.
        """
        raise InputError(f"the problem {type(self).__name__} has no cost model, so it cannot be planned")

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The upper variable in a few named numbers, recorded at every step and drawn as curves. None by default."""
        return {}

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """Files (name: text) that the run directory should hold after the last step of `history`. None by default.

        facts: what the run knows about itself, as plain data: `seed`, `versions`, and `findings` (those of `findings`, each
            as {name, flagged, sentence}).
        """
        return {}

    def snapshot(self, x: Mapping[str, Tensor]) -> Mapping[str, str | bytes]:
        """Files (name: content) that say what was learned, written with every checkpoint. None by default.

        For what does not fit into the records of steps.

        x: the upper variable's parameters by name, as `Result.x` has them.
        """
        return {}

    def findings(self, history: Sequence[Record]) -> Sequence[Finding]:
        """What a person should know before using the result: reasons not to trust it, and what was tested and holds.

        Kept in account.json, and shown by `bilevel report`. None by default.
        """
        return ()

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
