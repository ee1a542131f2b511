"""Handover to lm-evaluation-harness: what to run on the tuned models, for those who have its data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

TASKS = "gsm8k,minerva_math"
"""Grade-school and competition problems. By default, the tasks show 5 and 4 worked examples."""


def command(model: Path | str, output: Path, *, trust_remote_code: bool, device: str) -> str:
    """One command line (lm-eval 0.4; its `run` may be left out).

    model: a directory. Tuned models carry the chat template that they were trained with, even the plain one.
    """
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=auto"]
    words += ["--tasks", TASKS, "--apply_chat_template", "--fewshot_as_multiturn", "true"]
    words += ["--batch_size", "auto" if device.startswith("cuda") else "8", "--device", device]
    words += ["--seed", "0", "--output_path", str(output)]
    if trust_remote_code:
        words.append("--trust_remote_code")
    return shlex.join(words)


def script(models: Mapping[str, Path], results: Path, *, trust_remote_code: bool, device: str) -> str:
    """A shell script with a command for each model, by name."""
    lines = ["#!/bin/sh", "# pip install 'lm_eval[hf]'", "set -e"]
    for name, model in models.items():
        lines.append(command(model.resolve(), results / name, trust_remote_code=trust_remote_code, device=device))
    return "\n".join(lines) + "\n"
