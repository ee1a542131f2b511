"""One forward and backward pass without any values: what it would hold in memory and compute.

The module's own code runs, operation by operation, on tensors that have shapes and no contents: those of the meta device, or
torch's fake tensors, which say that they are on another. What autograd keeps for the backward pass, what is recomputed, and
which gradients are needed at all is therefore found out rather than derived.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from bilevel.errors import InputError

_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Pass:
    """The memory and operations of one pass, beside parameters, their accumulated gradients and optimizer state.

    kept: bytes that the repeated blocks keep for the backward pass, which are those alive when the last block has run.
    loss_peak: the largest number of bytes alive at a time from when the last repeated block has run forward until it runs
        backward. What exceeds `kept` is the output, the loss and their gradients.
    block_peak: the same in the rest of the pass, with the working memory of the blocks. It is all of the pass if no block
        repeats.
    flops: floating-point operations of matrix products, convolutions and attention; a multiplication and an addition
        are two. What is computed once more under checkpointing counts.
    forward_flops: those before the backward pass begins.
    operations: the operations of torch that are called, each of which takes the CPU some time.
    """

    kept: int
    loss_peak: int
    block_peak: int
    flops: int
    forward_flops: int
    operations: int

    @property
    def peak(self) -> int:
        """The largest number of bytes alive at a time."""
        return max(self.loss_peak, self.block_peak)


def trace_pass(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    trained: frozenset[str],
    repeated: Sequence[str] = (),
    recompute: bool = False,
    second_order: bool = False,
) -> Pass:
    """Run `loss` forward and backward.

    module: without values (on the meta device, or of fake tensors); its parameters count for nothing.
    loss: calls the module.
    trained: names of the parameters that get gradients. As on a backend, such a gradient is handed over as soon as it is
        complete, so that it counts for a moment only.
    repeated: paths of the repeated blocks.
    recompute: recompute these in the backward pass (activation checkpointing).
    second_order: differentiate twice, as `Backend.backward_along` does: the gradients' product with a vector, which is not
        counted, backward once more. Attention is not fused then, as fused kernels have no second derivative.

    Where the module asks a yes-or-no question of its data ("are the positions in order?"), the answer is yes.
    Raises `InputError` if it needs any other value: what it would do cannot be known without one.
    """
    memory = _Memory(module)
    with ExitStack() as stack:
        stack.enter_context(_training(module, trained))
        blocks = [module.get_submodule(path) for path in repeated]
        if recompute:
            for block in blocks:
                stack.enter_context(_recomputed(block))
        if blocks:
            stack.callback(blocks[-1].register_forward_hook(memory.leave_blocks).remove)
        if not second_order:
            stack.enter_context(_FusedAttention())
        stack.enter_context(memory)
        value = loss()
        forward_flops = memory.flops
        kept = memory.live if memory.noted is None else memory.noted
        if second_order:
            _differentiate_twice(value, [p for name, p in module.named_parameters() if name in trained])
        elif value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
    return Pass(kept, memory.loss_peak, memory.block_peak, memory.flops, forward_flops, memory.operations)


def flops_of(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """The floating-point operations of one call of an operation of torch; 0 of what is not counted in `Pass.flops`."""
    packet = operation._overloadpacket
    if packet in _FLOPS:
        return _FLOPS[packet](args[0 if packet is _FUSED_ATTENTION else 1].shape, args[2].shape)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def replace_parameters(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter by a changed one, in place. A parameter that is used in several places stays one.

    `nn.Module.to` cannot do this with fake tensors, and also changes buffers, which backends leave as they are.
    """
    changed: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in changed:
                changed[id(parameter)] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
            setattr(owner, name, changed[id(parameter)])


def _differentiate_twice(value: Tensor, inputs: Sequence[Tensor]) -> None:
    slopes = [s for s in torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True) if s is not None]
    slope = torch.stack([(s * s.detach()).sum() for s in slopes]).sum()
    if slope.requires_grad:  # the loss is not linear
        torch.autograd.grad(slope, inputs, allow_unused=True)


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage from its first appearance to its end, the operations, and their FLOPs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.loss_peak = self.block_peak = self.flops = self.operations = 0
        self.noted: int | None = None
        self._in_blocks = True
        self._seen = {_storage_key(t) for t in [*module.parameters(), *module.buffers()]}

    def leave_blocks(self, block: nn.Module, inputs: Any, output: Any) -> None:
        """The last block has run: record how many bytes are alive, and notice when the backward pass comes back to it."""
        self.noted, self._in_blocks = self.live, False
        self._reach(self.live)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._return_to_blocks)  # type: ignore[no-untyped-call]

    def _return_to_blocks(self, gradient: Tensor) -> None:
        self._in_blocks = True
        self._reach(self.live)

    def _reach(self, live: int) -> None:
        if self._in_blocks:
            self.block_peak = max(self.block_peak, live)
        else:
            self.loss_peak = max(self.loss_peak, live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_empty(args[0]):
            if args[0].dtype == torch.bool:
                return True
            raise InputError("it decides by the values of its tensors, so it cannot be planned without them")
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.flops += flops_of(func, args, kwargs or {}, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key in self._seen:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self._reach(self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel does it, on the CPU as on a GPU: without the matrix of all scores.

    On the meta device torch would take the plain formula, whose memory is that of no device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not _is_empty(args[0]):
            return func(*args, **kwargs)
        return _fused_attention(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # as the real function does
    out: Tensor = _FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def _attention_flops(query: torch.Size, key: torch.Size) -> int:
    """The scores and their product with the values: 2 products. Shapes: (..., heads, length, head size)."""
    return 4 * prod(query) * key[-2]


def _attention_backward_flops(query: torch.Size, key: torch.Size) -> int:
    """The scores once more, and the gradients of values, probabilities, queries and keys: 5 products."""
    return 10 * prod(query) * key[-2]


_FLOPS = {_FUSED_ATTENTION: _attention_flops, _FUSED_ATTENTION_BACKWARD: _attention_backward_flops}


@contextmanager
def _training(module: nn.Module, trained: frozenset[str]) -> Iterator[None]:
    """Within this context only these parameters get gradients, and none keeps its gradient."""
    hooks = []
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                hooks.append(parameter.register_post_accumulate_grad_hook(_drop))  # type: ignore[no-untyped-call]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted[name])


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    """Within this context the block keeps only its input and runs once more in the backward pass."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _FusedAttention():  # Tensor.backward, which will run this again, suspends the outer mode
            return type(block).forward(block, *args, **kwargs)

    block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        del block.forward


def _is_empty(tensor: Tensor) -> bool:
    """Whether it has a shape and no contents."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
