"""The documentation says what is: its recipes build, its Python runs, its commands and links exist."""

import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from bilevel.cli import app
from bilevel.config import load_config
from bilevel.plugins import Plugins, load_plugins

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


HOOKS = ROOT / "docs" / "reference-hooks.md"


def code(language: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.name, block) for page in pages for block in fence.findall(page.read_text())]


def recipes() -> list[tuple[str, str]]:
    """Whole recipes; those of the example plugin are run by the packaging check."""
    blocks = [(page, text, yaml.safe_load(text)) for page, text in code("yaml")]
    return [
        (page, text) for page, text, tree in blocks if tree.get("problem", {}).get("name", "calibration") != "calibration"
    ]


@pytest.mark.parametrize(("page", "text"), recipes())
def test_recipes_build(page: str, text: str, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    load_config(tmp_path / "recipe.yaml", plugins)


def test_the_demo_recipe_builds(plugins: Plugins) -> None:
    config = load_config(ROOT / "examples" / "python_docs" / "recipe.yaml", plugins)
    assert [source.name for source in config.problem.sources] == ["reference", "docstrings", "code", "shuffled"]


def test_the_demo_compares_on_the_data_of_its_run(plugins: Plugins) -> None:
    run, compared = (
        load_config(ROOT / "examples" / "python_docs" / f"{n}.yaml", plugins).problem for n in ("recipe", "compare")
    )
    assert run.sources == compared.sources
    assert run.validation == compared.validation
    assert (run.model, run.max_length) == (compared.model, compared.max_length)


@pytest.mark.parametrize(("page", "text"), code("bash"))
def test_commands_exist_with_their_options(page: str, text: str) -> None:
    import typer

    group = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), line
        if words and words[0].removeprefix(".venv/bin/") == "bilevel":
            command = group.get_command(typer.Context(group), words[1])  # type: ignore[attr-defined]
            assert command is not None, line
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


def test_the_formats_and_exporters_of_the_reference_can_be_registered() -> None:
    from bilevel_llm.data.format_contract import check_format

    names: dict[str, Any] = {"__name__": "my_package.my_module"}
    for _, block in code("python", [ROOT / "docs" / "reference.md"]):
        exec(compile(block, "reference.md", "exec"), names)
    check_format(names["Quiz"](), [{"question": "q", "answer": "a"}])
    data = SimpleNamespace(sources=[SimpleNamespace(weight=0.5, files={Path("a.jsonl"): 3})])
    exporter = names["MyTrainer"]()
    assert exporter.export(data, exporter.known_version("1.5")) == {"shares.json": '{"a.jsonl": 0.5}'}


@pytest.mark.parametrize("page", ["tutorial-new-problem.md"])
def test_the_tutorial_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _, block in code("python", [ROOT / "docs" / page]):
        exec(compile(block.replace("steps=2000", "steps=30"), page, "exec"), {"__name__": "tutorial"})
    assert "ridge penalty" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def module_at(file: Path) -> ModuleType:
    """A module by its file, imported under no name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def specified_hooks() -> list[str]:
    """Every hook that a first-party package specifies, as it is called: `bilevel_problems(register)`."""
    hooks = []
    for file in sorted([*ROOT.glob("bilevel/hookspecs.py"), *ROOT.glob("*/*/hookspecs.py")]):
        functions = {name: value for name, value in vars(module_at(file)).items() if hasattr(value, "bilevel_spec")}
        hooks += [f"{name}({', '.join(signature(hook).parameters)})" for name, hook in functions.items()]
    return hooks


def test_every_hook_is_documented() -> None:
    assert sorted(re.findall(r"^### `(.*)`$", HOOKS.read_text(), re.MULTILINE)) == sorted(specified_hooks())


@pytest.mark.parametrize("block", [block for _, block in code("python", [HOOKS]) if "hookimpl" in block])
def test_the_plugins_on_the_page_of_hooks_can_be_registered(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("my_plugin")
    exec(compile(block, HOOKS.name, "exec"), vars(plugin))
    monkeypatch.setitem(sys.modules, "my_plugin", plugin)
    loaded = load_plugins([EntryPoint("mine", "my_plugin", "bilevel")])
    assert not loaded.broken
    assert loaded.manager.get_hookcallers(plugin)


@pytest.fixture
def as_markdown(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What the site makes of a docstring; its environment has griffe, and this one need not."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    convert: Callable[[str], str] = module_at(ROOT / "docs" / "generator" / "docstrings.py").as_markdown
    return convert


def test_fields_in_docstrings_become_a_list(as_markdown: Callable[[str], str]) -> None:
    text = "Settings.\nlr_x, lr_z: step sizes,\n    one each.\np: order.\nThey all matter."
    assert (
        as_markdown(text) == "Settings.\n\n- `lr_x`, `lr_z`: step sizes,\n    one each.\n- `p`: order.\n\nThey all matter."
    )


def test_stars_in_docstrings_are_not_emphasis(as_markdown: Callable[[str], str]) -> None:
    assert as_markdown("y*(x) or `a * b`:\n\n    x * y") == "y\\*(x) or `a * b`:\n\n    x * y"
