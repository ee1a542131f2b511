"""What all backends that hold torch modules share. A subclass says where parameters live, by a `ShardingStrategy`."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd as _Dropout
from torch.utils.checkpoint import checkpoint

from bilevel.backend import Backend, Evaluation, Variable, Vector
from bilevel.batch import map_tensors
from bilevel.blocks import REST, Blocks
from bilevel.constraint import Constraint
from bilevel.data import Stream, generator
from bilevel.errors import InputError, NonFiniteError
from bilevel.optimizer import SGD, AdamW
from bilevel.precision import Precision, trainable
from bilevel.problem import Loss, Shard, deferred_initialization
from bilevel.regularizer import Regularizer
from bilevel.sealed import Seal
from bilevel_backends import checkpoint as checkpoints
from bilevel_backends.backward import run_backward
from bilevel_backends.deferred_init import meta_copy
from bilevel_backends.processes import Grid
from bilevel_backends.regularization import Regularization
from bilevel_backends.rounding import round_stochastically
from bilevel_backends.sharding.replicated import Replicated
from bilevel_backends.sharding.strategy import ShardingStrategy
from bilevel_backends.staging import Staging
from bilevel_backends.variable import STEPS, ModuleVariable

B = TypeVar("B")
T = TypeVar("T")

LARGE = 2**24
"""Numbers of a module for which what is left of earlier ones is cleared away first. Engines that split modules leave them in
reference cycles, and Python might only free their memory after the new one has not fitted into it."""

PINNED = 2**26
"""The most bytes of a tensor that are copied from pinned memory, which torch keeps: tokens are, a whole data set is not."""


class ModuleBackend(Backend):
    """A backend whose variables are `ModuleVariable`s. Subclasses are dataclasses; they call `begin` in `start`."""

    dtype: Precision | None
    micro_batch_size: int | Literal["auto"] | None
    activation_checkpointing: bool
    deterministic: bool
    shard_group: int | None = None
    sync_each_micro_batch: bool = True

    def __post_init__(self) -> None:
        self.dtype = trainable(self.dtype)
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, not {self.micro_batch_size}")
        if self.shard_group is not None and self.shard_group < 1:
            raise ValueError(f"shard_group must be at least 1, not {self.shard_group}")
        self.begin(0, torch.device("cpu"), Grid.alone())

    def begin(self, seed: int, device: torch.device, grid: Grid) -> None:
        """Set the backend up, before any variable is placed."""
        self._seed = seed
        self._device = device
        self._grid = grid
        self._processes = processes = grid.everyone
        at_a_time = None if self.micro_batch_size == "auto" else self.micro_batch_size
        self._shard = Shard(seed, processes.rank, processes.world_size, at_a_time)
        self._variables: list[ModuleVariable] = []
        self._recomputed: list[nn.Module] = []
        self._regularizations: dict[ModuleVariable, Regularization] = {}
        self.processed = 0
        self._before: tuple[int, bool, bool] | None = None
        self._there: tuple[Any, Any] = (None, None)
        self._staging = Staging(device)

    def be_deterministic(self, *, compiled: bool = False) -> None:
        """Let torch choose kernels that give the same result every time, until `close`.

        compiled: whether modules are compiled, so that the compiler has to be told as well.
        """
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self._before = (torch.get_deterministic_debug_mode(), fill, compiled)
        if self._device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it in this mode
        _set_determinism(2, compiled)
        # the mode would also fill every new tensor with NaN, which takes time; no tensor is read here before it is written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def savings(self, rows: int) -> dict[str, Sequence[Any]]:
        """Recompute activations; take fewer rows at a time; split what can be split over all processes, and at once."""
        wider: dict[str, Sequence[Any]] = {} if self.shard_group is None else {"shard_group": [None]}
        sooner: dict[str, Sequence[Any]] = {} if self.sync_each_micro_batch else {"sync_each_micro_batch": [True]}
        most = 1 if self.micro_batch_size == "auto" else min(self.micro_batch_size or rows, rows)  # "auto" is what fits
        fewer = [most >> k for k in range(1, most.bit_length())]
        return {"activation_checkpointing": [True], "micro_batch_size": fewer, **sooner, **wider}

    @property
    def room(self) -> int | None:
        """All of a GPU's memory, so that the same run on the same kind of GPU is always cut alike. None: it is settled.

        The CPU's memory is not planned.
        """
        if self.micro_batch_size != "auto" or self._device.type != "cuda":
            return None
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def take_at_a_time(self, rows: int) -> None:
        """Cut this process's part of a batch into micro-batches of that many rows."""
        self._shard = dataclasses.replace(self._shard, micro_batch_size=rows)

    @abstractmethod
    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        """Shard the parameters of a lower module and put the shards on their devices.

        like: take the weights of this variable, which has a module of the same shape, and share with it what never trains
            (`like.fixed`); None: keep the module's own.
        """

    def replicate_module(self, module: nn.Module) -> ShardingStrategy:
        """Put the module of a variable that every process has whole on its device."""
        return Replicated(module.to(self._device), self._processes)

    def copy_module(self, source: ModuleVariable) -> nn.Module:
        """A copy of the variable's module, on the meta device; `shard_module` copies the weights shard by shard."""
        assert source.sharding.meta_module is not None
        return meta_copy(source.sharding.meta_module)

    @property
    def offload(self) -> torch.device | None:
        """The device that holds the masters of lower variables, if they are not with the parameters."""
        return None

    @property
    def shard(self) -> Shard:
        """This process's part of a batch, in micro-batches."""
        return self._shard

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return self._processes.all_gather_object(value)

    def place(
        self,
        name: str,
        build: Callable[[], nn.Module],
        optimizer: SGD | AdamW,
        *,
        sharded: bool,
        blocks: Callable[[nn.Module], Blocks] | None = None,
    ) -> ModuleVariable:
        """Build the module; if it is to be sharded, shard it in the backend's precision."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(self._seed, Stream.INIT).integers(2**63)))
            with deferred_initialization() if sharded else nullcontext():
                module = build()
        require_function(name, module)
        grouping = blocks(module) if blocks is not None else one_block(module)
        if not sharded:
            variable = ModuleVariable(name, self.replicate_module(module), optimizer, grouping, self._processes)
            variable.activate(grouping.names)
        else:
            variable = self._place_sharded(name, module, optimizer, grouping)
        self._variables.append(variable)
        return variable

    def replicate(self, source: Variable, name: str, optimizer: SGD | AdamW | None = None) -> ModuleVariable:
        """Copy the module; the replica has no active block yet."""
        source = own(source)
        module = self.copy_module(source)
        variable = self._place_sharded(name, module, optimizer or source.settings, source.blocks, like=source)
        self._variables.append(variable)
        return variable

    def constrain(self, variable: Variable, constraint: Constraint | Mapping[str, Constraint]) -> None:
        """Project the masters, which every process has whole and alike."""
        own(variable).constrain(constraint)

    def regularize(self, variables: Sequence[Variable], regularizer: Regularizer) -> None:
        """Keep the anchor, if there is one, in the shards of the first variable; all are sharded alike."""
        term = Regularization.at(own(variables[0]), regularizer)
        self._regularizations = {own(variable): term for variable in variables}

    def assign(self, target: Variable, source: Variable) -> None:
        """Copy weights, masters, moments and the rounding counter."""
        target, source = own(target), own(source)
        if target.active != source.active:
            raise InputError(
                f"{source.name} cannot be copied to {target.name}: they have different active blocks. This solver copies "
                "replicas, so that they must have the same draws; set active.independent=false"
            )
        target.copy_from(source)

    def mark(self, variable: Variable) -> None:
        """Copy what is active; other parameters are copied when they become so."""
        own(variable).mark()

    def rewind(self, variable: Variable) -> None:
        """Copy the marked weights back, and free those of what is not active."""
        own(variable).rewind()

    def activate(self, variable: Variable, blocks: frozenset[str]) -> None:
        """Freeze the blocks that leave and free their masters; make masters for those that enter."""
        own(variable).activate(blocks)

    def backward(self, loss: Callable[[B], Loss], batch: Sequence[B], *, wrt: Mapping[Variable, float]) -> Evaluation:
        """Run forward and backward passes, micro-batch by micro-batch."""
        variables = [own(variable) for variable in wrt]
        try:
            for variable, weight in zip(variables, wrt.values(), strict=True):
                variable.receive(weight)
            return self._run(loss, batch, receivers=variables)
        finally:
            for variable in variables:
                variable.stop_receiving()

    def evaluate(self, loss: Callable[[B], Loss], batch: Sequence[B]) -> Evaluation:
        """Run forward passes only."""
        with torch.no_grad():
            return self._run(loss, batch, receivers=())

    def step(self, variable: Variable, *, lr: float) -> float:
        """Reduce the gradients over processes, check and clip them, update the masters and the parameters."""
        v = own(variable)
        v.reduce_gradients()
        if not v.gradients:
            raise RuntimeError(f"variable {v.name!r} has no gradient to step with; name it in the wrt of a backward")
        try:
            norm = v.step(lr, v.settings.clip)
        except NonFiniteError as error:
            error.moved = any(variable.steps for variable in self._variables)
            raise
        self._write_back(v)
        v.steps += 1
        return norm

    def take_gradient(self, variable: Variable) -> Vector:
        """Return the accumulated gradient and clear it."""
        v = own(variable)
        v.reduce_gradients()
        taken, v.gradients = v.gradients, {}
        parts = {name: taken[name] if name in taken else torch.zeros_like(master) for name, master in v.masters.items()}
        return Vector(parts, v.sharding.whole)

    def add_gradient(self, variable: Variable, vector: Vector, weight: float = 1.0) -> None:
        """Add to the gradients that are there, and leave the vector as it is."""
        v = own(variable)
        for name in v.masters:
            v.add(name, vector.parts[name], weight)

    def read(self, variable: Variable) -> Vector:
        """Copies of the masters."""
        v = own(variable)
        return Vector({name: master.detach().clone() for name, master in v.masters.items()}, v.sharding.whole)

    def numel(self, variable: Variable) -> int:
        """The size of the masters."""
        return sum(master.numel() for master in own(variable).masters.values())

    def write(self, variable: Variable, vector: Vector) -> None:
        """Write into the masters, and from there into the parameters."""
        v = own(variable)
        with torch.no_grad():
            for name, master in v.masters.items():
                master.copy_(vector.parts[name])
        self._write_back(v)

    def dot(self, v: Vector, w: Vector) -> float:
        """Computed in float64."""
        products = [(part.double() * w.parts[name].double()).sum() for name, part in v.parts.items()]
        if not products:
            total = torch.zeros((), dtype=torch.float64)
        else:
            total = products[0] if len(products) == 1 else torch.stack(products).sum()
        return float(total if v.whole else self._grid.shards.all_reduce(total))

    def weights(self, variable: Variable) -> dict[str, Tensor]:
        """Copies of all weights and persistent buffers, on the CPU."""
        v = own(variable)
        values = {}
        for name, shard, parameter in checkpoints.state_of(v):
            whole = shard if parameter is None or v.sharding.whole else v.sharding.gather(parameter, shard, 0)
            if whole is not None:
                values[name] = whole.detach().to("cpu", copy=True)
        return {alias: values[name] for alias, name in _aliases(v.module).items() if name in values}

    def whole_module(self, variable: Variable) -> nn.Module:
        """The module itself, where parameters are not split."""
        placement = self.placement(self._processes.world_size)
        if placement.split_parameters and not isinstance(own(variable).sharding, Replicated):
            raise InputError(f"the backend {placement.name} splits the parameters of variable {variable.name!r}")
        return own(variable).module

    def optimizer_state(self, variable: Variable) -> dict[str, dict[str, Tensor]]:
        """Gather the shards in every process."""
        v, processes = own(variable), self._processes

        def whole(name: str, key: str, value: Tensor) -> Tensor:
            if v.sharding.whole or key == STEPS:
                return value.clone()
            copies = [v.sharding.gather(name, value, rank) for rank in range(processes.world_size)]
            mine = copies[processes.rank]
            assert mine is not None
            return mine

        return {
            name: {key: whole(name, key, value) for key, value in _optimizer_state_of(v, name).items()} for name in v.masters
        }

    def optimizer_bytes(self, variable: Variable) -> int:
        """Masters that are not the parameters themselves, moments, and accumulated gradients."""
        return own(variable).extra_bytes()

    def checkpoint_bytes(self, variables: Sequence[Variable]) -> int:
        """Bytes of the weights, and of the masters and two moments of what is active now."""
        return checkpoints.estimate([own(v) for v in variables])

    def save(self, directory: Path, variables: Sequence[Variable], *, copy: bool) -> Callable[[], Mapping[str, Seal]]:
        """See `bilevel_backends.checkpoint`."""
        staging = self._staging if copy else None
        return checkpoints.save(directory, [own(v) for v in variables], self._processes, staging)

    def load(self, directory: Path, variables: Sequence[Variable]) -> None:
        """See `bilevel_backends.checkpoint`."""
        checkpoints.load(directory, [own(v) for v in variables])

    def load_weights(self, directory: Path, variables: Sequence[Variable]) -> None:
        """See `bilevel_backends.checkpoint`."""
        checkpoints.load_weights(directory, [own(v) for v in variables])

    def close(self) -> None:
        """Restore torch's global settings, and let go of the variables."""
        if self._before is not None:
            mode, fill, compiled = self._before
            _set_determinism(mode, compiled)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            self._before = None
        for variable in self._variables:
            variable.release()
        for block in self._recomputed:
            del block.forward
        self._variables, self._recomputed, self._regularizations, self._there = [], [], {}, (None, None)
        self._staging.free()

    def _place_sharded(
        self, name: str, module: nn.Module, optimizer: SGD | AdamW, blocks: Blocks, like: ModuleVariable | None = None
    ) -> ModuleVariable:
        if self.dtype is None and any(parameter.dtype == torch.float16 for parameter in module.parameters()):
            raise InputError(
                f"variable {name!r} is in float16, which differences of losses do not survive; set backend.dtype to "
                "bfloat16 or float32"
            )
        if sum(parameter.numel() for parameter in module.parameters()) > LARGE:
            gc.collect()
        for path in blocks.repeated if self.activation_checkpointing else ():
            block = module.get_submodule(path)
            block.forward = partial(_recompute, type(block).forward, block)
            self._recomputed.append(block)
        return ModuleVariable(
            name,
            self.shard_module(module, blocks, like),
            optimizer,
            blocks,
            self._processes,
            self.offload,
            like.fixed if like is not None else None,
        )

    def _run(self, loss: Callable[[B], Loss], batch: Sequence[B], receivers: Sequence[ModuleVariable]) -> Evaluation:
        """The sum over micro-batches and processes. Gradients flow to `receivers`, if there are any."""
        precise = self._precise
        self._clear_losses()
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        size, alone = 0, len(batch) == 1 and self._processes.world_size == 1
        for number, micro_batch in enumerate(batch):
            for variable in receivers:
                variable.sharding.begin_pass(last=number + 1 == len(batch))
            result = loss(self.on_device(micro_batch))
            value, named = result if isinstance(result, tuple) else (result, None)
            if receivers:
                if value.requires_grad:  # it does not where f ignores x, say, and only x is in `wrt`
                    run_backward(value)
                for variable in receivers:
                    variable.collect()
                size += size_of(micro_batch)
            if alone and not named:
                break
            exact = value.detach().to(precise)
            total = exact if total is None else total + exact
            for key, part in (named or {}).items():
                parts[key] = parts.get(key, 0) + part.detach().to(precise)
        for variable in self._variables:
            variable.sharding.reshard()
        if alone and total is None:
            self.processed += size
            term = self._regularize([*self._regularized()], receivers) if self._regularizations else 0.0
            return self._checked(value.item() + term, {})
        if total is None:  # this process has no part of the batch
            total = torch.zeros((), dtype=precise, device=self._device)
        counted = torch.full_like(total, size)
        seen = {*self._regularized()}  # not by a process without a part of the batch
        flags = [torch.full_like(total, v in seen) for v in self._regularizations]
        values = torch.stack([total, counted, *flags, *(part.to(total.device) for part in parts.values())])
        summed, processed, *rest = self._processes.all_reduce(values).tolist()
        self.processed += int(processed)
        concerned = [v for v, count in zip(self._regularizations, rest, strict=False) if count]
        summed += self._regularize(concerned, receivers)
        return self._checked(summed, dict(zip(parts, rest[len(flags) :], strict=True)))

    @property
    def _precise(self) -> torch.dtype:
        """The precision in which losses are summed: the highest that the device has."""
        return torch.float32 if self._device.type == "mps" else torch.float64

    def _clear_losses(self) -> None:
        """Forget which losses were computed, before a pass."""
        for variable in self._variables:
            variable.last_loss = ""

    def _regularized(self) -> Iterator[ModuleVariable]:
        """The variables whose lower loss the pass has computed, if a regularizer is a part of it."""
        return (variable for variable in self._regularizations if variable.last_loss == "lower_loss")

    def _regularize(self, variables: Sequence[ModuleVariable], receivers: Sequence[ModuleVariable]) -> float:
        """Add the regularizer's gradient, once for the whole batch, to those that receive any. Returns what it adds to g."""
        for variable in variables:
            if variable in receivers:
                self._regularizations[variable].add_gradient(variable, variable.weight)
        return sum(self._regularizations[variable].value(variable, self._precise) for variable in variables)

    def on_device(self, batch: Any) -> Any:
        """The same batch with every tensor on the device."""
        if any(batch is known for known in self._there):  # all the data of either level, say, at every pass
            return batch
        moved = to_device(batch, self._device)
        if moved is batch:
            self._there = (batch, self._there[0])
        return moved

    def _evaluation(self, loss: Loss) -> Evaluation:
        """The loss of a whole batch, in this process alone. Raises `NonFiniteError` if it is not finite."""
        value, named = loss if isinstance(loss, tuple) else (loss, {})
        return self._checked(value.item(), {key: part.item() for key, part in named.items()})

    def _checked(self, value: float, parts: Mapping[str, float]) -> Evaluation:
        """What a pass has found. Raises `NonFiniteError`, and drops its gradients, if the loss is not finite."""
        if math.isfinite(value):
            return Evaluation(value, parts)
        for variable in self._variables:
            variable.drop_gradients()
        odd = [f"{key} ({part})" for key, part in parts.items() if not math.isfinite(part)]
        at = next((variable for variable in self._variables if variable.last_loss), None)
        loss = "the loss" if at is None else f"{'g' if at.last_loss == 'lower_loss' else 'f'}({at.name})"
        raise NonFiniteError(
            f"{loss} is {value}" + (f", in {', '.join(odd)}" if odd else ""),
            variable=None if at is None else at.name,
            moved=any(variable.steps for variable in self._variables),
        )

    def _write_back(self, v: ModuleVariable) -> None:
        """Copy masters into parameters. In low precision all replicas round with the same noise at the same step.

        Shards are rounded independently of each other; a parameter that every process has whole is rounded alike in all.
        """
        noise = self._noise(v) if any(map(v.rounded, v.separate)) else None
        for name in v.separate:
            values = v.masters[name].to(self._device, non_blocking=True)
            low = values if noise is None or not v.rounded(name) else round_stochastically(values, noise)
            v.sharding.local(name).copy_(low)
        for group in v.groups:
            v.sharding.all_gather(group)

    def _noise(self, v: ModuleVariable) -> torch.Generator:
        """The noise with which the variable is rounded at its step."""
        shard = 0 if v.sharding.whole else self._grid.shards.rank
        noise = torch.Generator(self._device)
        return noise.manual_seed(int(generator(self._seed, Stream.NOISE, v.steps, shard).integers(2**63)))


def _set_determinism(mode: int, compiled: bool) -> None:
    """Set torch's mode: 0 takes any kernel, 1 warns of, and 2 refuses, one that does not give the same result every time."""
    if compiled:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)  # the same, without loading the compiler, which takes seconds


def size_of(micro_batch: Any) -> int:
    """What a micro-batch says of its size; see `Problem.upper_batch`."""
    return size if isinstance(size := getattr(micro_batch, "size", 0), int) else 0


def _recompute(forward: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)


def own(variable: Variable) -> ModuleVariable:
    """The variable, as what this backend placed. Raises `TypeError` if another backend placed it."""
    if not isinstance(variable, ModuleVariable):
        raise TypeError(f"variable {variable.name!r} was placed by another backend")
    return variable


def _optimizer_state_of(v: ModuleVariable, name: str) -> dict[str, Tensor]:
    """The optimizer's tensors for one active parameter (shards, and scalars): the same keys in every process, in order."""
    moments = v.optimizer_state(name)
    if not v.sharding.whole:  # a process whose shard is empty has no state, but must take part when it is gathered
        scalars = {key: value.cpu() if key == STEPS else None for key, value in moments.items()}
        known = next((found for found in v.processes.all_gather_object(scalars) if found), {})
        empty = {key: torch.zeros_like(v.masters[name]) if value is None else value for key, value in known.items()}
        moments = moments or empty
    return dict(sorted(moments.items()))


def require_function(name: str, module: nn.Module) -> None:
    """Raise `InputError` if the module's output would not be a function of weights and batch.

    Replicas would then differ by more than their weights, and every pass would change what the next one computes.
    """
    for path, part in module.named_modules():
        if not part.training:
            continue
        dropout = part.p if isinstance(part, _Dropout) else getattr(part, "dropout", 0.0)
        draws = isinstance(part, _Dropout | nn.RNNBase | nn.MultiheadAttention) and dropout > 0
        counts = isinstance(part, _BatchNorm) and part.track_running_stats
        if draws or counts:
            what = "drops activations at random" if draws else "keeps running statistics"
            raise InputError(
                f"variable {name!r}: {path or 'the module'} ({type(part).__name__}) {what}, and a loss must be a function "
                "of weights and batch alone; call .eval() on the module before returning it"
            )


def one_block(module: nn.Module) -> Blocks:
    """All that trains, as a single block."""
    return Blocks({REST: tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)})


def _aliases(module: nn.Module) -> dict[str, str]:
    """Name in the state dict -> the name under which the parameter or buffer is listed; they differ for tied weights."""
    listed = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    state = module.state_dict(keep_vars=True)  # which has more, where parameters are quantized
    return {alias: listed[id(tensor)] for alias, tensor in state.items() if id(tensor) in listed}


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with every tensor on the device. A GPU goes on computing while it is copied there."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        if (
            device.type == "cuda"
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and tensor.nbytes <= PINNED
        ):
            tensor = tensor.pin_memory()  # from other memory, CUDA copies only when all that it was given before is done
        return tensor.to(device, non_blocking=True)

    return map_tensors(move, batch)
