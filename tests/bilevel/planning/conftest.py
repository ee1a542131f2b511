"""The command and the recipes with a backend for several GPUs, whether or not the real one is installed."""

from pathlib import Path

import pytest

from bilevel.config import Config, load_config
from bilevel.plugins import Part, Plugins

ROOT = Path(__file__).parents[3]
PLANS = ROOT / "examples" / "plans"
MODELS = ["llama-3-8b", "gemma-2-9b", "qwen2-7b", "qwen2.5-32b", "llama-3-70b"]


@pytest.fixture
def zero_plugins(plugins: Plugins) -> Plugins:
    """What "deepspeed" names in a recipe is the tests' planning backend."""
    plugins.parts["backends"]["deepspeed"] = Part("deepspeed", "tests.bilevel.planning.zero:Zero", "tests")
    return plugins


@pytest.fixture
def recipe(zero_plugins: Plugins, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Name of a shipped model, and changes -> its recipe."""
    monkeypatch.chdir(ROOT)  # recipes name their model from there

    def load(model: str, *changes: str) -> Config:
        return load_config(PLANS / model / "recipe.yaml", zero_plugins, changes=changes)

    return load
