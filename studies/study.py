"""The study of docs/evidence.md: every comparison of study.yaml, cell by cell, and the page that shows them.

What is finished is not repeated, in whatever call it was done. After each comparison its numbers are written to results/,
and the page anew. `studies/README.md` says where the data come from.

Usage: python studies/study.py [NAME ...] [--check] [--launcher COMMAND] [--set KEY=VALUE ... --into DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import page
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from results import distilled

from bilevel.errors import InputError

HERE = Path(__file__).parent
ROOT = HERE.parent

CELLS = Path("runs") / "study"
"""Where the cells of the study are, as it is in the repository."""


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Case(BaseModel):
    """A comparison: a recipe, and what differs from it.

    name: what it is called in results/ and on the page.
    about: the question that it is there for, one of `page.QUESTIONS`.
    set: key -> value, as for `--set`.
    after: the comparison whose weights it takes; it can only be checked when that is done. In `set`, {after} stands for its
        directory.
    gpu: whether it would take days without a GPU; there it is only made if it is named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: Literal[tuple(page.QUESTIONS)]  # type: ignore[valid-type]  # known when this is read
    recipe: str
    set: dict[str, Any] = {}
    after: str | None = None
    gpu: bool = False

    def directory(self, cells: Path) -> Path:
        """Where its cells are, below those of all comparisons."""
        return cells / slug(self.name)

    def command(self, cells: Path, changes: Sequence[str] = ()) -> list[str]:
        """The words after `bilevel`. changes: of all recipes, KEY=VALUE."""
        own = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.set.items()]
        if self.after is not None:
            own = [words.replace("{after}", str(cells / slug(self.after))) for words in own]
        changed = [word for words in (*own, *changes) for word in ("--set", words)]
        return ["compare", self.recipe, *changed, "--output", str(self.directory(cells))]


@dataclass(frozen=True)
class Place:
    """Where a study is made, and with what.

    launcher: what runs bilevel. changes: of all recipes, KEY=VALUE.
    cells: the directory of all comparisons. results, page: what comes of them.
    """

    launcher: Sequence[str]
    changes: Sequence[str]
    cells: Path
    results: Path
    page: Path

    @classmethod
    def of(cls, launcher: str, changes: Sequence[str], into: Path | None) -> Place:
        """The repository's own, or a directory of somebody's."""
        words = shlex.split(launcher)
        if into is None:
            return cls(words, changes, CELLS, page.RESULTS, page.PAGE)
        into = into.resolve()
        return cls(words, changes, into, into / "results", into / "page.md")


def main() -> None:
    """Check all that was asked for, run what is not done, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="comparisons of study.yaml; all of them by default")
    parser.add_argument(
        "--launcher",
        default=f"{shlex.quote(sys.executable)} -m bilevel",
        help="what runs bilevel, such as 'torchrun --nproc-per-node 8 -m bilevel'",
    )
    parser.add_argument("--check", action="store_true", help="say what is wrong with data and recipes, and stop")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a change of all recipes; needs --into"
    )
    parser.add_argument(
        "--into", type=Path, metavar="DIRECTORY", help="where cells, results and page go, if not to the repository's"
    )
    given = parser.parse_args()
    if given.set and given.into is None:
        sys.exit("--set makes another study; say where it is to be, with --into")
    cases = chosen(read_study(HERE / "study.yaml"), given.names)
    place = Place.of(given.launcher, given.set, given.into)
    wrong = [words for case in cases if (words := wrong_with(case, cases, place))]
    if wrong:
        sys.exit("\n".join(wrong) + f"\n{len(wrong)} of {len(cases)} comparisons cannot be made; nothing was run")
    if given.check:
        print(f"{len(cases)} comparisons can be made")
        return
    for case in cases:
        print(f"\n{case.name}", flush=True)
        if subprocess.run([*place.launcher, *case.command(place.cells, place.changes)], cwd=ROOT, check=False).returncode:
            sys.exit(f"stopped in {case.name!r}; the same command goes on with it")
        keep(case, place)
        page.write(place.results, place.page)


def read_study(file: Path) -> list[Case]:
    """The comparisons, in the order in which they are made. Raises `InputError` for a name that is there twice."""
    cases = [Case.model_validate(entry) for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["comparisons"]]
    slugs = [slug(case.name) for case in cases]
    if twice := [slug for i, slug in enumerate(slugs) if slug in slugs[:i]]:
        raise InputError(f"{file}: two comparisons are called {twice[0]!r}")
    return cases


def chosen(cases: list[Case], names: list[str]) -> list[Case]:
    """Those that were asked for by name, or else all that this machine can make in hours."""
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            sys.exit(f"there is no comparison {name!r}; known: {', '.join(known)}")
    return [known[name] for name in names] or [case for case in cases if torch.cuda.is_available() or not case.gpu]


def wrong_with(case: Case, cases: list[Case], place: Place) -> str:
    """What keeps a comparison from being made, or from being fair; empty if nothing does.

    cases: all that are to be made.
    """
    recipe = yaml.safe_load((ROOT / case.recipe).read_text(encoding="utf-8"))
    settings = recipe["compare"] | {k.removeprefix("compare."): v for k, v in case.set.items() if k.startswith("compare.")}
    if settings.get("tokens") is None or settings.get("finetune", {}).get("steps") is not None:
        return f"{case.name}: its methods would train on different numbers of tokens; give compare.tokens, and no steps"
    if case.after is not None and not results_file(case.after, place).exists():
        waits = case.after in [other.name for other in cases]
        return "" if waits else f"{case.name}: it takes the weights of {case.after!r}, which is not done; name that one, too"
    command = [*place.launcher, *case.command(place.cells, place.changes), "--dry-run"]
    tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{case.name}: {tried.stderr.strip()}" if tried.returncode else ""


def keep(case: Case, place: Place) -> None:
    """Write the numbers of a comparison to the results."""
    file = results_file(case.name, place)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"name": case.name, "about": case.about, **distilled(ROOT / case.directory(place.cells))}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def results_file(name: str, place: Place) -> Path:
    """Where the numbers of a comparison are."""
    return ROOT / place.results / f"{slug(name)}.json"


if __name__ == "__main__":
    main()
