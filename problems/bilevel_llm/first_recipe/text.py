"""A recipe as text, with a comment at every setting that was measured or is worth knowing."""

from __future__ import annotations

import json
import re
from textwrap import wrap
from typing import Any

from bilevel.answer import in_words
from bilevel_llm.first_recipe.measured import Measured
from bilevel_llm.first_recipe.step_size import STEPS

WIDTH = 100

_PLAIN = re.compile(r"[A-Za-z_./*][\w./*-]*(?:[+-]\w+)*")
_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "inf", "nan")


def recipe_text(found: Measured, *, schema: str | None = None) -> str:
    """The text of the recipe file.

    schema: the path or address of the JSON schema, for editors that look it up.
    """
    problem, solver, backend, active, run = (found.tree[name] for name in ("problem", "solver", "backend", "active", "run"))
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += [
        "# How much weight does each source deserve, if a model is to do well on the target? Written by `bilevel init`.",
        *_expectations(found),
        "problem:",
        "  name: llm-reweighting",
        f"  model: {_scalar(problem['model'])}",
        "  sources:",
        *(f"    - {_flow(source)}  # {found.rows[source['name']]:,} rows" for source in problem["sources"]),
        f"  validation:  # what the weights serve: {found.rows['target']:,} rows",
        *(f"    - {_flow(target)}" for target in problem["validation"]),
        f"  max_length: {problem['max_length']}  # {_lengths(found)}",
        f"  batch_size: {problem['batch_size']}  # rows of a step, shared equally by {_count(problem['sources'], 'source')}",
    ]
    if "validation_batch_size" in problem:
        lines.append(f"  validation_batch_size: {problem['validation_batch_size']}  # as many as a fold of its rows has")
    if "template" in problem:
        lines.append(f"  template: {_scalar(problem['template'])}")
    lines += [
        "solver:",
        "  name: rounds  # the only one whose weights come with intervals",
        f"  horizon: {solver['horizon']}  # the steps of training that the mix is to be the best one for",
        f"  penalty: {solver['penalty']}",
        "  # the step size of y and z, with which the model would be fine-tuned",
        *(f"  # {line}" for line in _step_size(found)),
        f"  lr_z: {solver['lr_z']:g}",
    ]
    if "folds" in solver:
        lines.append(f"  folds: {solver['folds']}  # as many as the smallest data set has rows")
    lines += [
        f"backend: {_flow(backend)}",
        f"active: {_flow(active)}  # {_active(active)}",
        "run:",
        "  steps: auto  # until the verdict is to use the weights,",
        f"  at_most: {run['at_most']}  # or this many steps",
        f"  output: {_scalar(run['output'])}",
        f"  checkpoint_every: {run['checkpoint_every']}",
    ]
    return "\n".join(lines) + "\n"


def _expectations(found: Measured) -> list[str]:
    expected = found.expected
    if expected is None:
        return ["# Nothing was probed: `bilevel run --dry-run` says what this takes, and lr_z is a default."]
    eight = 8 * found.tree["solver"]["horizon"]
    lines = []
    if expected.seconds is not None:
        lines.append(
            f"# Expected here: about {in_words(eight * expected.seconds)} for the 8 rounds that are usually enough, and "
            f"{in_words(expected.steps * expected.seconds)} at the most"
        )
    if expected.memory is not None:
        lines.append(f"# ({expected.seconds or 0:.2g} s a step), with {expected.memory:.1f} GB of {expected.device}.")
    return lines


def _lengths(found: Measured) -> str:
    if found.whole == 1:
        return f"no row is longer; the longest has {found.longest} tokens"
    return f"{found.whole:.0%} of the rows are no longer, and the others are cut; the longest has {found.longest} tokens"


def _step_size(found: Measured) -> list[str]:
    size = found.step_size
    if size is None:
        return []
    tried = wrap(f"change of the training loss in {STEPS} steps: {size.in_words()}", WIDTH)
    if not size.falls:
        return [*tried, "No step size that was tried lowers the loss: look at the data, and at the model."]
    return [*tried, "Taken is the one below that with the largest fall: what is best for a few steps is too large for many."]


def _active(active: dict[str, Any]) -> str:
    return "the whole model trains" if active["name"] == "all" else "two random layers train at a time, drawn anew"


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


def _scalar(value: Any) -> str:
    """A value as YAML, in quotes where it needs them: JSON is YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value[0] != "*" and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
