"""What newcomers write for sources, validation sets and test sets is understood; errors name the line and the key."""

import dataclasses

import pytest

from bilevel import InputError
from bilevel.config import build_section
from bilevel.plain import to_plain
from bilevel.recipe import Recipe, dump
from bilevel_llm.data.settings import DataFiles, Source, ValidationSet
from bilevel_llm.data.short_forms import name_of
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.reweighting.problem import LLMReweighting

WEB, BOOKS = Source("web", "a.jsonl"), Source("books", ["b", "c"], "alpaca", max_rows=3)


def built(text, tmp_path, kind=LLMReweighting):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"problem:\n  model: m\n{text}")
    recipe = Recipe.read(file)
    return build_section(kind, recipe.tree["problem"], recipe, ("problem",))


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("{web: a.jsonl, books: {path: [b, c], format: alpaca, max_rows: 3}}", [WEB, BOOKS]),
        ("[{name: web, path: a.jsonl}, {name: books, path: [b, c], format: alpaca, max_rows: 3}]", [WEB, BOOKS]),
        ("[data/a.jsonl, data/books/*.parquet]", [Source("a", "data/a.jsonl"), Source("books", "data/books/*.parquet")]),
    ],
)
@pytest.mark.parametrize(
    ("validation", "sets"),
    [
        ("t.jsonl", [ValidationSet("t.jsonl")]),
        ("[x/t.jsonl, u.jsonl]", [ValidationSet("x/t.jsonl", "t"), ValidationSet("u.jsonl", "u")]),
        ("{path: t.jsonl, weight: 2}", [ValidationSet("t.jsonl", weight=2)]),
        ("{chat: t, math: {path: u, weight: 3}}", [ValidationSet("t", "chat"), ValidationSet("u", "math", weight=3)]),
    ],
)
def test_short_forms_become_the_long_form_which_is_read_as_the_same(tmp_path, sources, expected, validation, sets):
    problem = built(f"  sources: {sources}\n  validation: {validation}\n", tmp_path)
    assert problem.sources == expected
    assert problem.validation == sets
    long = {"problem": to_plain(problem)}
    assert isinstance(long["problem"]["sources"], list)
    (tmp_path / "long.yaml").write_text(dump(long))
    again = Recipe.read(tmp_path / "long.yaml")
    assert to_plain(build_section(LLMReweighting, again.tree["problem"], again, ("problem",))) == long["problem"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  sources:\n    web: {paht: a}\n    b: c\n  validation: t", r"yaml:4: problem\.sources\.web\.path is missing; there is 'paht'"),
        ("  sources:\n    web: a\n    b: 5\n  validation: t", r"yaml:5: problem\.sources\.b is 5"),
        ("  sources:\n    web: a\n    b:\n      path: c\n      fromat: text\n  validation: t", r"yaml:7: unknown key problem\.sources\.b\.fromat; did you mean 'format'"),
        ("  sources: {a: b, c: d}\n  validation:\n    x: t\n    y: {path: t, wieght: 2}", r"yaml:6: unknown key problem\.validation\.y\.wieght; did you mean 'weight'"),
        ("  sources:\n    web: a\n    b: {path: c, name: d}\n  validation: t", r"yaml:3: problem\.sources: b has another name inside, 'd'"),
        ("  sources: {a: b, c: d}\n  validation: {path: t, wieght: 3}", r"yaml:4: unknown key problem\.validation\.wieght; did you mean 'weight'"),
        ("  sources: {a: b, c: d}\n  validation: {weight: {path: t, wieght: 3}}", r"yaml:4: unknown key problem\.validation\.weight\.wieght"),
        ("  sources: {a: b, c: []}\n  validation: t", r"yaml:3: problem\.sources\.c: path is empty"),
        ("  sources: a.jsonl\n  validation: t", r"yaml:3: problem\.sources: each needs a name; write \{NAME: PATH\}"),
        ("  sources: {path: a.jsonl, name: b}\n  validation: t", r"yaml:3: problem\.sources: each needs a name"),
        ("  sources: {a: b, c: {path: d, max_rows: true}}\n  validation: t", r"problem\.sources\.c\.max_rows is true, and a number is needed"),
    ],
)  # fmt: skip
def test_an_error_in_a_short_form_names_the_line_and_the_key(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        built(text + "\n", tmp_path)


@pytest.mark.parametrize(
    ("given", "held_out"),
    [("a", ["a"]), ("[a, b]", ["a", "b"]), ("{path: a, format: text}", [DataFiles("a", "text")])],
)
def test_held_out_files_may_be_a_single_path_or_say_how_they_are_read(tmp_path, given, held_out):
    problem = built(f"  data: {{path: x, fields: {{text: t}}}}\n  held_out: {given}\n", tmp_path, FineTuning)
    assert problem.held_out == held_out
    with pytest.raises(InputError, match=r"unknown key problem\.held_out\.fromat"):
        built("  data: x\n  held_out: {path: a, fromat: text}\n", tmp_path, FineTuning)
    assert problem.data == DataFiles("x", fields={"text": "t"})


def test_a_recipe_of_plain_paths_stays_as_it_was_so_that_runs_of_before_are_resumed(tmp_path):
    plain = to_plain(built("  data: x.jsonl\n  held_out: [a]\n  validation: t\n", tmp_path, FineTuning))
    assert (plain["data"], plain["format"], plain["held_out"]) == ("x.jsonl", None, ["a"])
    new = {f.name for f in dataclasses.fields(ValidationSet)} - {"path", "name", "format", "weight"}
    assert all(plain["validation"][0][key] is None for key in new), "a key that is None is as good as absent"


@pytest.mark.parametrize(
    ("path", "name"),
    [("data/web.jsonl.gz", "web"), ("data/web/**/*.jsonl", "web"), ("owner/name", "name"), ("*.jsonl", "*.jsonl")],
)
def test_a_set_without_a_name_is_called_after_its_path(path, name):
    assert name_of(path) == name
