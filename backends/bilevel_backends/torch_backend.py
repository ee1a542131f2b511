"""The `torch` backend: one process, one device (CPU, one CUDA GPU, Apple MPS)."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bilevel.backend import Backend, Evaluation, Placement, Variable, Vector
from bilevel.blocks import REST, Blocks
from bilevel.data import Stream, generator
from bilevel.errors import InputError, NonFiniteError
from bilevel.files import write_atomic
from bilevel.optimizer import SGD, AdamW
from bilevel.problem import Loss, Shard
from bilevel_backends.rounding import round_stochastically

B = TypeVar("B")


class TorchVariable(Variable):
    """A module on one device.

    Gradients are summed over micro-batches in `gradients`, in the precision of the masters, by a hook on every active
    parameter. A low-precision variable has float32 masters of its active parameters, which the optimizer updates; in
    full precision the master is the parameter itself.
    """

    def __init__(self, name: str, module: nn.Module, optimizer: SGD | AdamW, blocks: Blocks) -> None:
        self.name = name
        self.module = module
        self.settings = optimizer
        self.blocks = blocks
        self.active: frozenset[str] = frozenset()
        self.weight = 0.0  # of the running backward: gradient = sum of weight * gradient of the loss
        self.steps = 0  # counter of the rounding noise
        self.masters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._parameters = dict(module.named_parameters())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        module.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.module(*args, **kwargs)

    def parameter(self, name: str) -> nn.Parameter:
        """The module's parameter of that name."""
        return self._parameters[name]

    def activate(self, blocks: frozenset[str]) -> None:
        """See `Backend.activate`."""
        if blocks == self.active:
            return
        names = self.blocks.parameters(blocks)
        kept = set(names) & self.masters.keys()
        old_masters, old_optimizer = self.masters, self.optimizer
        self.masters = {name: old_masters[name] if name in kept else self._master(name) for name in names}
        self.gradients = {name: gradient for name, gradient in self.gradients.items() if name in kept}
        self.optimizer = self._build_optimizer(list(self.masters.values())) if names else None
        if self.optimizer is not None:
            for name, master in self.masters.items():
                if name in kept and old_optimizer is not None and master in old_optimizer.state:
                    self.optimizer.state[master] = old_optimizer.state[master]
                elif isinstance(self.settings, SGD) and self.settings.momentum:
                    # torch's fused kernel cannot mix parameters that have a momentum with ones that have none yet
                    self.optimizer.state[master] = {"momentum_buffer": torch.zeros_like(master)}
        self.active = blocks
        for hook in self._hooks:
            hook.remove()
        self._hooks = [self._accumulate_on(name) for name in names]

    @contextmanager
    def receiving(self, weight: float) -> Iterator[None]:
        """Within: backward passes add weight * gradient to this variable's active parameters."""
        if not self.active:
            raise RuntimeError(f"no block of variable {self.name!r} is active; call backend.activate first")
        self.weight = weight
        self._require_gradients(True)
        try:
            yield
        finally:
            self._require_gradients(False)

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add weight * gradient of the named active parameter. The tensor may be taken over."""
        if name in self.gradients:
            self.gradients[name].add_(gradient, alpha=self.weight)
        else:
            self.gradients[name] = gradient.to(self.masters[name].dtype).mul_(self.weight)

    def checked_norm(self) -> float:
        """Norm of the gradient of all active parameters. Raises `NonFiniteError` if it is not finite."""
        norm = float(torch.nn.utils.get_total_norm(list(self.gradients.values())))
        if norm == norm and norm != float("inf"):
            return norm
        for name, gradient in self.gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(f"the gradient of variable {self.name!r} is not finite, first in {name!r}")
        raise NonFiniteError(f"the norm of the gradient of variable {self.name!r} overflows")

    def state(self) -> dict[str, Tensor]:
        """All that must be saved, flat: weights, masters, and the optimizer's tensors by parameter name."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, master in self.masters.items():
            if master is not self.parameter(name):
                tensors[f"master/{name}"] = master
            if self.optimizer is not None:
                for key, value in self.optimizer.state.get(master, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{name}/{key}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` of a variable with the same active blocks gave."""
        with torch.no_grad():
            for name, tensor in self.module.state_dict().items():
                tensor.copy_(tensors[f"weights/{name}"])
            for name, master in self.masters.items():
                if master is not self.parameter(name):
                    master.copy_(tensors[f"master/{name}"])
                if self.optimizer is None:
                    continue
                prefix = f"optimizer/{name}/"
                saved = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
                if saved:
                    # AdamW keeps its step count on the CPU unless it is fused; the moments stand where the master does
                    fused = bool(self.optimizer.param_groups[0].get("fused"))
                    self.optimizer.state[master] = {
                        key: value.to(master.device if fused or value.dim() else "cpu", copy=True)
                        for key, value in saved.items()
                    }
                else:
                    self.optimizer.state.pop(master, None)
        self.gradients = {}

    def _master(self, name: str) -> Tensor:
        parameter = self.parameter(name)
        return parameter if parameter.dtype != torch.bfloat16 else parameter.detach().float()

    def _build_optimizer(self, masters: list[Tensor]) -> torch.optim.Optimizer:
        s = self.settings
        fused = all(m.is_floating_point() and m.device.type in ("cpu", "cuda", "mps") for m in masters)
        if isinstance(s, AdamW):
            return torch.optim.AdamW(masters, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=fused)
        return torch.optim.SGD(masters, momentum=s.momentum, weight_decay=s.weight_decay, fused=fused)

    def _require_gradients(self, required: bool) -> None:
        for name in self.masters:
            self.parameter(name).requires_grad_(required)

    def _accumulate_on(self, name: str) -> torch.utils.hooks.RemovableHandle:
        def accumulate(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            self.accumulate(name, gradient)

        parameter = self.parameter(name)
        parameter.requires_grad_(True)
        handle: torch.utils.hooks.RemovableHandle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            accumulate
        )
        parameter.requires_grad_(False)
        return handle


@dataclass
class TorchBackend(Backend):
    """One process, one device.

    dtype: of the lower variables. In bfloat16 the active parameters have float32 masters, and are written back with
        stochastic rounding, so that small steps are not lost. None keeps what the problem builds. Upper variables keep
        their own precision.
    device: "auto" takes CUDA, else MPS, else the CPU.
    micro_batch_size: samples of one forward and backward; the result does not depend on it. None: the whole batch.
    activation_checkpointing: recompute each repeated block in the backward pass: less memory, one more forward pass.
    compile: torch.compile the lower modules. Not covered by the tests yet.
    deterministic: use deterministic kernels only, where torch has a choice.
    """

    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    device: str = "auto"
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, not {self.micro_batch_size}")
        self._seed = 0
        self._device = torch.device("cpu")
        self._variables: list[TorchVariable] = []
        self._was_deterministic = (False, True)

    def start(self, seed: int) -> None:
        """Choose the device. Raises `InputError` if it is not there."""
        self._seed = seed
        self._device = _pick_device(self.device)
        self._variables = []
        self.processed = 0
        self._was_deterministic = (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )
        if self.deterministic:
            if self._device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in this mode
            torch.use_deterministic_algorithms(True)
            # the mode would also fill every new tensor with NaN, which takes time; nothing here reads one unwritten
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @property
    def shard(self) -> Shard:
        """The whole batch, in micro-batches."""
        return Shard(seed=self._seed, micro_batch_size=self.micro_batch_size)

    def placement(self, world_size: int) -> Placement:
        """All on one device. Raises `InputError` for more than one process."""
        if world_size != 1:
            raise InputError(f"the torch backend uses one device, not {world_size}; set backend.name=deepspeed for several")
        return Placement(
            "torch",
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
        )

    def place(
        self,
        name: str,
        build: Callable[[], nn.Module],
        optimizer: SGD | AdamW,
        *,
        sharded: bool,
        blocks: Callable[[nn.Module], Blocks] | None = None,
    ) -> TorchVariable:
        """Build the module on the device, in the backend's precision if it is sharded."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(self._seed, Stream.INIT).integers(2**63)))
            module = build()
        if self._device.type == "mps":
            module.float()  # it has no float64
        if sharded and self.dtype is not None:
            module.to(getattr(torch, self.dtype))
        module.to(self._device)
        grouping = blocks(module) if blocks is not None else _one_block(module)
        if sharded:
            self._dress(module, grouping)
        variable = TorchVariable(name, module, optimizer, grouping)
        if not sharded:
            variable.activate(grouping.names)
        self._variables.append(variable)
        return variable

    def replicate(self, source: Variable, name: str, optimizer: SGD | AdamW | None = None) -> TorchVariable:
        """Copy the module; the replica has no active block yet."""
        source = _own(source)
        module = copy.deepcopy(source.module)
        self._dress(module, source.blocks)
        variable = TorchVariable(name, module, optimizer or source.settings, source.blocks)
        self._variables.append(variable)
        return variable

    def assign(self, target: Variable, source: Variable) -> None:
        """Copy weights, masters, moments and the rounding counter."""
        target, source = _own(target), _own(source)
        if target.active != source.active:
            raise ValueError(f"variables {target.name!r} and {source.name!r} have different active blocks")
        target.restore(source.state())
        target.steps = source.steps

    def activate(self, variable: Variable, blocks: frozenset[str]) -> None:
        """Freeze and free what leaves, make masters for what enters."""
        _own(variable).activate(blocks)

    def backward(self, loss: Callable[[B], Loss], batch: Sequence[B], *, wrt: Mapping[Variable, float]) -> Evaluation:
        """Forward and backward, micro-batch by micro-batch."""
        variables = [_own(variable) for variable in wrt]
        with _all(variable.receiving(wrt[variable]) for variable in variables):
            return self._run(loss, batch, backward=True)

    def evaluate(self, loss: Callable[[B], Loss], batch: Sequence[B]) -> Evaluation:
        """Forward only."""
        with torch.no_grad():
            return self._run(loss, batch, backward=False)

    def step(self, variable: Variable, *, lr: float) -> float:
        """Check, clip, update, write back, clear."""
        v = _own(variable)
        if not v.gradients:
            raise RuntimeError(f"variable {v.name!r} has no gradient to step with; name it in the wrt of a backward")
        assert v.optimizer is not None
        norm = v.checked_norm()
        if v.settings.clip is not None and norm > v.settings.clip:
            torch._foreach_mul_(list(v.gradients.values()), v.settings.clip / norm)
        for name, gradient in v.gradients.items():
            v.masters[name].grad = gradient
        v.optimizer.param_groups[0]["lr"] = lr
        v.optimizer.step()
        v.optimizer.zero_grad(set_to_none=True)
        v.gradients = {}
        self._write_back(v)
        v.steps += 1
        return norm

    def take_gradient(self, variable: Variable) -> Vector:
        """Hand over the accumulated gradient."""
        v = _own(variable)
        taken, v.gradients = v.gradients, {}
        return Vector({name: taken.get(name, torch.zeros_like(master)) for name, master in v.masters.items()}, whole=True)

    def add_gradient(self, variable: Variable, vector: Vector, weight: float = 1.0) -> None:
        """Accumulate copies: the vector stays as it is."""
        v = _own(variable)
        v.weight = weight
        for name in v.masters:
            v.accumulate(name, vector.parts[name].clone())

    def read(self, variable: Variable) -> Vector:
        """Copies of the masters."""
        return Vector({name: m.detach().clone() for name, m in _own(variable).masters.items()}, whole=True)

    def write(self, variable: Variable, vector: Vector) -> None:
        """Into the masters, and from there into low-precision parameters."""
        v = _own(variable)
        with torch.no_grad():
            for name, master in v.masters.items():
                master.copy_(vector.parts[name])
        self._write_back(v)

    def dot(self, v: Vector, w: Vector) -> float:
        """In float64."""
        return sum(float((part.double() * w.parts[name].double()).sum()) for name, part in v.parts.items())

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
        """Differentiate twice, micro-batch by micro-batch. Fused attention cannot be: it is computed the plain way."""
        along, variables = _own(variable), [_own(v) for v in wrt]
        directions = {name: vector.parts[name].to(along.parameter(name).dtype) for name in along.masters}
        total = 0.0
        with sdpa_kernel(SDPBackend.MATH), _all(v.receiving(0.0) for v in {along, *variables}):
            for micro_batch in batch:
                result = loss(to_device(micro_batch, self._device))
                value = result[0] if isinstance(result, tuple) else result
                slopes = _gradients(value, [along.parameter(name) for name in directions], create_graph=True)
                slope = torch.stack([(s * d).sum() for s, d in zip(slopes, directions.values(), strict=True)]).sum()
                total += float(slope.detach())
                self.processed += size if isinstance(size := getattr(micro_batch, "size", 0), int) else 0
                if not slope.requires_grad:
                    continue  # the loss is linear: no second derivatives
                targets = [(v, name) for v in variables for name in v.masters]
                for (v, name), gradient in zip(
                    targets, _gradients(slope, [v.parameter(name) for v, name in targets]), strict=True
                ):
                    v.weight = wrt[v]
                    v.accumulate(name, gradient)
        return total

    def weights(self, variable: Variable) -> dict[str, Tensor]:
        """Copies on the CPU."""
        state = _own(variable).module.state_dict()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def optimizer_bytes(self, variable: Variable) -> int:
        """Masters that are not the parameters themselves, moments, and gradients waiting for a step."""
        v = _own(variable)
        extra = [tensor for key, tensor in v.state().items() if not key.startswith("weights/")]
        return sum(tensor.nbytes for tensor in [*extra, *v.gradients.values()])

    def checkpoint_bytes(self, variables: Sequence[Variable]) -> int:
        """Weights, masters and two moments of what is active now."""
        total = 0
        for v in map(_own, variables):
            total += sum(tensor.nbytes for tensor in v.module.state_dict().values())
            total += sum(3 * 4 * master.numel() for master in v.masters.values())
        return total

    def save(self, directory: Path, variables: Sequence[Variable]) -> None:
        """One safetensors file a variable, and `variables.json`."""
        facts = {}
        for v in map(_own, variables):
            # a copy each: tied weights share memory, which safetensors refuses
            tensors = {key: tensor.detach().contiguous().clone() for key, tensor in v.state().items()}
            save_file(tensors, directory / f"{v.name}.safetensors")
            facts[v.name] = {"active": sorted(v.active), "steps": v.steps}
        write_atomic(directory / "variables.json", json.dumps(facts, indent=1))

    def load(self, directory: Path, variables: Sequence[Variable]) -> None:
        """Read what `save` wrote."""
        try:
            facts = json.loads((directory / "variables.json").read_text())
            saved = {v.name: load_file(directory / f"{v.name}.safetensors") for v in variables}
        except Exception as error:
            raise InputError(f"the checkpoint {directory} cannot be read: {error}") from error
        for v in map(_own, variables):
            if v.name not in facts:
                raise InputError(f"the checkpoint {directory} has no variable {v.name!r}")
            v.activate(frozenset(facts[v.name]["active"]))
            expected = {key: t.shape for key, t in v.state().items() if not key.startswith("optimizer/")}
            found = {key: t.shape for key, t in saved[v.name].items() if not key.startswith("optimizer/")}
            if expected != found:
                odd = sorted({k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)})[0]
                raise InputError(
                    f"the checkpoint {directory} belongs to another model or precision: {v.name}/{odd} is "
                    f"{found.get(odd, 'missing')} there and {expected.get(odd, 'missing')} here"
                )
            v.restore(saved[v.name])
            v.steps = int(facts[v.name]["steps"])

    def close(self) -> None:
        """Restore torch's global settings."""
        algorithms, fill = self._was_deterministic
        torch.use_deterministic_algorithms(algorithms)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        self._variables = []

    def _run(self, loss: Callable[[B], Loss], batch: Sequence[B], *, backward: bool) -> Evaluation:
        values: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for micro_batch in batch:
            result = loss(to_device(micro_batch, self._device))
            value, named = result if isinstance(result, tuple) else (result, {})
            if backward:
                if value.requires_grad:  # not where f ignores x, say, and only x is asked for
                    value.backward()  # type: ignore[no-untyped-call]
                self.processed += size if isinstance(size := getattr(micro_batch, "size", 0), int) else 0
            values.append(value.detach().double())
            for key, part in named.items():
                parts[key] = parts.get(key, 0) + part.detach().double()
        total = float(torch.stack(values).sum())
        if total != total or abs(total) == float("inf"):
            self._drop_gradients()
            raise NonFiniteError(f"the loss is {total}")
        return Evaluation(total, {key: float(part) for key, part in parts.items()})

    def _drop_gradients(self) -> None:
        for variable in self._variables:
            variable.gradients = {}

    def _write_back(self, v: TorchVariable) -> None:
        """Masters to low-precision parameters; every replica's noise of the same step is the same."""
        low = [name for name, master in v.masters.items() if master is not v.parameter(name)]
        if not low:
            return
        noise = torch.Generator(self._device)
        noise.manual_seed(int(generator(self._seed, Stream.NOISE, v.steps).integers(2**63)))
        with torch.no_grad():
            for name in low:
                v.parameter(name).copy_(round_stochastically(v.masters[name], noise))

    def _dress(self, module: nn.Module, blocks: Blocks) -> None:
        """Checkpointing and compilation, which wrap what a module does and leave its parameters alone."""
        for path in blocks.repeated if self.activation_checkpointing else ():
            block = module.get_submodule(path)
            block.forward = partial(_recompute, type(block).forward, block)
        if self.compile:
            module.compile()


def _recompute(forward: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)


def _gradients(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients outside the variables' hooks; zero for what the value does not depend on."""
    return torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _own(variable: Variable) -> TorchVariable:
    if not isinstance(variable, TorchVariable):
        raise TypeError(f"variable {variable.name!r} was placed by another backend")
    return variable


def _one_block(module: nn.Module) -> Blocks:
    return Blocks({REST: tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)})


@contextmanager
def _all(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"backend.device is {wanted!r}, which this machine cannot use: {error}") from error
    return device


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch (tensor, tuple, list, mapping or dataclass of them) with every tensor on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
