"""The commands on one run: names that look like commands, places that cannot be written, numbers that are none."""

import html
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bilevel.cli import main
from bilevel.plaintext import escape
from bilevel.recipe import dump
from tests.bilevel_llm.tiny import sentences, write_rows

NAMES = [
    "[web]",
    "books [en]",
    "[/x]",
    "$\\frac{$",
    "<b>",
    "&amp;",
    "..",
    "CON",
    "a/b",
    "{{ 7 * 7 }}",
    "%s",
    "#",
    "'\"",
    "x" * 300,
    "\u200fשלום\u200f",
    "-1e5",
    "null",
    " padded ",
]
REFUSED = ["a\x1b[31mb", "a\x00b", "a\u202eb", "a\u2028b"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Bilevel = Callable[..., Ended]


@pytest.fixture
def bilevel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Bilevel:
    """The command as a user runs it, in this process. What is no `SystemExit` fails the test: that would be a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["bilevel", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        assert "\x1b" not in said.out + said.err
        return Ended(code, said.out, said.err)

    return run


def recipe(directory: Path, model: Path, data: dict[str, str], names: Sequence[str]) -> Path:
    """A recipe of two steps on sources of these names."""
    files = [data["clean"], data["other"], data["noise"]]
    tree = {
        "problem": {
            "name": "llm-reweighting", "model": str(model), "max_length": 32, "batch_size": len(names),
            "sources": [{"name": name, "path": files[i % 3]} for i, name in enumerate(names)],
            "validation": [{"name": names[0], "path": data["target"]}],
        },
        "solver": {"name": "scalebio", "penalty": 10, "lr_x": 0.1, "lr_z": 1e-3, "warmup": 1},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"steps": 2, "output": "run"},
    }  # fmt: skip
    (directory / "recipe.yaml").write_text(dump(tree), encoding="utf-8")
    return directory / "recipe.yaml"


def test_every_command_shows_names_whole(
    model_directory: Callable[[str], Path], data: dict[str, str], bilevel: Bilevel, tmp_path: Path
) -> None:
    recipe(tmp_path, model_directory("llama"), data, NAMES)

    def ran(*words: object) -> Ended:
        ended = bilevel(*words)
        assert ended.code == 0, (words, ended.err)
        return ended

    def shows_all(ended: Ended) -> None:
        assert [name for name in NAMES if escape(name).strip() not in ended.out + ended.err] == []

    shows_all(ran("run", "recipe.yaml"))
    ran("run", "recipe.yaml", "--set", "run.steps=3", "--resume")
    ran("plan", "recipe.yaml")
    shows_all(ran("mix", "run", "--rows", 20, "--output", "mix.jsonl"))
    assert json.loads((tmp_path / "mix.jsonl.json").read_text())["sources"].keys() == set(NAMES)
    ran("report", "run", "--output", "report.html", "--png", "charts")
    page = html.unescape((tmp_path / "report.html").read_text())
    assert [name for name in NAMES if name not in page] == []
    assert json.loads(ran("export-weights", "run", "--to", "json").out).keys() == set(NAMES)
    for exporter in ("csv", "interleave", "llamafactory", "axolotl", "trl"):
        ended = bilevel("export-weights", "run", "--to", exporter)
        assert ended.code == 0 or (ended.code == 2 and "--mix" in ended.err), (exporter, ended)
    ran("baseline", "uniform", "recipe.yaml", "--output", "uniform")
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside == {"recipe.yaml", "run", "mix.jsonl", "mix.jsonl.json", "report.html", "charts", "uniform"}


def test_a_comparison_and_an_evaluation_show_names_whole_and_write_nowhere_else(
    model_directory: Callable[[str], Path], data: dict[str, str], bilevel: Bilevel, tmp_path: Path
) -> None:
    tree = yaml.safe_load(recipe(tmp_path, model_directory("llama"), data, NAMES).read_text())
    usable = [
        name for name in NAMES if not {"/", "\\"} & set(name) and len(name) < 180
    ]  # others are refused: files have these names
    other = write_rows(tmp_path / "test.jsonl", sentences(9, 12))
    tests = [{"name": name, "path": other} for name in usable]
    tree["compare"] = {"methods": ["uniform"], "seeds": [0], "rows": 20, "finetune": {"batch_size": 4}, "test": tests}
    (tmp_path / "recipe.yaml").write_text(dump(tree), encoding="utf-8")
    ended = bilevel("compare", "recipe.yaml", "--output", "comparison")
    assert ended.code == 0, ended
    assert [name for name in usable if escape(name).strip() not in ended.out + ended.err] == []
    assert json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    files = [tmp_path / f"{name}.jsonl" for name in usable]
    for file in files:
        shutil.copyfile(data["target"], file)
    ended = bilevel(
        "evaluate", model_directory("llama"), *(f"--data={file.name}" for file in files), "--json", "scores.json"
    )
    assert ended.code == 0, ended
    assert [file.name for file in files if escape(file.name).strip() not in ended.out] == []
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside == {"recipe.yaml", "test.jsonl", "comparison", "scores.json", *(file.name for file in files)}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_with_commands_is_refused_by_name(
    name: str, model_directory: Callable[[str], Path], data: dict[str, str], bilevel: Bilevel, tmp_path: Path
) -> None:
    recipe(tmp_path, model_directory("llama"), data, ["web", name])
    before = sorted(tmp_path.rglob("*"))
    for words in (["run", "recipe.yaml"], ["plan", "recipe.yaml"]):
        ended = bilevel(*words)
        assert ended.code == 2, (words, ended)
        assert "name" in ended.err or "recipe.yaml:" in ended.err
    assert sorted(tmp_path.rglob("*")) == before


PLACES = {"below a file": "file/deeper/out{}", "a long name": "x" * 300 + "{}", "read-only": "/proc/out{}"}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_one_line(
    place: str, make_run: Callable[..., Path], data: dict[str, str], bilevel: Bilevel,
    model_directory: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    run, model = make_run(), model_directory("llama")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "quadratic.yaml").write_text(
        yaml.safe_dump({"problem": {"name": "quadratic"}, "solver": {"name": "scalebio"},
                        "backend": {"name": "torch", "device": "cpu"}, "run": {"steps": 1, "output": "o"}})
    )  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    where = PLACES[place].format
    for words in (
        ["run", "quadratic.yaml", "--output", where("")],
        ["mix", run, "--rows", 20, "--output", where(".jsonl")],
        ["report", run, "--output", where(".html")],
        ["report", run, "--output", "ok.html", "--png", where("")],
        ["export-weights", run, "--to", "json", "--output", where(".json")],
        ["export-model", run, where("")],
        ["evaluate", model, "--data", data["target"], "--device", "cpu", "--json", where(".json")],
        ["plan", "quadratic.yaml", "--json", where(".json")],
    ):
        ended = bilevel(*words)
        assert ended.code in (1, 2), (words, ended)
        assert len(ended.err.strip().splitlines()) == 1, (words, ended.err)
        (tmp_path / "ok.html").unlink(missing_ok=True)
        assert sorted(tmp_path.rglob("*")) == before, words
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_whose_weights_are_not_numbers_has_no_scores(
    model_directory: Callable[[str], Path], data: dict[str, str], bilevel: Bilevel, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_directory("llama"), tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ended = bilevel("evaluate", model, "--data", data["target"], "--device", "cpu", "--json", "scores.json")
    assert ended.code == 2, ended
    assert ended.err == "error: problem.model: the model's logits are not finite; its weights are damaged, or not numbers\n"
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "--model", "m", "--data", "d", "--epochs", "nan", "--output", "o"], "--epochs is nan"),
        (["finetune", "--model", "m", "--data", "d", "--epochs", "inf", "--output", "o"], "--epochs is inf"),
        (["mix", "run", "--rows", 10**21, "--output", "o.jsonl"], "--rows is larger"),
        (["mix", "run", "--rows", -1, "--output", "o.jsonl"], "rows"),
    ],
)
def test_numbers_that_are_none_or_too_large_are_refused(
    words: list[object], said: str, make_run: Callable[..., Path], bilevel: Bilevel, tmp_path: Path
) -> None:
    make_run()
    before = sorted(tmp_path.rglob("*"))
    ended = bilevel(*words)
    assert (ended.code, said in ended.err) == (2, True), ended
    assert sorted(tmp_path.rglob("*")) == before
