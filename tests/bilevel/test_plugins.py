import sys
import types
from importlib.metadata import EntryPoint

import pytest

from bilevel import InputError, hookimpl
from bilevel.cli import app
from bilevel.hookspecs import hookspec
from bilevel.plugins import Plugins, load_plugins


def point(name: str, monkeypatch: pytest.MonkeyPatch, **members: object) -> EntryPoint:
    module = types.ModuleType(f"plugin_{name}")
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(name, module.__name__, "bilevel")


@hookimpl
def bilevel_problems(register):  # type: ignore[no-untyped-def]
    register("toy", "tests.conftest:Distance")


def test_first_party_parts_come_through_the_same_door(plugins: Plugins) -> None:
    assert plugins.broken == {}
    assert {"scalebio"} <= plugins.parts["solvers"].keys()
    assert {"torch"} <= plugins.parts["backends"].keys()
    assert {"llm-reweighting"} <= plugins.parts["problems"].keys()


def test_registration_imports_nothing_until_the_part_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def bilevel_solvers(register):  # type: ignore[no-untyped-def]
        register("lazy", "a_module_that_is_not_there:Solver")

    plugins = load_plugins([point("lazy", monkeypatch, bilevel_solvers=bilevel_solvers)])
    with pytest.raises(InputError, match="'lazy'.*a_module_that_is_not_there"):
        plugins.find("solvers", "lazy").load()


def test_a_plugin_that_cannot_be_imported_is_broken_and_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    good = point("good", monkeypatch, bilevel_problems=bilevel_problems)
    plugins = load_plugins([EntryPoint("bad", "no_such_module", "bilevel"), good])
    assert "No module named 'no_such_module'" in plugins.broken["bad"]
    assert "toy" in plugins.parts["problems"]


def test_a_misspelt_hook_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def bilevel_problem(register):  # type: ignore[no-untyped-def]
        register("toy", "tests.conftest:Distance")

    plugins = load_plugins([point("typo", monkeypatch, bilevel_problem=bilevel_problem)])
    assert "unknown hook 'bilevel_problem'; did you mean 'bilevel_problems'?" in plugins.broken["typo"]
    assert "toy" not in plugins.parts["problems"]


def test_two_plugins_with_the_same_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    one = point("one", monkeypatch, bilevel_problems=bilevel_problems)
    two = point("two", monkeypatch, bilevel_problems=bilevel_problems)
    with pytest.raises(InputError, match=r"'toy'.*'one'.*'two'"):
        load_plugins([one, two])
    monkeypatch.setenv("BILEVEL_BLOCK_PLUGINS", "two")
    assert load_plugins([one, two]).parts["problems"]["toy"].plugin == "one"


def test_a_plugin_can_bring_a_kind_of_parts_that_others_register(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookspec
    def bilevel_schedules(register):  # type: ignore[no-untyped-def]
        """A kind."""

    @hookimpl
    def bilevel_kinds():  # type: ignore[no-untyped-def]
        return "plugin_kinds"

    @hookimpl(specname="bilevel_schedules")
    def register_one(register):  # type: ignore[no-untyped-def]
        register("cosine", "tests.conftest:Distance")

    kinds = point("kinds", monkeypatch, bilevel_schedules=bilevel_schedules)
    owner = point("owner", monkeypatch, bilevel_kinds=bilevel_kinds)
    user = point("another", monkeypatch, register_one=register_one)  # sorted, and so loaded, before the owner
    plugins = load_plugins([kinds, owner, user])
    assert plugins.broken == {}
    assert plugins.find("schedules", "cosine").plugin == "another"
    without = load_plugins([user])
    assert "bilevel_schedules" in without.broken["another"]
    assert "schedules" not in without.parts


def test_a_plugin_whose_kind_exists_already_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookspec
    def bilevel_solvers(register):  # type: ignore[no-untyped-def]
        """The core's."""

    @hookimpl
    def bilevel_kinds():  # type: ignore[no-untyped-def]
        return "plugin_double"

    point("double", monkeypatch, bilevel_solvers=bilevel_solvers)
    plugins = load_plugins([point("thief", monkeypatch, bilevel_kinds=bilevel_kinds)])
    assert "bilevel_solvers" in plugins.broken["thief"]


def test_a_target_without_a_class_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def bilevel_backends(register):  # type: ignore[no-untyped-def]
        register("half", "package.module")

    plugins = load_plugins([point("half", monkeypatch, bilevel_backends=bilevel_backends)])
    assert "package.module:Class" in plugins.broken["half"]


def test_an_unknown_name_comes_with_the_nearest_known_one(plugins: Plugins) -> None:
    with pytest.raises(InputError, match="did you mean 'scalebio'"):
        plugins.find("solvers", "scaleboi")


def test_a_plugin_can_bring_a_command_of_its_own(monkeypatch, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "greeting.py").write_text(
        "import bilevel\n"
        "@bilevel.hookimpl\n"
        "def bilevel_commands(register):\n"
        "    register('greet', 'greeting:greet')\n"
        "def greet(name: str) -> None:\n"
        "    '''Say hello.'''\n"
        "    print('hello', name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("greeting", "greeting", "bilevel")
    loaded = load_plugins([point])
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: loaded)
    app(["greet", "you"], standalone_mode=False)
    assert capsys.readouterr().out == "hello you\n"
    app(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "greet" in shown
    assert "Say hello." in shown


def test_a_name_unlike_any_other_is_answered_with_all_names() -> None:
    with pytest.raises(InputError, match=r"no solver is named 'zzz'; known: aid, bome, "):
        load_plugins().find("solvers", "zzz")
