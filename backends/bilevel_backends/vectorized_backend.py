"""Many runs side by side on one device: every tensor has a first dimension for the runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bilevel.backend import Evaluation, SideBySide, Variable, Vector
from bilevel.blocks import Blocks
from bilevel.constraint import Constraint, by_parameter, mapping
from bilevel.data import Stream, generator
from bilevel.errors import InputError
from bilevel.many import Together
from bilevel.optimizer import SGD, AdamW
from bilevel.per_run import PerRun
from bilevel.problem import Loss, Shard
from bilevel.regularizer import Regularizer
from bilevel.sealed import Seal
from bilevel_backends.module_backend import one_block, require_function
from bilevel_backends.vectorized_pass import Pass, key_of

B = TypeVar("B")


class VectorizedVariable(Variable):
    """A module of which every run has its own values.

    module: the module, on which the values of one run are put while a loss is recorded.
    values: the parameters by name. Shapes: (runs, *shape of the parameter).
    buffers: the module's buffers, likewise.
    gradients: the sum so far of weight * gradient, with the shapes of the values.
    moments: what the optimizer remembers of each parameter, by its name for it.
    trained: the names of the active parameters.
    constraints: by parameter, what the values are projected onto after each step.
    regularizer: what is added to the lower loss.
    anchors: the values from which the regularizer measures the distance, by parameter; empty if that is 0.
    marked: the values when the variable was marked; None if it was not.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], settings: SGD | AdamW, blocks: Blocks) -> None:
        self.name = name
        self.module = modules[0].requires_grad_(False)
        self.settings = settings
        self.blocks = blocks
        self.active: frozenset[str] = frozenset()
        self.values = _stacked([dict(module.named_parameters()) for module in modules])
        self.buffers = _stacked([dict(module.named_buffers()) for module in modules])
        self.gradients: dict[str, Tensor] = {}
        self.moments: dict[str, dict[str, Any]] = {}
        self.trained: set[str] = set()
        self.constraints: dict[str, Constraint] = {}
        self.regularizer: Regularizer | None = None
        self.anchors: dict[str, Tensor] = {}
        self.marked: dict[str, Tensor] | None = None
        self._bound: dict[str, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with the values of one run."""
        if self._bound is None:
            raise RuntimeError(f"variable {self.name!r} has the values of many runs; only a loss can call it")
        return torch.func.functional_call(self.module, self._bound, args, kwargs)

    def tensors(self) -> list[Tensor]:
        """Parameters, then buffers."""
        return [*self.values.values(), *self.buffers.values()]

    def bind(self, tensors: Sequence[Tensor] | None) -> None:
        """Use these, in the order of `tensors`, as the values of the run for which a loss is computed."""
        names = [*self.values, *self.buffers]
        self._bound = None if tensors is None else dict(zip(names, tensors, strict=True))

    def differences(self) -> dict[str, Tensor]:
        """The values less the anchors of the regularizer."""
        return {name: value - self.anchors[name] if self.anchors else value for name, value in self.values.items()}

    def mappings(self, lr: float) -> dict[str, Tensor]:
        """The gradient mapping of each parameter with a gradient; the gradient itself where there is no constraint."""
        return {
            name: mapping(torch.vmap(self.constraints[name].project), self.values[name], gradient, lr)
            if name in self.constraints
            else gradient
            for name, gradient in self.gradients.items()
        }

    def add(self, name: str, gradient: Tensor, weight: float) -> None:
        """Add weight * gradient, if the parameter trains."""
        if name not in self.trained:
            return
        weighted = gradient if not isinstance(weight, PerRun) and weight == 1 else weight * gradient
        self.gradients[name] = self.gradients[name] + weighted if name in self.gradients else weighted


@dataclass
class VectorizedBackend(SideBySide):
    """A run for each seed. `TorchBackend.side_by_side` makes it.

    seeds: the seed of each run.
    device: where the tensors are.
    dtype: precision of the lower variables; None keeps what the problem builds.
    """

    seeds: Sequence[int]
    device: torch.device
    dtype: torch.dtype | None = None

    def start(self, seed: int) -> None:
        """Start with no variables."""
        self._variables: list[VectorizedVariable] = []
        self._passes: dict[tuple[Any, ...], Pass] = {}
        self._lower: Sequence[VectorizedVariable] = ()  # those whose lower loss the last pass has computed
        self._shard = Shard(self.seeds[0])
        self.diverged = torch.zeros(len(self.seeds), dtype=torch.bool, device=self.device)

    @property
    def shard(self) -> Shard:
        """Everything; `ForSeeds` puts in the seed of each run."""
        return self._shard

    def place(
        self,
        name: str,
        build: Callable[[], nn.Module],
        optimizer: SGD | AdamW,
        *,
        sharded: bool,
        blocks: Callable[[nn.Module], Blocks] | None = None,
    ) -> VectorizedVariable:
        """Build the module of every run, each with its seed."""
        built = {}
        for seed in dict.fromkeys(self.seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(generator(seed, Stream.INIT).integers(2**63)))
                module = build().to(self.device)
            built[seed] = module.to(self.dtype) if sharded and self.dtype is not None else module
        modules = [built[seed] for seed in self.seeds]
        require_function(name, modules[0])
        frozen = [key for key, parameter in modules[0].named_parameters() if not parameter.requires_grad]
        if frozen:
            raise InputError(
                f"variable {name!r}: {frozen[0]} does not train, which runs side by side do not know; make it a buffer"
            )
        grouping = blocks(modules[0]) if blocks is not None else one_block(modules[0])
        variable = VectorizedVariable(name, modules, optimizer, grouping)
        if not sharded:
            self.activate(variable, grouping.names)
        self._variables.append(variable)
        return variable

    def replicate(self, source: Variable, name: str, optimizer: SGD | AdamW | None = None) -> VectorizedVariable:
        """Copy the values."""
        source = _own(source)
        replica = copy.copy(source)
        replica.name, replica.settings = name, optimizer or source.settings
        replica.active, replica.trained, replica.marked = frozenset(), set(), None
        replica.values = dict(source.values)  # a step makes new tensors, so that the two never share one that changes
        replica.gradients, replica.moments, replica.constraints = {}, {}, {}
        self._variables.append(replica)
        return replica

    def constrain(self, variable: Variable, constraint: Constraint | Mapping[str, Constraint]) -> None:
        """Project the values of every run after each step."""
        v = _own(variable)
        for run in range(len(self.seeds)):
            v.constraints = by_parameter(constraint, {name: value[run] for name, value in v.values.items()})

    def regularize(self, variables: Sequence[Variable], regularizer: Regularizer) -> None:
        """Keep the values of the first variable, from which the others start too, if the term is anchored there."""
        anchors = dict(_own(variables[0]).values) if regularizer.anchored else {}
        for variable in map(_own, variables):
            variable.regularizer, variable.anchors = regularizer, anchors

    def assign(self, target: Variable, source: Variable) -> None:
        """Copy values and moments."""
        target, source = _own(target), _own(source)
        target.values, target.gradients = dict(source.values), {}
        target.moments = {name: dict(moments) for name, moments in source.moments.items()}

    def activate(self, variable: Variable, blocks: frozenset[str]) -> None:
        """Let these blocks train in all runs. Gradients are computed in all blocks; those of the others are dropped."""
        v = _own(variable)
        if blocks == v.active:
            return
        v.active = blocks
        v.trained = set(v.blocks.parameters(blocks))
        v.gradients = {name: gradient for name, gradient in v.gradients.items() if name in v.trained}
        v.moments = {name: moments for name, moments in v.moments.items() if name in v.trained}

    def mark(self, variable: Variable) -> None:
        """Remember the values."""
        v = _own(variable)
        v.marked = dict(v.values)

    def rewind(self, variable: Variable) -> None:
        """Bring the values back."""
        v = _own(variable)
        if v.marked is None:
            raise RuntimeError(f"variable {v.name!r} was not marked, so there is nothing to rewind it to")
        v.values, v.gradients, v.moments = dict(v.marked), {}, {}

    def backward(self, loss: Callable[[B], Loss], batch: Sequence[B], *, wrt: Mapping[Variable, float]) -> Evaluation:
        """Run the pass of all runs."""
        variables = [_own(variable) for variable in wrt]
        evaluations = []
        for micro_batch in batch:
            evaluation, gradients = self._run(loss, micro_batch, variables)
            evaluations.append(evaluation)
            _add(gradients, wrt)
        return self._regularized(_total(evaluations), wrt)

    @property
    def second_order(self) -> bool:
        """Losses are differentiated by torch, as often as is asked."""
        return True

    def backward_along(
        self,
        loss: Callable[[B], Loss],
        batch: Sequence[B],
        variable: Variable,
        vector: Vector,
        *,
        wrt: Mapping[Variable, float],
    ) -> float:
        """Differentiate the losses of all runs twice."""
        of, variables = _own(variable), [_own(v) for v in wrt]
        parts = [vector.parts.get(name, torch.zeros_like(value)) for name, value in of.values.items()]
        products = []
        for micro_batch in batch:
            evaluation, gradients = self._run(loss, micro_batch, variables, of, parts)
            products.append(evaluation)
            _add(gradients, wrt)
        total = _total(products).value
        if of in self._lower and of.regularizer is not None:
            strength = of.regularizer.strength
            total += strength * self.dot(Vector(of.differences(), True), vector)
            if of in wrt:
                self.add_gradient(of, vector, wrt[of] * strength)
        return total

    def evaluate(self, loss: Callable[[B], Loss], batch: Sequence[B]) -> Evaluation:
        """Run the forward passes."""
        return self._regularized(_total([self._run(loss, micro_batch, [])[0] for micro_batch in batch]), {})

    def step(self, variable: Variable, *, lr: float) -> float:
        """Clip each run's gradient by its own norm, and update."""
        v = _own(variable)
        if not v.gradients:
            raise RuntimeError(f"variable {v.name!r} has no gradient to step with; name it in the wrt of a backward")
        if v.constraints:
            v.gradients = v.mappings(lr)
        squares = [gradient.double().flatten(1).square().sum(1) for gradient in v.gradients.values()]
        norm = sum(squares[1:], squares[0]).sqrt()
        self.diverged |= ~norm.isfinite()
        clip = v.settings.clip
        if clip is not None:
            factor = PerRun(torch.where(norm > clip, clip / norm, 1.0))
            v.gradients = {name: factor * gradient for name, gradient in v.gradients.items()}
        update = _adamw if isinstance(v.settings, AdamW) else _sgd
        for name, gradient in v.gradients.items():
            value = update(v, name, gradient, lr)
            v.values[name] = torch.vmap(v.constraints[name].project)(value) if name in v.constraints else value
        v.gradients = {}
        return _number(norm)

    def take_gradient(self, variable: Variable) -> Vector:
        """Return the accumulated gradients and clear them."""
        v = _own(variable)
        taken, v.gradients = v.gradients, {}
        active = {name: value for name, value in v.values.items() if name in v.trained}
        return Vector({name: taken.get(name, torch.zeros_like(value)) for name, value in active.items()}, whole=True)

    def add_gradient(self, variable: Variable, vector: Vector, weight: float = 1.0) -> None:
        """Add to the gradients that are there."""
        for name, part in vector.parts.items():
            _own(variable).add(name, part, weight)

    def read(self, variable: Variable) -> Vector:
        """The values, of which a step makes new ones."""
        v = _own(variable)
        return Vector({name: value for name, value in v.values.items() if name in v.trained}, whole=True)

    def write(self, variable: Variable, vector: Vector) -> None:
        """Set the values. A part without a dimension for runs is that of all of them."""
        v = _own(variable)
        for name in v.trained:
            value = v.values[name]
            v.values[name] = vector.parts[name].to(value.device, value.dtype).expand_as(value).clone()

    def dot(self, v: Vector, w: Vector) -> float:
        """The inner product of each run, in float64."""
        products = [(part.double() * w.parts[name].double()).flatten(1).sum(1) for name, part in v.parts.items()]
        return _number(sum(products[1:], products[0]))

    def weights(self, variable: Variable) -> dict[str, Tensor]:
        """Copies of all values on the CPU. Shapes: (runs, *shape)."""
        v = _own(variable)
        return {name: value.to("cpu", copy=True) for name, value in {**v.values, **v.buffers}.items()}

    def optimizer_bytes(self, variable: Variable) -> int:
        """Moments and gradients of all runs."""
        v = _own(variable)
        moments = [moment for own in v.moments.values() for moment in own.values() if isinstance(moment, Tensor)]
        return sum(tensor.nbytes for tensor in [*v.gradients.values(), *moments])

    def checkpoint_bytes(self, variables: Sequence[Variable]) -> int:
        """Nothing is written."""
        return 0

    def save(self, directory: Path, variables: Sequence[Variable], *, copy: bool) -> Callable[[], Mapping[str, Seal]]:
        """Raise `InputError`: runs side by side are not saved."""
        raise InputError("runs side by side are not saved; call `fit` for each run")

    def load(self, directory: Path, variables: Sequence[Variable]) -> None:
        """Raise `InputError`: runs side by side are not saved."""
        raise InputError("runs side by side are not saved; call `fit` for each run")

    def close(self) -> None:
        """Forget the variables and the recorded passes."""
        self._variables, self._passes = [], {}

    def _run(
        self,
        loss: Callable[[Any], Loss],
        batch: Any,
        wrt: Sequence[VectorizedVariable],
        of: VectorizedVariable | None = None,
        vector: Sequence[Tensor] = (),
    ) -> tuple[Evaluation, Sequence[Tensor]]:
        if not isinstance(batch, Together):
            raise TypeError("runs side by side take the batches of a `ForSeeds` problem")
        batch = batch.to(self.device)
        key = key_of(loss, wrt, of, batch)
        found = self._passes.get(key) if key is not None else None
        if found is None:
            found = Pass(loss, list(self._variables), wrt, of)
            if key is not None:
                self._passes[key] = found
        value, parts, gradients = found(batch, vector)
        self.diverged |= ~value.isfinite()
        self._lower = found.lower
        return Evaluation(_number(value), {key: _number(part) for key, part in parts.items()}), gradients

    def _regularized(self, evaluation: Evaluation, wrt: Mapping[Variable, float]) -> Evaluation:
        """Add the regularizer, once for each batch, where the pass has computed the lower loss."""
        value = evaluation.value
        for v in self._lower:
            if v.regularizer is None:
                continue
            difference = Vector(v.differences(), True)
            value = value + v.regularizer.strength / 2 * self.dot(difference, difference)
            if v in wrt:
                self.add_gradient(v, difference, wrt[v] * v.regularizer.strength)
        return Evaluation(value, evaluation.parts)


def _add(gradients: Sequence[Tensor], wrt: Mapping[Variable, float]) -> None:
    """Add the gradients of a pass to the variables in which it was differentiated."""
    queue = iter(gradients)
    for variable, weight in wrt.items():
        for name in _own(variable).values:
            _own(variable).add(name, next(queue), weight)


def _sgd(v: VectorizedVariable, name: str, gradient: Tensor, lr: float) -> Tensor:
    """Gradient descent with heavy-ball momentum, as in `torch.optim.SGD`."""
    settings, value = v.settings, v.values[name]
    assert isinstance(settings, SGD)
    if settings.weight_decay:
        gradient = gradient + settings.weight_decay * value
    if settings.momentum:
        moments = v.moments.setdefault(name, {})
        moments["momentum"] = gradient = settings.momentum * moments.get("momentum", 0.0) + gradient
    return value - lr * gradient


def _adamw(v: VectorizedVariable, name: str, gradient: Tensor, lr: float) -> Tensor:
    """Adam with decoupled weight decay (arXiv 1711.05101), as in `torch.optim.AdamW`."""
    settings, value = v.settings, v.values[name]
    assert isinstance(settings, AdamW)
    β1, β2 = settings.betas
    moments = v.moments.setdefault(name, {})
    moments["steps"] = k = moments.get("steps", 0) + 1
    moments["first"] = first = β1 * moments.get("first", 0.0) + (1 - β1) * gradient
    moments["second"] = second = β2 * moments.get("second", 0.0) + (1 - β2) * gradient.square()
    direction = first / (1 - β1**k) / ((second / (1 - β2**k)).sqrt() + settings.eps)
    moved: Tensor = value - lr * (direction + settings.weight_decay * value)
    return moved


def _number(values: Tensor) -> float:
    """A number of each run, where solvers expect one."""
    return cast(float, PerRun(values.double()))


def _total(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The sum over micro-batches."""
    first = evaluations[0]
    for other in evaluations[1:]:
        first = Evaluation(first.value + other.value, {key: first.parts[key] + other.parts[key] for key in first.parts})
    return first


def _own(variable: Variable) -> VectorizedVariable:
    """The variable, as what this backend placed. Raises `TypeError` if another backend placed it."""
    if not isinstance(variable, VectorizedVariable):
        raise TypeError(f"variable {variable.name!r} was placed by another backend")
    return variable


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name].detach() for own in tensors]) for name in tensors[0]}
