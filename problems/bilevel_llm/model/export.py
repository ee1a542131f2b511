"""A run's tuned model as a Hugging Face directory: config, tokenizer with its chat template, generation config, weights."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import InputError
from bilevel.checkpoint import FixedFacts, SavedVariable, damage, saved_variables
from bilevel.checksum import checksum, written
from bilevel.errors import DamagedError, RunError
from bilevel.files import remove_leftovers, written_whole
from bilevel.lock import owned
from bilevel.precision import spelled_out
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import resolved_recipe
from bilevel.trust import remote_code_is_trusted
from bilevel_llm.data.chat import PLAIN_TEMPLATE, Encoder
from bilevel_llm.model.files import BUNDLED, find_model, quiet_transformers
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.lora import LoRA

log = logging.getLogger("bilevel.llm")

PRECISIONS = ("float32", "bfloat16", "float16")


def export_model(
    run: Path,
    directory: Path,
    *,
    variable: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
) -> None:
    """Write the model of a run's checkpoint as a directory that `from_pretrained` reads.

    run: the directory of a `llm-finetuning` or `llm-reweighting` run.
    directory: a path that does not exist yet. It appears when it is complete.
    variable: the lower variable to write. None takes z, which has seen training data alone, or y if there is no z. (The y of
        a reweighting run has been trained on the validation sets as well.)
    step: the step of the checkpoint; None takes the last one.
    dtype: the precision of the weights, one of PRECISIONS; None keeps that of the checkpoint (and float32 for an adapter).
    adapter: for a LoRA run, write the adapter alone (a peft directory) instead of merging it into the weights. Merging is
        done in float32.

    Raises `InputError` for what is not there, or is there already.
    """
    dtype = spelled_out(dtype)
    if dtype is not None and dtype not in PRECISIONS:
        raise InputError(f"--dtype {dtype}: a model is written in {', '.join(PRECISIONS)}")
    check_new(directory)
    settings = _problem_settings(run)
    checkpoint = _checkpoint(run, step)
    variable = _variable(checkpoint, variable)
    lora = LoRA(**settings["lora"]) if settings.get("lora") else None
    if adapter and lora is None:
        raise InputError(f"{run} has not trained an adapter (problem.lora is not set); export it without --adapter")

    asked = f"problem.trust_remote_code in {RunDirectory(run).recipe_file}" if settings.get("trust_remote_code") else None
    remote_code = remote_code_is_trusted(asked_by=asked)
    files = find_model(settings["model"])
    tokenizer = files.load_tokenizer(remote_code)
    tokenizer.chat_template = _chat_template(tokenizer, settings.get("template", "auto"))
    model = files.load_model(trust_remote_code=remote_code)
    stored = _stored_precision(checkpoint, variable)
    exact = torch.promote_types(stored, torch.float32) if lora is not None else stored  # merging adds, so let it be precise
    model.to(exact)
    if lora is not None:
        if lora.quantize is not None:
            log.warning(
                "the base was quantized in training, and is written in full precision here, as the model's files have it"
            )
        model = lora.wrap(model)
        name = settings["model"]
        on_hub = name not in BUNDLED and not Path(name).expanduser().exists()
        model.peft_config["default"].base_model_name_or_path = name if on_hub else str(files.path.absolute())
    _fill(LanguageModel(model), checkpoint, variable)
    if lora is not None and not adapter:
        model = model.merge_and_unload()
    if dtype is not None or not adapter:
        model.to(getattr(torch, dtype) if dtype is not None else stored)
    _write(directory, model, tokenizer, {"save_embedding_layers": False} if adapter else {})  # they are frozen
    log.info("%s of %s, after %d steps, is in %s", variable, run, _steps(checkpoint), directory)


def check_new(directory: Path) -> None:
    """Raise `InputError` if there is something of that name already."""
    if directory.exists():
        raise InputError(f"{directory} already exists and is not overwritten; name a new directory")


def _problem_settings(run: Path) -> Mapping[str, Any]:
    """The settings of the run's problem, from a recipe or from Python."""
    problem = resolved_recipe(run)["problem"]
    settings: Mapping[str, Any] = problem.get("fields", problem)
    if "model" not in settings:
        name = problem.get("name", problem.get("class"))
        raise InputError(f"{run} is a run of {name!r}, which has no language model to export")
    return settings


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of that step, or the newest one that is whole, said aloud if there is a newer one."""
    saved = RunDirectory(run).saved()
    if not saved:
        raise InputError(f"{run} has no checkpoint yet")
    if step is not None and step not in saved:
        raise InputError(f"{run} has no checkpoint after {step} steps; there are: {', '.join(map(str, saved))}")
    reasons: list[str] = []
    for where in [saved[step]] if step is not None else reversed(saved.values()):
        reason = damage(where)
        if reason is None:
            for other in reasons:
                log.warning("%s; exporting %s, the newest checkpoint that is whole", other, where)
            return where
        reasons.append(reason)
    raise DamagedError(f"{reasons[0]}; " + ("no checkpoint is whole" if step is None else "export another step"))


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _variable(checkpoint: Path, wanted: str | None) -> str:
    known = [name for name in saved_variables(checkpoint) if name != "x"]
    if wanted is None:
        return "z" if "z" in known else known[0]
    if wanted not in known:
        raise InputError(f"{checkpoint} has no lower variable {wanted!r}; there are: {', '.join(known)}")
    return wanted


def _stored_precision(checkpoint: Path, variable: str) -> torch.dtype:
    """The precision of most weights: adapters may be more precise than what they adapt."""
    sizes: Counter[torch.dtype] = Counter()
    saved = SavedVariable(checkpoint, variable)
    for _, tensor in saved.weights():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    for facts in saved.facts.fixed.values():
        if (dtype := getattr(torch, facts.dtype)).is_floating_point:  # quantized ones say nothing of the precision
            sizes[dtype] += math.prod(facts.shape)
    return sizes.most_common(1)[0][0]


def _fill(module: nn.Module, checkpoint: Path, variable: str) -> None:
    """Copy the weights into the module. Tied weights are in the checkpoint once, and in the module under several names.

    Those that never train are in the module already, and must be what the run had, in the precision that it had them in.
    """
    places, saved = module.state_dict(), SavedVariable(checkpoint, variable)
    filled: set[int] = set()

    def fill(name: str, shape: Sequence[int], value: Callable[[Tensor], Tensor]) -> None:
        place = places.get(name)
        if place is None or list(place.shape) != list(shape):
            raise InputError(f"{checkpoint} is of a different model from the recipe's: {name} does not fit")
        place.copy_(value(place))
        filled.add(place.data_ptr())

    def as_in_run(name: str, facts: FixedFacts, place: Tensor) -> Tensor:
        rounded = place.to(getattr(torch, facts.dtype))
        if written(int(checksum(rounded.flatten()))) != facts.checksum:
            raise InputError(
                f"the model has changed since {checkpoint} was made: {name} is another; give the one of the run"
            )
        return rounded

    with torch.no_grad():
        for name, tensor in saved.weights():
            fill(name, tensor.shape, lambda _, tensor=tensor: tensor)  # type: ignore[misc]
        for name, facts in saved.facts.fixed.items():
            if getattr(torch, facts.dtype).is_floating_point:
                fill(name, facts.shape, partial(as_in_run, name, facts))
            elif name in places:  # it was quantized
                filled.add(places[name].data_ptr())
    missing = [name for name, place in places.items() if place.data_ptr() not in filled]
    if missing:
        raise InputError(f"{checkpoint} is of a different model from the recipe's: it lacks {missing[0]}")


def _chat_template(tokenizer: Any, template: Any) -> str | None:
    """The template that conversations were written with in training, as Jinja."""
    encoder = Encoder(tokenizer, template)
    if encoder.chat_template is not None:
        return tokenizer.chat_template  # type: ignore[no-any-return]
    bos = "{{ bos_token }}" if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else ""
    roles = "{% elif ".join(f"message['role'] == '{role}' %}}" + _jinja(text) for role, text in PLAIN_TEMPLATE.items())
    response = PLAIN_TEMPLATE["assistant"].partition("{text}")[0]
    return (
        bos + "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{% if " + roles
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + _jinja("\n\n" + response) + "{% endif %}"
    )  # fmt: skip


def _jinja(text: str) -> str:
    """A turn of the plain template. Line ends are written as strings, because Jinja eats them after a tag."""
    fields = {"{text}": "{{ message['content'] }}", "{eos}": "{{ eos_token }}", "\n": "{{ '\\n' }}"}
    for field, expression in fields.items():
        text = text.replace(field, expression)
    return text


def _write(directory: Path, model: Any, tokenizer: Any, how: Mapping[str, Any]) -> None:
    """Write into a hidden directory beside it, which takes its name when everything is there."""
    try:
        with owned(directory, file=True):
            remove_leftovers(directory.parent, directory.name)
            with written_whole(directory) as part:
                part.mkdir()
                with quiet_transformers():
                    model.save_pretrained(part, **how)
                (part / "README.md").unlink(missing_ok=True)  # peft's form to be filled in
                tokenizer.save_pretrained(part)
                for file in part.glob("*.safetensors"):  # safetensors lets nobody but the owner read them
                    file.chmod((part / "tokenizer_config.json").stat().st_mode)
                check_new(directory)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
