"""Recipes of comparisons on the tiny models and data of the reweighting tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bilevel.cli import app
from tests.bilevel_llm.tiny import sentences, write_rows


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison writes many small files, and a test need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="session")
def test_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows like those of `clean` and `target`, most of them in neither."""
    return write_rows(tmp_path_factory.mktemp("test") / "test.jsonl", sentences(5, 30))


@pytest.fixture
def recipe(
    model_directory: Callable[[str], Path], data: dict[str, str], test_file: str, tmp_path: Path
) -> Callable[..., Path]:
    """Write a recipe; its output is tmp_path/out. Settings are those of the section `compare`."""

    def make(**compare: Any) -> Path:
        tree = {
            "problem": {
                "name": "llm-reweighting", "model": str(model_directory("llama")), "max_length": 64, "batch_size": 9,
                "sources": [{"name": name, "path": data[name]} for name in ("clean", "other", "noise")],
                "validation": [{"path": data["target"]}],
            },
            "solver": {"name": "scalebio", "penalty": 10, "lr_x": 0.1, "lr_z": 1e-3, "warmup": 1},
            "backend": {"name": "torch", "device": "cpu"},
            "run": {"steps": 4, "output": str(tmp_path / "out")},
            "compare": {
                "methods": ["uniform", {"name": "clean", "weights": {"clean": 1, "other": 0, "noise": 0}}],
                "seeds": [0], "rows": 40, "finetune": {"lr": 1e-2, "batch_size": 8},
                "test": [{"name": "target", "path": test_file}], **compare,
            },
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "recipe.yaml"

    return make


def bilevel(*words: Any) -> str:
    """Run a command; raises what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
