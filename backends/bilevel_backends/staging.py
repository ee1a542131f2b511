"""Copies of tensors in the CPU's memory, which are written to a disk while the originals change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Memory that is kept from one set of copies to the next, and grows to the largest.

    device: of the tensors, most of them. If it is a GPU, the memory is page-locked, so that all copies are under way at the
        full rate of the bus before one of them is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    @property
    def bytes(self) -> int:
        """The size of the memory."""
        return self._memory.nbytes

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors as they are now, on the CPU. The next call overwrites them."""
        widths = sorted({tensor.element_size() for tensor in tensors}, reverse=True)
        places, end = {}, 0
        for width in widths:  # each begins at a multiple of its width
            for i, tensor in enumerate(tensors):
                if tensor.element_size() == width:
                    places[i], end = end, end + tensor.nbytes
        self._reserve(end)
        copies = []
        for i, tensor in enumerate(tensors):
            copy = self._memory[places[i] : places[i] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor.detach(), non_blocking=True))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def free(self) -> None:
        """Give the memory back. Nothing may use the copies any more."""
        if self._locked:
            _runtime().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, size: int) -> None:
        if size <= self._memory.nbytes:
            return
        self.free()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda":
            # torch's own allocator of page-locked memory takes the next power of two, which may be twice as much. Where the
            # system does not let so much be locked, the copies are right as well, and slower.
            self._locked = int(_runtime().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
