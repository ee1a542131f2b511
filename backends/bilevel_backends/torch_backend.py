"""The `torch` backend: one process, one device (CPU, one CUDA GPU, Apple MPS)."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.backend import Evaluation, Placement, SecondDerivatives, Variable, Vector
from bilevel.blocks import Blocks
from bilevel.errors import InputError
from bilevel.launch import world_size
from bilevel.precision import Precision
from bilevel.problem import Loss
from bilevel_backends.deferred_init import materialize, move_buffers, stored_weights, there, weight_source
from bilevel_backends.host_memory import keep_freed_memory
from bilevel_backends.module_backend import ModuleBackend, own, size_of
from bilevel_backends.processes import Grid
from bilevel_backends.regularization import Regularization
from bilevel_backends.sharding.strategy import ShardingStrategy
from bilevel_backends.sharding.unsharded import Unsharded
from bilevel_backends.variable import ModuleVariable
from bilevel_backends.vectorized_backend import VectorizedBackend

log = logging.getLogger("bilevel")

B = TypeVar("B")

SLOW = 4.0  # without its own instructions, bfloat16 is tens of times slower; with them, noise does not reach this


@dataclass
class TorchBackend(ModuleBackend):
    """One process on one device.

    dtype: the precision of the lower variables. In bfloat16 the active parameters have float32 masters, and are written back
        with stochastic rounding, so that small steps are not lost. None keeps what the problem builds. Upper variables keep
        their own precision.
    device: "auto" takes CUDA, else MPS, else the CPU.
    micro_batch_size: samples of one forward and backward pass, on which the result does not depend. "auto": as many as fit
        the GPU by the plan (see `bilevel plan`), and on another device the whole batch. None: the whole batch.
    activation_checkpointing: recompute each repeated block in the backward pass, which takes less memory and one more
        forward pass.
    compile: whether to torch.compile the blocks that repeat in a lower module, or the whole module if none does. All blocks
        share what is compiled; what is around them, such as the choice of places that need logits, is left as it is. Meant
        for GPUs, where it has not been measured: on a CPU, compiling takes longer than most runs gain by it.
    deterministic: whether to use deterministic kernels only, where torch has a choice.
    """

    dtype: Precision | None = None
    device: str = "auto"
    micro_batch_size: int | Literal["auto"] | None = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = True

    def start(self, seed: int) -> None:
        """Choose the device. Raises `InputError` if it is not available or if a launcher started several processes."""
        if world_size() > 1:
            raise InputError(
                f"the torch backend runs in one process, and a launcher started {world_size()}; "
                "set backend.name=deepspeed or backend.name=fsdp, or run without the launcher"
            )
        device = _pick_device(self.device)
        self.begin(seed, device, Grid.alone())
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cpu" and self.dtype == "bfloat16" and (slower := _bfloat16_slowdown()) > SLOW:
            log.warning(
                "bfloat16 is about %.0f times slower than float32 on this CPU, which has no instructions for it; "
                "set backend.dtype=float32 unless memory is short",
                slower,
            )
        if self.deterministic:
            self.be_deterministic(compiled=self.compile)

    def placement(self, world_size: int) -> Placement:
        """Everything on one device. Raises `InputError` for more than one process."""
        if world_size != 1:
            raise InputError(f"the torch backend uses one device, not {world_size}; set backend.name=deepspeed for several")
        return Placement(
            "torch",
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
        )

    def side_by_side(self, seeds: Sequence[int]) -> VectorizedBackend:
        """A run for each seed, on this device and in this precision."""
        for name in ("micro_batch_size", "activation_checkpointing", "compile"):
            if getattr(self, name) not in (None, False, "auto"):
                raise InputError(f"backend.{name} is not for runs side by side; leave it out, or call `fit` for each run")
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return VectorizedBackend(seeds, _pick_device(self.device), dtype)

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        """Put the whole module on the device, in the backend's precision."""
        if stored_weights(module) is not None:
            materialize(module, dict(module.named_parameters()), weight_source(module, self._device, self.dtype, None))
        if self._device.type == "mps":
            module.float()  # MPS has no float64
        for name, parameter in module.named_parameters():
            kind = getattr(torch, self.dtype) if self.dtype is not None else parameter.dtype
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._device, kind)
            else:
                there(name, parameter, self._device)
        move_buffers(module, self._device)
        if self.compile:
            for part in [module.get_submodule(path) for path in blocks.repeated] or [module]:
                part.compile()
        return Unsharded(module)

    def replicate_module(self, module: nn.Module) -> ShardingStrategy:
        """Put the module on the device."""
        if self._device.type == "mps":
            module.float()
        return Unsharded(module.to(self._device))

    def copy_module(self, source: ModuleVariable) -> nn.Module:
        """A copy of the module with its weights, but for what never trains, which both have."""
        shared = [source.parameter(name) for name in source.fixed.names]
        scales = [value for parameter in shared for value in vars(parameter).values() if not isinstance(value, nn.Module)]
        return copy.deepcopy(source.module, {id(thing): thing for thing in [*shared, *scales]})

    @property
    def second_order(self) -> bool:
        """Compiled modules cannot be differentiated twice."""
        return not self.compile

    def backward_along(
        self,
        loss: Callable[[B], Loss],
        batch: Sequence[B],
        variable: Variable,
        vector: Vector,
        *,
        wrt: Mapping[Variable, float],
    ) -> float:
        """Differentiate twice, micro-batch by micro-batch."""
        along, variables = own(variable), [own(v) for v in wrt]
        total = 0.0
        self._clear_losses()
        with _receiving({along, *variables}):
            for micro_batch in batch:
                _, slopes = self._differentiated(loss, micro_batch, along)
                total += float(torch.stack([(s.detach() * d).sum() for s, d in _pairs(slopes, along, vector)]).sum())
                _add_products(slopes, along, vector, wrt)
                self.processed += size_of(micro_batch)
        if (term := self._term(along)) is not None:
            total += term.along(along, vector)
            self._add_curvature(along, vector, wrt)
        return total

    @contextmanager
    def second_derivatives(
        self, loss: Callable[[B], Loss], batch: Sequence[B], variable: Variable, *, wrt: Collection[Variable]
    ) -> Iterator[SecondDerivatives]:
        """Keep the graph of the gradient, if the batch is one micro-batch. Where it is cut, there is no memory for more."""
        if len(batch) != 1:
            with super().second_derivatives(loss, batch, variable, wrt=wrt) as derivatives:
                yield derivatives
            return
        of = own(variable)
        self._clear_losses()
        with _receiving({of, *(own(v) for v in wrt)}):
            value, slopes = self._differentiated(loss, batch[0], of)
            term = self._term(of)

            def product(vector: Vector, weights: Mapping[Variable, float]) -> None:
                _add_products(slopes, of, vector, weights, keep_graph=True)
                if term is not None:
                    self._add_curvature(of, vector, weights)
                self.processed += size_of(batch[0])

            def gradient() -> tuple[Evaluation, Vector]:
                parts = {name: slope.detach().to(of.masters[name]) for slope, name in zip(slopes, of.masters, strict=True)}
                found, slope = self._evaluation(value), Vector(parts, of.sharding.whole)
                if term is None:
                    return found, slope
                self.add_gradient(of, slope)
                term.add_gradient(of, 1.0)
                return Evaluation(found.value + term.value(of, self._precise), found.parts), self.take_gradient(of)

            yield SecondDerivatives(product, gradient)

    def _term(self, variable: ModuleVariable) -> Regularization | None:
        """The regularizer's term, if the loss that was just computed at the variable has one."""
        return self._regularizations.get(variable) if variable.last_loss == "lower_loss" else None

    def _add_curvature(self, of: ModuleVariable, vector: Vector, wrt: Mapping[Variable, float]) -> None:
        """Add the product of the regularizer's second derivative, λ times the identity, with the vector."""
        if of in wrt:
            self.add_gradient(of, vector, wrt[of] * self._regularizations[of].regularizer.strength)

    def _differentiated(
        self, loss: Callable[[B], Loss], micro_batch: B, variable: ModuleVariable
    ) -> tuple[Loss, list[Tensor]]:
        """The loss, and its gradient in each active parameter, to be differentiated again.

        Fused attention cannot be, so it is not used.
        """
        with sdpa_kernel(SDPBackend.MATH):
            result = loss(self.on_device(micro_batch))
            value = result[0] if isinstance(result, tuple) else result
            parameters = [variable.parameter(name) for name in variable.masters]
            return result, list(_gradients(value, parameters, create_graph=True))


@contextmanager
def _receiving(variables: Collection[ModuleVariable]) -> Iterator[None]:
    """Let losses be differentiated in these variables, past their hooks."""
    try:
        for variable in variables:
            variable.receive(0.0)
        yield
    finally:
        for variable in variables:
            variable.stop_receiving()


def _pairs(slopes: Sequence[Tensor], of: ModuleVariable, vector: Vector) -> list[tuple[Tensor, Tensor]]:
    """The slopes in the active parameters of a variable, each with the same part of the vector."""
    return [(slope, vector.parts[name].to(of.parameter(name).dtype)) for slope, name in zip(slopes, of.masters, strict=True)]


def _add_products(
    slopes: Sequence[Tensor],
    of: ModuleVariable,
    vector: Vector,
    wrt: Mapping[Variable, float],
    *,
    keep_graph: bool = False,
) -> None:
    """Add weight * gradient of <slopes, vector> to every variable in `wrt`."""
    pairs = [(slope, part) for slope, part in _pairs(slopes, of, vector) if slope.requires_grad]
    if not pairs:
        return  # the loss is linear: no second derivatives
    differentiated, parts = zip(*pairs, strict=True)
    targets = [(own(v), name) for v in wrt for name in own(v).masters]
    gradients = torch.autograd.grad(
        differentiated,
        [v.parameter(name) for v, name in targets],
        parts,
        retain_graph=keep_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    for (v, name), gradient in zip(targets, gradients, strict=True):
        v.add(name, gradient, wrt[v])  # which leaves it as it is: it may be a part of the vector itself


def _gradients(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients that bypass the variables' hooks; zero for inputs that the value does not depend on."""
    return torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"backend.device is {wanted!r}, which this machine cannot use: {error}") from error
    return device


def _bfloat16_slowdown() -> float:
    """How much longer a matrix product takes in bfloat16 than in float32 on the CPU. Takes some milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(3):  # the first one sets things up
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
