"""What is given in memory becomes files of the run, so that the run can be resumed, mixed and moved like any other."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from bilevel.errors import InputError
from bilevel.files import remove, written_whole
from bilevel_llm.api.rows import article, kind_of, rows_writer

Data: TypeAlias = Any
"""Rows: a path, a glob or a list of them; a list of dictionaries; a `datasets.Dataset` or `IterableDataset`; a pandas,
polars or pyarrow table; or the settings of a recipe, `{"path": ..., "format": ...}`, or `{"rows": ..., "format": ...}`."""

MODEL = "model"


class Inputs:
    """The files that a run keeps of what it was given in memory. They have names at once, and are written by `write`.

    directory: where they will be.
    max_rows: how many rows to take of a stream, which may have no end.
    """

    def __init__(self, directory: Path, max_rows: int | None) -> None:
        self._directory = directory
        self._max_rows = max_rows
        self._named: set[str] = set()
        self._unwritten: dict[Path, Callable[[Path], object]] = {}

    def write(self) -> None:
        """Write all files, the model last. What is there already was left by a run that ended before its first step.

        Raises `InputError` for rows that are no rows.
        """
        if self._unwritten:
            self._directory.mkdir(parents=True, exist_ok=True)
        for path, write in sorted(self._unwritten.items(), key=lambda item: item[0].name == MODEL):
            if path.is_dir():
                remove(path)
            with written_whole(path) as part:
                write(part)

    def settings(self, given: Data, argument: str, name: str) -> dict[str, Any]:
        """Data as a recipe says it: `path`, and what else was set. What is in memory will be in a file.

        argument: what the data are called, for messages. name: what the file will be called.

        Raises `InputError`, naming the argument, for what holds no rows.
        """
        if type(given) is dict:  # a DatasetDict is a mapping, too
            if ("path" in given) == ("rows" in given):
                raise InputError(f"{argument}: give either 'path' or 'rows', and beside it settings such as 'format'")
            rest = {key: value for key, value in given.items() if key not in ("path", "rows")}
            return {**self.settings(given.get("path", given.get("rows")), argument, name), **rest}
        if isinstance(given, str | PathLike):
            return {"path": str(given)}
        if isinstance(given, list | tuple) and given and all(isinstance(item, str | PathLike) for item in given):
            return {"path": [str(item) for item in given]}
        return {"path": str(self._file(given, argument, name))}

    def model(self, model: Any, tokenizer: Any) -> str:
        """The name of a model; or the directory in which a loaded one will be, with its tokenizer.

        Raises `InputError` for what is neither, and for a loaded model that cannot be trained from files.
        """
        if isinstance(model, str | PathLike):
            if tokenizer is not None:
                raise InputError("tokenizer belongs to a model that is loaded; a path or a hub id brings its own")
            return str(model)
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            remedy = "merge its adapter (model.merge_and_unload())" if hasattr(model, "merge_and_unload") else "give a path"
            raise InputError(
                f"model is {article(kind_of(model))}; {remedy}: a model is a path, a hub id or a loaded PreTrainedModel"
            )
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            given = "is missing" if tokenizer is None else f"is {article(kind_of(tokenizer))}"
            raise InputError(f"tokenizer {given}; a loaded model needs what AutoTokenizer.from_pretrained returns")
        if getattr(model, "is_quantized", False):
            raise InputError("model is quantized, so that its weights cannot be trained; load it without quantization")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError("model has weights that are not loaded (on the meta device); load them, or give its path")

        def write(part: Path) -> None:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)

        self._unwritten[self._directory / MODEL] = write
        return str(self._directory / MODEL)

    def _file(self, given: Any, argument: str, name: str) -> Path:
        ending, write_rows = rows_writer(given, argument, self._max_rows)
        file = self._directory / f"{self._stem(name)}{ending}"

        def write(part: Path) -> None:
            if not write_rows(part):
                raise InputError(f"{argument} has no rows")

        self._unwritten[file] = write
        return file

    def _stem(self, name: str) -> str:
        """A file name for data of this name, without what a file system or a glob would take for something else."""
        stem = plain = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "data"
        number = 1
        while stem.casefold() in self._named:
            number += 1
            stem = f"{plain}-{number}"
        self._named.add(stem.casefold())
        return stem
