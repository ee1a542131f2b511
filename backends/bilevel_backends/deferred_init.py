"""Materialize modules whose initialization was deferred (their parameters are on the meta device), piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from bilevel.errors import InputError
from bilevel_backends.sharding.strategy import ShardingStrategy


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with its parameters on the meta device. Buffers are copied; tied parameters stay tied."""
    shapes = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, shapes)


def stored_weights(module: nn.Module) -> Callable[[str], Tensor] | None:
    """The module's function that reads its weights, if its initialization was deferred; None for a module that has them.

    Raises `TypeError` for a module on the meta device that has no such function.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return None
    read: Callable[[str], Tensor] | None = getattr(module, "stored_weight", None)
    if read is None:
        raise TypeError(f"{type(module).__name__} has parameters on the meta device and no method stored_weight(name)")
    return read


def weight_source(
    module: nn.Module,
    device: torch.device,
    dtype: str | None,
    like: ShardingStrategy | None,
    shared: Collection[str] = (),
) -> Callable[[str, nn.Parameter], Tensor]:
    """A function that gives a module's weights, on a device and in a precision, whether the module has them or reads them.

    dtype: None keeps that of the weights.
    like: allocate zeros in the precision of these parameters; the caller copies their values afterwards.
    shared: of these parameters, give those of `like` themselves.
    """
    if like is not None:
        kinds = {name: parameter.dtype for name, parameter in like.parameters.items()}

        def of_replica(name: str, parameter: nn.Parameter) -> Tensor:
            if name in shared:
                return like.parameters[name]
            return torch.zeros(parameter.shape, dtype=kinds[name], device=device)

        return of_replica
    read = stored_weights(module)
    kind = getattr(torch, dtype) if dtype is not None else None
    if read is not None:
        return lambda name, parameter: read(name).to(device, kind).contiguous()
    return lambda name, parameter: (
        parameter.detach().to(device, kind).contiguous() if parameter.is_floating_point() else there(name, parameter, device)
    )


def there(name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter that holds packed bits, which only its module can move or cast.

    Raises `InputError` if it is not on that device.
    """
    if torch.empty(0, device=device).device != parameter.device:  # "cuda" is the present one
        raise InputError(
            f"{name} is quantized on {parameter.device}, and the backend's device is {device}; set backend.device to "
            f"{parameter.device.type!r}, or do not quantize"
        )
    return parameter


def require_numbers(module: nn.Module, backend: str) -> None:
    """Raise `InputError` if a parameter holds packed bits, which cannot be split."""
    packed = next((name for name, parameter in module.named_parameters() if not parameter.is_floating_point()), None)
    if packed is not None:
        raise InputError(
            f"{packed} is quantized, and {backend} splits parameters, which works with numbers only; do not quantize, or "
            "use a backend that holds parameters whole (torch, or deepspeed with zero_stage 0 to 2)"
        )


def materialize(module: nn.Module, names: Iterable[str], value: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Replace the named parameters by real ones, wherever the module uses them.

    value: (name, the module's parameter of that name so far) -> the values of the new one, or the new one itself.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((owner, attribute))
    current = dict(module.named_parameters())
    for name in names:
        old = current[name]
        found = value(name, old)
        new = found if isinstance(found, nn.Parameter) else nn.Parameter(found, requires_grad=old.requires_grad)
        for owner, attribute in places[id(old)]:
            setattr(owner, attribute, new)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers, in the precision they have: models compute some in float32 (rotary frequencies) and rely on that."""
    for name, buffer in list(module.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer.to(device))
