"""A module with its masters, gradients and optimizer, however its parameters are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.backend import Variable
from bilevel.blocks import Blocks
from bilevel.constraint import Constraint, by_parameter, mapping
from bilevel.errors import NonFiniteError
from bilevel.optimizer import SGD, AdamW
from bilevel_backends.fixed import Fixed, fixed_names
from bilevel_backends.processes import Processes
from bilevel_backends.sharding.bucket import Bucket
from bilevel_backends.sharding.strategy import ShardingStrategy, SummingStrategy, copy_shards

SMALL = 1 << 16
"""The most numbers that wait for the end of a backward pass. A hook that takes each gradient as it arrives, so that they
need not exist side by side, would cost a small variable more time than it saves memory."""
STEPS = "step"
"""What torch calls the number of an optimizer's steps, the one tensor of its state that is not of the parameter's shape."""

MESSAGE = 500_000_000
"""The most numbers that go into one message, unless a single parameter has more: 2 GB in float32. It has all of a block of a
32B model; more would take memory, and save no time."""


class ModuleVariable(Variable):
    """A module on a backend.

    masters: what the optimizer updates, for every active parameter: the shard that this process keeps, in full precision.
        Where the parameter is in full precision itself, and on the same device, the master shares its memory.
    separate: the names of the masters that are tensors beside their parameters.
    gradients: the sum so far of weight * gradient, with the shapes, devices and precision of the masters.
    groups: the active parameters that go into one message: those of a block, in one precision, and not too many. In the
        order in which a backward pass reaches their blocks.
    buckets: the gradients of groups that are not summed over processes yet, whole and in the masters' precision.
    plain: whether a step is gradient descent and nothing else, which needs no optimizer of torch's.
    constraints: by parameter, what the masters are projected onto after each step. Only of x, which is whole.
    fixed: the parameters that never train, which a replica shares with its source.
    marked: the shards, as they were when the variable was marked, of the parameters that have been active since; None if
        it was not marked. On the device of the masters, in the precision of the parameters.
    """

    def __init__(
        self,
        name: str,
        sharding: ShardingStrategy,
        optimizer: SGD | AdamW,
        blocks: Blocks,
        processes: Processes,
        offload: torch.device | None = None,
        fixed: Fixed | None = None,
    ) -> None:
        self.name = name
        self.sharding = sharding
        self._summing = sharding if isinstance(sharding, SummingStrategy) else None
        self.settings = optimizer
        self.plain = isinstance(optimizer, SGD) and not optimizer.momentum and not optimizer.weight_decay
        self.blocks = blocks
        self.processes = processes
        self.offload = offload  # where the masters and moments are kept, if not with the parameters
        self.fixed = fixed or Fixed(fixed_names(sharding.module, blocks))
        self.active: frozenset[str] = frozenset()
        self.weight = 0.0  # of the running backward: gradient = sum of weight * gradient of the loss
        self.steps = 0  # counter of the rounding noise
        self.masters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.groups: list[tuple[str, ...]] = []
        self.buckets: dict[tuple[str, ...], Bucket] = {}
        self.constraints: dict[str, Constraint] = {}
        self.marked: dict[str, Tensor] | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.separate: list[str] = []
        self._group: dict[str, tuple[str, ...]] = {}
        self._unsent: list[tuple[str, ...]] = []  # in the running backward pass
        self._under_way: tuple[Bucket, Callable[[], Tensor]] | None = None
        self._trained: list[nn.Parameter] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        sharding.module.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.sharding.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.sharding.module(*args, **kwargs)

    def parameter(self, name: str) -> nn.Parameter:
        """The module's parameter of that name."""
        return self.sharding.parameters[name]

    def has_master(self, name: str) -> bool:
        """Whether the master of an active parameter is a tensor beside the parameter."""
        return self.offload is not None or self.rounded(name)

    def rounded(self, name: str) -> bool:
        """Whether a parameter holds less than its master."""
        return self.parameter(name).dtype == torch.bfloat16

    def activate(self, blocks: frozenset[str]) -> None:
        """See `Backend.activate`."""
        if blocks == self.active:
            return
        names = self.blocks.parameters(blocks)
        if self.marked is not None:
            self.marked.update({name: self._copy(name) for name in names if name not in self.marked})
        kept = set(names) & self.masters.keys()
        old_masters, old_optimizer = self.masters, self.optimizer
        self.masters = {name: old_masters[name] if name in kept else self._master(name) for name in names}
        self.gradients = {name: gradient for name, gradient in self.gradients.items() if name in kept}
        self.groups = self._grouped(blocks)
        self.buckets = {group: self.buckets[group] for group in self.groups if group in self.buckets}
        self._group = {name: group for group in self.groups for name in group}
        filled = [
            master for master in self.masters.values() if master.numel()
        ]  # a small parameter may end before this shard
        self.optimizer = self._build_optimizer(filled) if filled and not self.plain else None
        self._forget_moments()
        if self.optimizer is not None and old_optimizer is not None:
            for name in kept:
                if (master := self.masters[name]) in old_optimizer.state:
                    self.optimizer.state[master] = old_optimizer.state[master]
        self.active = blocks
        self.separate = [name for name in names if self.has_master(name)]
        self._trained = [self.parameter(name) for name in names]
        self.release()
        small = sum(master.numel() for master in self.masters.values()) <= SMALL
        hooked = self.sharding.hooked and not (small and self.sharding.whole)
        self._hooks = [self._accumulate_on(name) for name in names] if hooked else []

    def release(self) -> None:
        """Take no more gradients. Hooks are reference cycles, which would keep the module in memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def constrain(self, constraint: Constraint | Mapping[str, Constraint]) -> None:
        """See `Backend.constrain`."""
        self.constraints = by_parameter(constraint, {name: self.parameter(name).detach() for name in self.masters})

    def mark(self) -> None:
        """See `Backend.mark`."""
        self.marked = {name: self._copy(name) for name in self.masters}

    def rewind(self) -> None:
        """See `Backend.rewind`."""
        if self.marked is None:
            raise RuntimeError(f"variable {self.name!r} was not marked, so there is nothing to rewind it to")
        with torch.no_grad():
            for name, start in self.marked.items():
                self.sharding.local(name).copy_(start)
            for group in self._grouped(self.blocks.names):
                self.sharding.all_gather([name for name in group if name in self.marked])
            for name, master in self.masters.items():
                if self.has_master(name):
                    master.copy_(self.sharding.local(name))
        self.marked = {name: start for name, start in self.marked.items() if name in self.masters}
        self._forget_moments()
        self.drop_gradients()

    def receive(self, weight: float) -> None:
        """From now on, backward passes add weight * gradient to this variable's active parameters."""
        if not self.active:
            raise RuntimeError(f"no block of variable {self.name!r} is active; call backend.activate first")
        self.weight = weight
        self._unsent = list(self.groups)
        for parameter in self._trained:
            parameter.requires_grad = True

    def stop_receiving(self) -> None:
        """From now on, backward passes pass this variable by."""
        for parameter in self._trained:
            parameter.requires_grad = False

    def collect(self) -> None:
        """Take the gradients of a backward pass, as far as no hook has; called when it is over.

        Where gradients are summed at once, every group is sent, if only to say that this process has none of its gradients.
        """
        for name in () if self._hooks else self.masters:
            parameter = self.parameter(name)
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                self.accumulate(name, gradient)
        if self._summing is not None and not self._summing.reduces_at_step:
            for group in self._unsent:
                self._send(self._summing, group)
            self._finish()
            self._unsent = list(self.groups)

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add weight * gradient of the named active parameter. The tensor may be taken over."""
        if self._summing is None:
            self._add(name, self.sharding.arrived(gradient), self.weight)
            return
        self._bucket(self._summing, self._group[name]).add(name, gradient, self.weight)
        if not self._summing.reduces_at_step:
            # in one order, as processes may get gradients in different ones
            while self._unsent and (bucket := self.buckets.get(self._unsent[0])) is not None and bucket.complete:
                self._send(self._summing, self._unsent.pop(0))

    def add(self, name: str, shard: Tensor, weight: float) -> None:
        """Add weight * (this process's shard of) a gradient that is reduced over processes already, and stays as it is."""
        if name in self.gradients:
            self._add(name, shard, weight)
        else:
            master = self.masters[name]
            self.gradients[name] = weight * shard.to(master.device, master.dtype)

    def reduce_gradients(self) -> None:
        """Sum over processes what was accumulated in all micro-batches and passes, where that is done once."""
        if self._summing is not None and self._summing.reduces_at_step:
            for group in self.groups:
                self._send(self._summing, group)
            self._finish()

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._finish()
        self.gradients, self.buckets = {}, {}

    def checked_norm(self) -> float:
        """Norm of the gradient of all active parameters. Raises `NonFiniteError` if it is not finite."""
        values = list(self.gradients.values())
        if len(values) == 1:
            total = torch.linalg.vector_norm(values[0])
        else:
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
        if not self.sharding.whole:
            total = self.sharding.shards.all_reduce(total.double().square()).sqrt()
        norm = float(total.item())
        if math.isfinite(norm):
            return norm
        odd = [name for name, gradient in self.gradients.items() if not bool(torch.isfinite(gradient).all())]
        first = next((names[0] for names in self.processes.all_gather_object(odd) if names), None)
        if first is None:
            raise NonFiniteError(f"the norm of the gradient of variable {self.name!r} overflows", variable=self.name)
        raise NonFiniteError(f"the gradient of variable {self.name!r} is not finite, first in {first!r}", variable=self.name)

    def step(self, lr: float, clip: float | None) -> float:
        """Update the masters with the gradients, and clear the gradients. Returns the gradient's norm before clipping.

        Under constraints the gradient mapping takes the place of the gradient, and the masters are projected.
        """
        norm = self.checked_norm()
        if self.constraints:
            for name in self.gradients.keys() & self.constraints.keys():
                project = self.constraints[name].project
                self.gradients[name] = mapping(project, self.masters[name], self.gradients[name], lr)
            norm = self.checked_norm()
        if clip is not None and norm > clip:
            torch._foreach_mul_(list(self.gradients.values()), clip / norm)
        if self.plain:
            torch._foreach_add_([self.masters[name] for name in self.gradients], list(self.gradients.values()), alpha=-lr)
        elif self.optimizer is not None:
            for name, gradient in self.gradients.items():
                self.masters[name].grad = gradient if gradient.numel() else None
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for name, constraint in self.constraints.items():
            self.masters[name].copy_(constraint.project(self.masters[name]))
        self.gradients = {}
        return norm

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """The optimizer's tensors for one active parameter."""
        state = {} if self.optimizer is None else self.optimizer.state.get(self.masters[name], {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def restore_optimizer_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Set copies of what `optimizer_state` returned."""
        master = self.masters[name]
        if self.optimizer is None:
            return
        if not state or not master.numel():
            self.optimizer.state.pop(master, None)
            return
        # AdamW keeps its step count on the CPU unless it is fused; the moments are on the master's device
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        self.optimizer.state[master] = {
            key: value.to(master.device if fused or key != STEPS else "cpu", copy=True) for key, value in state.items()
        }

    def copy_from(self, source: ModuleVariable) -> None:
        """Copy weights, masters, moments and counter of a replica that is sharded alike and has the same active blocks."""
        copy_shards(self.sharding, source.sharding, self.fixed.names)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(source.module.get_buffer(name))
            for name, master in self.masters.items():
                if self.has_master(name):
                    master.copy_(source.masters[name])
                self.restore_optimizer_state(name, source.optimizer_state(name))
        self.drop_gradients()
        self.steps = source.steps

    def extra_bytes(self) -> int:
        """Bytes that this process holds beside the weights: masters, moments, gradients."""
        extra = [master for name, master in self.masters.items() if self.has_master(name)]
        moments = [value for name in self.masters for value in self.optimizer_state(name).values()]
        buckets = [bucket.message for bucket in self.buckets.values()]
        return sum(tensor.nbytes for tensor in [*extra, *moments, *self.gradients.values(), *buckets])

    def _add(self, name: str, shard: Tensor, weight: float) -> None:
        master = self.masters[name]
        if name in self.gradients:
            self.gradients[name].add_(shard.to(master.device), alpha=weight)
        else:
            first = shard.to(master.device, master.dtype)
            self.gradients[name] = first if weight == 1 else first.mul_(weight)

    def _bucket(self, sharding: SummingStrategy, group: tuple[str, ...]) -> Bucket:
        if group not in self.buckets:
            self.buckets[group] = sharding.bucket(group, self.masters[group[0]].dtype)
        return self.buckets[group]

    def _send(self, sharding: SummingStrategy, group: tuple[str, ...]) -> None:
        """Begin to sum a group's gradients over processes. One message is under way at a time: each takes memory."""
        bucket = self._bucket(sharding, group)
        self._finish()
        self._under_way = (bucket, sharding.start_sum(bucket))
        del self.buckets[group]

    def _finish(self) -> None:
        """Take this process's shards of what is under way."""
        if self._under_way is not None:
            (bucket, row), self._under_way = self._under_way, None
            for name, shard in bucket.shards(row()):
                self._add(name, shard.view(self.masters[name].shape), 1.0)

    def _grouped(self, blocks: frozenset[str]) -> list[tuple[str, ...]]:
        """The parameters of these blocks as groups."""
        return [group for block in reversed([*self.blocks.members]) if block in blocks for group in self._groups_of(block)]

    def _groups_of(self, block: str) -> Iterator[tuple[str, ...]]:
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name in self.blocks.members[block]:
            by_dtype.setdefault(self.parameter(name).dtype, []).append(name)
        for names in by_dtype.values():
            group: list[str] = []
            size = 0
            for name in names:
                numel = torch.Size(self.sharding.shape(name)).numel()
                if group and size + numel > MESSAGE:
                    yield tuple(group)
                    group, size = [], 0
                group.append(name)
                size += numel
            yield tuple(group)

    def _forget_moments(self) -> None:
        if self.optimizer is None:
            return
        self.optimizer.state.clear()
        if isinstance(self.settings, SGD) and self.settings.momentum:
            # torch's fused kernel cannot mix parameters that have a momentum with ones that have none yet
            for master in self.optimizer.param_groups[0]["params"]:
                self.optimizer.state[master] = {"momentum_buffer": torch.zeros_like(master)}

    def _copy(self, name: str) -> Tensor:
        shard = self.sharding.local(name).detach()
        return shard.to(self.offload or shard.device, copy=True)

    def _master(self, name: str) -> Tensor:
        shard = self.sharding.local(name)
        if not self.has_master(name):
            return shard
        precise = torch.promote_types(shard.dtype, torch.float32)
        return shard.to(self.offload or shard.device, precise, copy=True)

    def _build_optimizer(self, masters: list[Tensor]) -> torch.optim.Optimizer:
        s = self.settings
        fused = all(m.is_floating_point() and m.device.type in ("cpu", "cuda", "mps") for m in masters)
        if isinstance(s, AdamW):
            return torch.optim.AdamW(masters, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=fused)
        return torch.optim.SGD(masters, momentum=s.momentum, weight_decay=s.weight_decay, fused=fused)

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
