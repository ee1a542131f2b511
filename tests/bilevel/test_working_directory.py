"""Runs are found again from any folder, and after they were moved, with the data that their recipe names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel import cli
from bilevel.errors import InputError
from bilevel.run_directory import RunDirectory
from bilevel.working_directory import FILE, entered

RECIPE = {"problem": {"name": "web", "sources": [{"name": "web", "path": "data/*.jsonl"}]}, "run": {"output": "runs/a"}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a run, in which we are, beside an empty one called `elsewhere`."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "web.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    RunDirectory(Path("runs/a")).begin(RECIPE)
    return folder


def moved_together(project: Path) -> tuple[Path, Path]:
    shutil.move(project, project.with_name("archive"))
    return project.with_name("archive") / "runs" / "a", project.with_name("archive")


def moved_alone(project: Path) -> tuple[Path, Path]:
    shutil.move(project / "runs" / "a", project.with_name("b"))
    return project.with_name("b"), project


def copied_together(project: Path) -> tuple[Path, Path]:
    shutil.copytree(project, project.with_name("copy"))
    return project.with_name("copy") / "runs" / "a", project.with_name("copy")


def of_an_older_version(project: Path) -> tuple[Path, Path]:
    (project / "runs" / "a" / FILE).unlink()
    return project / "runs" / "a", project


@pytest.mark.parametrize("by", [Path(), Path("recipe.yaml")], ids=["directory", "recipe"])
@pytest.mark.parametrize(
    "change",
    [lambda project: (project / "runs" / "a", project), moved_together, moved_alone, copied_together, of_an_older_version],
    ids=["as it was", "moved with its data", "moved alone", "copied with its data", "from before"],
)
def test_a_run_is_worked_with_where_its_paths_lead(
    change: Callable[[Path], tuple[Path, Path]], by: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.with_name("elsewhere"))
    run, where = change(project)
    with entered(run / by) as place:
        assert Path.cwd() == where
        assert place.run == run
        assert place.recipe.is_file()
        assert place.path(Path("mix.jsonl")) == project.with_name("elsewhere") / "mix.jsonl"
    assert Path.cwd() == project.with_name("elsewhere")


def test_paths_stay_as_they_were_typed_where_nothing_has_to_be_looked_for(project: Path) -> None:
    with entered(Path("runs/a")) as place:
        assert (place.run, place.path(Path("mix.jsonl"))) == (Path("runs/a"), Path("mix.jsonl"))
    with entered(Path("data/web.jsonl")) as place:
        assert (place.run, place.recipe) == (None, Path("data/web.jsonl"))


def test_an_error_says_where_the_data_were_looked_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = moved_alone(project)
    (project / "data" / "web.jsonl").unlink()
    monkeypatch.chdir(project.with_name("elsewhere"))
    with pytest.raises(InputError) as caught, entered(run):
        raise InputError("no file matches data/*.jsonl")
    words = str(caught.value)
    assert words.startswith("no file matches data/*.jsonl\n")
    assert "'data/*.jsonl' leads nowhere" in words
    assert str(project.with_name("elsewhere")) in words
    assert f"it ran in {project}" in words


TOY = """
problem: {name: quadratic, m: 2, n: 3}
solver: {name: scalebio}
backend: {name: torch, device: cpu}
run: {steps: 2, output: runs/toy}
"""


def test_a_run_is_resumed_by_its_directory_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("toy.yaml").write_text(TOY)
    invoke("run", "toy.yaml")
    monkeypatch.chdir(project.with_name("elsewhere"))
    shutil.move(project / "runs" / "toy", "toy")
    invoke("run", "--resume", "toy", "--set", "run.steps=3")
    assert len((Path("toy") / "metrics.jsonl").read_text().splitlines()) == 3
    with pytest.raises(InputError, match=r"continue the run in it with --resume, or begin another .* toy/recipe.yaml"):
        invoke("run", "toy")
    with pytest.raises(InputError, match="is resumed where it is"):
        invoke("run", "toy", "--resume", "--output", "other")


def invoke(*words: str) -> None:
    CliRunner().invoke(cli.app, words, catch_exceptions=False)
