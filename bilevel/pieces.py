"""Tensors in pieces: each file holds a stretch of every tensor, and is a safetensors file that says which.

A process can so write what it holds of a tensor that is spread over many, and read what it needs of one that was spread over
others. The stretches are those of the flattened tensor. They stand in the file's metadata, under "pieces": {tensor: [start,
shape of the whole]}. A piece that is the whole has the shape of the whole in the file, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from bilevel.errors import DamagedError, InputError
from bilevel.sealed import Seal, write_sealed

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Precisions as safetensors names them."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened tensor.

    name: that of the tensor.
    shape: that of the whole tensor.
    start: where in the flattened tensor the values begin.
    values: shape (n,), on any device; none, if the process has nothing of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def write_pieces(file: Path, pieces: Sequence[Piece]) -> Seal:
    """Write a file of pieces. One at a time is copied to the CPU, where it is not there already.

    Raises `OSError`, naming the file, if it cannot be written, and `InputError` for a tensor that safetensors cannot hold.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())  # each begins at a multiple of its width
    header: dict[str, Any] = {
        "__metadata__": {"pieces": json.dumps({piece.name: [piece.start, piece.shape] for piece in pieces})}
    }
    end = 0
    for piece in pieces:
        kind = _NAMES.get(piece.values.dtype)
        if kind is None:
            raise InputError(f"{piece.name} is in {piece.values.dtype}, which a checkpoint cannot hold")
        count = piece.values.numel()
        begin, end = end, end + piece.values.nbytes
        shape = piece.shape if count == math.prod(piece.shape) else (count,)
        header[piece.name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for piece in pieces:
            yield piece.values.detach().cpu().contiguous().view(torch.uint8).numpy().data

    return write_sealed(file, content())


class PieceFile:
    """A file that `write_pieces` has written, mapped into memory: what is not asked for is not read.

    stretches: tensor -> which of its numbers are here.
    shapes: tensor -> the shape of the whole.

    Raises `DamagedError`, naming the file, if it is missing, cut short, or of another form.
    """

    def __init__(self, file: Path) -> None:
        map_file: Callable[[Path, str], Any] = safetensors.safe_open
        try:
            self._open = map_file(file, "pt")
            known: Mapping[str, tuple[int, list[int]]] = json.loads((self._open.metadata() or {})["pieces"])
            counts = {name: math.prod(self._open.get_slice(name).get_shape()) for name in known}
        except Exception as error:
            raise DamagedError(f"{file} cannot be read: {error}") from error
        self.stretches = {name: range(start, start + counts[name]) for name, (start, _) in known.items()}
        self.shapes = {name: tuple(shape) for name, (_, shape) in known.items()}

    def read(self, name: str, places: range) -> Tensor:
        """The numbers at these places of the flattened tensor, as far as they are here. Shape: (n,). A view of the file."""
        here = self.stretches[name]
        values: Tensor = self._open.get_tensor(name).reshape(-1)
        return values[max(places.start - here.start, 0) : max(places.stop - here.start, 0)]
