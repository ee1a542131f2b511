"""The tensors in a model directory's safetensors files, which are mapped, so that only what is asked for is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the precisions that weights may have."""


class StoredWeights:
    """What transformers would read: `model.safetensors` if there is one, or else the shards that the index names.

    Other files, such as a second copy of the weights in another layout, are left alone.

    Raises `InputError` naming the file and the tensor if a file is missing or damaged, or does not hold what the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Any] = {}
        index = None if (path / WHOLE).exists() else _read_index(path / INDEX)
        for file in sorted({WHOLE} if index is None else set(index.values())):
            mapped = _map(path / file)
            self._where |= {name: mapped for name in mapped.keys() if index is None or index.get(name) == file}  # noqa: SIM118
        lost = next((name for name in index or () if name not in self._where), None)
        if index and lost is not None:
            raise InputError(
                f"{path / index[lost]} lacks the tensor {lost}, which {INDEX} says is there; copy the file anew"
            )

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor of that name; None if there is none."""
        return tuple(self._where[name].get_slice(name).get_shape()) if name in self._where else None

    def kind(self, name: str) -> str:
        """The tensor's type of numbers, as safetensors calls it."""
        return str(self._where[name].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def precision(self) -> torch.dtype:
        """The precision of most weights; float32 if none has one that weights may have."""
        sizes: Counter[torch.dtype] = Counter()
        for name in self._where:
            if (kind := PRECISIONS.get(self.kind(name))) is not None:
                sizes[kind] += torch.Size(self.shape(name) or ()).numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def require_numbers(self, parameters: Iterable[str]) -> None:
        """Raise `InputError` if one of these is stored in a type of numbers that cannot be trained."""
        for name in parameters:
            if name in self._where and self.kind(name) not in PRECISIONS:
                raise InputError(
                    f"the model in {self.path} is quantized: {name} is stored as {self.kind(name)}, which cannot be "
                    "trained; give a model in float32, bfloat16 or float16"
                )

    def require_same(self, names: Iterable[str]) -> None:
        """Raise `InputError` unless all of these that are stored are equal: the model has one tensor for them."""
        first, *others = [name for name in names if name in self._where] or [""]
        for other in others:
            if not torch.equal(self.read(first), self.read(other)):
                raise InputError(
                    f"config.json and the files in {self.path} disagree: {first} and {other} are tied "
                    "(tie_word_embeddings), but they are stored with different values; set tie_word_embeddings to false, or "
                    "remove the one that is not used"
                )


def has_weights(path: Path) -> bool:
    """Whether the directory has weights that can be read."""
    return (path / WHOLE).is_file() or (path / INDEX).is_file()


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = json.loads(file.read_text())["weight_map"]
        if isinstance(index, dict) and index and all(Path(str(name)).name == name for name in index.values()):
            return index
        problem = "weight_map must name a file beside it for every tensor"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = str(error)
    raise InputError(f"{file} cannot be read: {problem}")


def _map(file: Path) -> Any:
    import safetensors

    open_file: Callable[[Path, str], Any] = safetensors.safe_open
    try:
        return open_file(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        if not file.exists():
            raise InputError(f"the model in {file.parent} is incomplete: its file {file.name} is missing") from error
        raise InputError(f"the weights in {file} cannot be read: {error}; copy the file anew") from error
