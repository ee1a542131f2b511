"""Scores and answers of a model on each of several backends, of every process: started by test_placed_model.py."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilevel import Backend
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.tokens import tokenize
from bilevel_llm.evaluation.generation import make_questions
from bilevel_llm.evaluation.placed_model import placed
from bilevel_llm.model.files import find_model

SPLIT: dict[str, Backend] = {
    "fsdp": FSDPBackend(activation_checkpointing=True),
    "zero-3": DeepSpeedBackend(zero_stage=3),
    "zero-2": DeepSpeedBackend(zero_stage=2),
}
WHOLE: dict[str, Backend] = {"torch": TorchBackend(device="cpu", compile=True)}


def found(backend: Backend, model: str, data: str) -> tuple[int, dict[str, Any]]:
    """This process's number, and its part of the scores and answers."""
    files = find_model(model)
    tokenizer = files.load_tokenizer()
    table = tokenize(DataFiles([data]), tokenizer, max_length=64)
    rows = [Row((Turn("user", "?" * n), Turn("assistant", "#### 1")), f"row {n}") for n in (1, 9, 4, 2, 7)]
    questions = make_questions(rows, tokenizer, "model")
    backend.start(0)
    with placed(files, backend, on_cpu=True, attention=None, trust_remote_code=False) as there:
        scores, answers = there.score(table), there.answers(questions, 6)
    rank = backend.shard.rank
    backend.close()
    return rank, {**{key: value.tolist() for key, value in asdict(scores).items()}, "answers": answers}


if __name__ == "__main__":
    model, data = sys.argv[1:]
    for name, backend in SPLIT.items():
        rank, part = found(backend, model, data)
        Path(f"{name}-{rank}.json").write_text(json.dumps(part))
