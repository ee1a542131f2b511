"""Tiny models, data and runs for every test of the language-model package."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, BertConfig

from bilevel.plain import to_plain
from bilevel.plugins import Plugins, load_plugins
from bilevel.record import Record
from bilevel.run_directory import RunDirectory
from bilevel_llm.data.registered_formats import registered_formats
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.reweighting.problem import LLMReweighting
from bilevel_llm.reweighting.trust import registered_findings
from tests.bilevel_llm.tiny import (
    AVERAGE,
    FAMILIES,
    FINAL,
    NEOX_SIZES,
    WORDS,
    alpaca,
    make_tokenizer,
    sentences,
    write_jsonl,
    write_rows,
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many short runs would draw one at its end, which takes longer than the run."""
    monkeypatch.setattr("bilevel.loggers.plot.draw", lambda history, account: b"a picture")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family -> a saved model of it."""
    made: dict[str, Path] = {}

    def directory(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            torch.manual_seed(0)
            settings = BertConfig(**NEOX_SIZES) if family == "bert" else FAMILIES[family]()  # the former is not causal
            AutoModelForCausalLM.from_config(settings).save_pretrained(made[family])
            make_tokenizer().save_pretrained(made[family])
        return made[family]

    return directory


@pytest.fixture
def copied_model(model_directory: Callable[[str], Path], tmp_path: Path) -> Callable[[], Path]:
    """A model directory that a test may change."""

    def copy() -> Path:
        return Path(shutil.copytree(model_directory("llama"), tmp_path / "base"))

    return copy


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("data")
    return {
        "clean": write_rows(where / "clean.jsonl", sentences(1, 40)),
        "other": write_rows(where / "other.jsonl", sentences(2, 30, [word[::-1] for word in WORDS])),
        "noise": write_rows(where / "noise.jsonl", sentences(3, 24, [chr(c) * 3 for c in range(65, 91)])),
        "target": write_rows(where / "target.jsonl", sentences(4, 30)),
    }


@pytest.fixture
def problem(model_directory: Callable[[str], Path], data: dict[str, str]) -> Callable[..., LLMReweighting]:
    def make(family: str = "llama", **settings: Any) -> LLMReweighting:
        fields: dict[str, Any] = {
            "model": str(model_directory(family)),
            "sources": [Source(name, data[name]) for name in ("clean", "other", "noise")],
            "validation": [ValidationSet(data["target"])],
            "max_length": 64,
            "batch_size": 10,
        }
        return LLMReweighting(**{**fields, **settings})

    return make


@pytest.fixture(scope="session")
def tokenizer_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights are never read."""
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    save_file({"w": np.zeros(1, np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def make_problem(tokenizer_only: Path, tmp_path: Path) -> Callable[..., LLMReweighting]:
    """Sources by name (rows, or files) -> a problem; 40, 20 and 10 rows by default."""

    def make(sources: Mapping[str, Any] | None = None, validation: Any = None, **settings: Any) -> LLMReweighting:
        data = sources or {"web": alpaca("web", 40), "books": alpaca("books", 20), "chat": alpaca("chat", 10)}
        files = {
            name: rows if isinstance(rows, str | Source) else str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
            for name, rows in data.items()
        }
        target = write_jsonl(tmp_path / "target.jsonl", validation or alpaca("target", 3))
        return LLMReweighting(
            str(tokenizer_only), [one if isinstance(one, Source) else Source(name, one) for name, one in files.items()],
            **{"validation": [ValidationSet(str(target))], "max_length": 40, **settings},
        )  # fmt: skip

    return make


@pytest.fixture
def make_run(make_problem: Callable[..., LLMReweighting], tmp_path: Path) -> Callable[..., Path]:
    """A run directory. average, final: the weights it learned."""

    def make(
        sources: Any = None, average: Mapping[str, float] = AVERAGE, final: Mapping[str, float] = FINAL, **settings: Any
    ) -> Path:
        problem = make_problem(sources, **settings)
        directory = RunDirectory(tmp_path / "run")
        recipe = {"problem": {"name": "llm-reweighting", **to_plain(problem)}, "solver": {"name": "not-installed"}}
        directory.create(recipe)
        history = [Record(0, 0.1, average), Record(1, 0.1, final, moved=False)]
        directory.write(problem.artifacts(history, {"seed": 0}))
        return directory.path

    return make


@pytest.fixture
def tuning(model_directory: Callable[[str], Path], data: dict[str, str]) -> Callable[..., FineTuning]:
    def make(family: str = "llama", **settings: Any) -> FineTuning:
        fields: dict[str, Any] = {
            "model": str(model_directory(family)),
            "data": data["clean"],
            "validation": [ValidationSet(data["target"])],
            "max_length": 64,
            "batch_size": 8,
        }
        return FineTuning(**{**fields, **settings})

    return make


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    """The plugins, with that of `third_party` among them, as if pip had installed it."""
    site = tmp_path_factory.mktemp("site-packages")
    facts = site / "third_party-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[bilevel]\nthird_party = tests.bilevel_llm.third_party\n")
    monkeypatch.syspath_prepend(site)
    for cached in (registered_formats, registered_findings):
        cached.cache_clear()
    yield load_plugins()
    for cached in (registered_formats, registered_findings):
        cached.cache_clear()
