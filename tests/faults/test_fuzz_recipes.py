"""Random recipes, changes and weights files: they are used, or refused in words, and a refusal writes nothing."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel import InputError
from bilevel.config import load_config
from bilevel.plugins import Plugins, load_plugins
from bilevel.recipe import Recipe, dump
from bilevel_llm.reweighting.saved_run import fit_weights, read_json

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))

BASE: dict[str, Any] = {
    "problem": {"name": "quadratic"},
    "solver": {"name": "scalebio", "penalty": 10.0, "lr_x": {"name": "cosine", "peak": 0.1, "steps": 9}},
    "backend": {"name": "torch", "device": "cpu"},
    "active": {"name": "lisa", "blocks": 2},
    "run": {"steps": 2, "output": "out"},
}
WORDS = [
    *(
        "problem",
        "solver",
        "backend",
        "active",
        "run",
        "name",
        "penalty",
        "lr_x",
        "optimizer_x",
        "steps",
        "output",
        "blocks",
    ),
    *("quadratic", "scalebio", "torch", "lisa", "all", "cosine", "sgd", "adamw", "auto", "0", "²", "[/x]", "$", "\x1b[31m"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=-(10**400), max_value=10**400), st.floats(), st.text(max_size=8),
    st.sampled_from(WORDS),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=8
)
PATHS = st.lists(KEYS, min_size=1, max_size=4).map(".".join)
YAML_PIECES = st.sampled_from(
    ["a: ", "b", "- ", "\n", "  ", "{", "}", "[", "]", ", ", ": ", "&x ", "*x", "<<: ", "!!int ", "!!timestamp ", "!!set ", "? ",
     "|\n", ">\n", '"', "'", "#", "---\n", "%", "@", "1e400", "2024-13-45", ".nan", "\x00", "\ud800", "\u2028", "9" * 5000]
)  # fmt: skip


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextlib.contextmanager
def refused_in_words(folder: Path) -> Iterator[None]:
    """Anything but an `InputError` passes through and fails the test; nothing may have been written."""
    before = sorted(os.listdir(folder))
    with contextlib.suppress(InputError):
        yield
    assert sorted(os.listdir(folder)) == before


def both(test: Callable[..., None]) -> Any:
    """The same test with a few examples, always the same, and with many (marked `soak`)."""
    return pytest.mark.parametrize("budget", [FEW, pytest.param(MANY, marks=pytest.mark.soak)], ids=["few", "many"])(test)


@both
def test_random_recipes(budget: Any, plugins: Plugins, folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.touch()

    @budget
    @given(st.dictionaries(KEYS, VALUES, max_size=3), PATHS, VALUES)
    def check(extra: dict[str, Any], path: str, value: Any) -> None:
        tree = json.loads(json.dumps(BASE)) | extra
        with refused_in_words(folder):
            recipe = Recipe(tree, {}, "fuzz")
            recipe.put(path, value, "fuzz")
            load_config(recipe, plugins)

    check()


@both
def test_random_texts(budget: Any, plugins: Plugins, folder: Path) -> None:
    file = folder / "text.yaml"
    file.touch()

    @budget
    @given(st.one_of(st.lists(YAML_PIECES, max_size=20).map("".join), st.text(max_size=60)))
    def check(text: str) -> None:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with refused_in_words(folder):
            load_config(file, plugins)

    check()


@both
def test_random_changes(budget: Any, plugins: Plugins, folder: Path) -> None:
    file = folder / "base.yaml"
    file.write_text(dump(BASE))
    value = st.one_of(st.text(max_size=20), st.lists(YAML_PIECES, max_size=8).map("".join), st.sampled_from(WORDS))

    @budget
    @given(PATHS, value)
    def check(path: str, text: str) -> None:
        with refused_in_words(folder):
            load_config(file, plugins, changes=[f"{path}={text}"])

    check()


@both
def test_random_weights(budget: Any, folder: Path) -> None:
    file = folder / "weights.json"
    file.touch()

    @budget
    @given(
        st.one_of(
            st.binary(max_size=40),
            st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES).map(lambda v: json.dumps(v).encode()),
        )
    )
    def check(content: bytes) -> None:
        file.write_bytes(content)
        with refused_in_words(folder):
            weights = fit_weights(read_json(file), ["a", "b"], str(file))
            assert sum(weights.values()) == pytest.approx(1.0)

    check()


@both
def test_what_is_written_is_read_back(budget: Any, folder: Path) -> None:
    file = folder / "written.yaml"
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(allow_nan=False),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    )
    tree = st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
        st.one_of(leaves, st.lists(leaves, max_size=3)),
        max_size=4,
    )

    @budget
    @given(tree)
    def check(content: dict[str, Any]) -> None:
        file.write_text(dump(content), encoding="utf-8")
        assert Recipe.read(file).tree == content

    check()
