"""Give memory to modules that were built without any (on the meta device), piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bilevel_backends.sharding.strategy import Layout


def skeleton(module: nn.Module) -> nn.Module:
    """The same module with parameters that have a shape and no memory. Buffers are copied; ties stay ties."""
    shapes = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, shapes)


def stored_weights(module: nn.Module) -> Callable[[str], Tensor] | None:
    """Where a module that was built without memory says that its weights are; None for one that has them.

    Raises `TypeError` for a module without memory that does not say.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return None
    read: Callable[[str], Tensor] | None = getattr(module, "stored_weight", None)
    if read is None:
        raise TypeError(f"{type(module).__name__} has parameters on the meta device and no method stored_weight(name)")
    return read


def weight_source(
    module: nn.Module, device: torch.device, dtype: str | None, like: Layout | None
) -> Callable[[str, nn.Parameter], Tensor]:
    """What to fill a module's parameters with: the weights it has, or says where to read, on a device and in a precision.

    dtype: None keeps that of the weights. like: only make room, in that layout's precision; its values will follow.
    """
    if like is not None:
        kinds = {name: parameter.dtype for name, parameter in like.parameters.items()}
        return lambda name, standing: torch.zeros(standing.shape, dtype=kinds[name], device=device)
    read = stored_weights(module)
    kind = getattr(torch, dtype) if dtype is not None else None
    if read is not None:
        return lambda name, standing: read(name).to(device, kind).contiguous()
    return lambda name, standing: standing.detach().to(device, kind).contiguous()


def fill(module: nn.Module, names: Iterable[str], value: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put real parameters in the place of the named ones, wherever the module uses them.

    value: (name, what stands there now) -> the new values.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((owner, attribute))
    current = dict(module.named_parameters())
    for name in names:
        old = current[name]
        new = nn.Parameter(value(name, old), requires_grad=old.requires_grad)
        for owner, attribute in places[id(old)]:
            setattr(owner, attribute, new)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers alone, in the precision they have: models compute some in float32 (rotary frequencies) and rely on that."""
    for name, buffer in list(module.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer.to(device))
