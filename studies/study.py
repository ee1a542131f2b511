"""The study of docs/evidence.md: every comparison of study.yaml, cell by cell, and the page that shows them.

What is finished is not repeated, in whatever call it was done. After each comparison its numbers are written to results/,
and the page anew. `studies/README.md` says where the data come from.

Usage: python studies/study.py [NAME ...] [--launcher COMMAND] [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import page
import yaml
from pydantic import BaseModel, ConfigDict
from results import distilled

from bilevel.errors import InputError

HERE = Path(__file__).parent
ROOT = HERE.parent


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Case(BaseModel):
    """A comparison: a recipe, and what differs from it.

    name: what it is called in results/ and on the page.
    about: the question that it is there for, one of `page.QUESTIONS`.
    set: key -> value, as for `--set`.
    after: the comparison whose weights it takes; it can only be checked when that is done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: Literal[tuple(page.QUESTIONS)]  # type: ignore[valid-type]  # known when this is read
    recipe: str
    set: dict[str, Any] = {}
    after: str | None = None

    @property
    def output(self) -> Path:
        """Where its cells are."""
        return Path("runs") / "study" / slug(self.name)

    def command(self) -> list[str]:
        """The words after `bilevel`."""
        changes = [
            word for key, value in self.set.items() for word in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")
        ]
        return ["compare", self.recipe, *changes, "--output", str(self.output)]


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
    given = parser.parse_args()
    cases = chosen(read_study(HERE / "study.yaml"), given.names)
    launcher = shlex.split(given.launcher)
    wrong = [words for case in cases if (words := wrong_with(case, cases, launcher))]
    if wrong:
        sys.exit("\n".join(wrong) + f"\n{len(wrong)} of {len(cases)} comparisons cannot be made; nothing was run")
    if given.check:
        print(f"{len(cases)} comparisons can be made")
        return
    for case in cases:
        print(f"\n{case.name}", flush=True)
        if subprocess.run([*launcher, *case.command()], cwd=ROOT, check=False).returncode:
            sys.exit(f"stopped in {case.name!r}; the same command goes on with it")
        keep(case)
        page.write()


def read_study(file: Path) -> list[Case]:
    """The comparisons, in the order in which they are made. Raises `InputError` for a name that is there twice."""
    cases = [Case.model_validate(entry) for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["comparisons"]]
    slugs = [slug(case.name) for case in cases]
    if twice := [slug for i, slug in enumerate(slugs) if slug in slugs[:i]]:
        raise InputError(f"{file}: two comparisons are called {twice[0]!r}")
    return cases


def chosen(cases: list[Case], names: list[str]) -> list[Case]:
    """Those that were asked for by name, or else all."""
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            sys.exit(f"there is no comparison {name!r}; known: {', '.join(known)}")
    return [known[name] for name in names] or cases


def wrong_with(case: Case, cases: list[Case], launcher: list[str]) -> str:
    """What keeps a comparison from being made, or from being fair; empty if nothing does.

    cases: all that are to be made.
    """
    recipe = yaml.safe_load((ROOT / case.recipe).read_text(encoding="utf-8"))
    settings = recipe["compare"] | {k.removeprefix("compare."): v for k, v in case.set.items() if k.startswith("compare.")}
    if settings.get("tokens") is None or settings.get("finetune", {}).get("steps") is not None:
        return f"{case.name}: its methods would train on different numbers of tokens; give compare.tokens, and no steps"
    if case.after is not None and not (HERE / "results" / f"{slug(case.after)}.json").exists():
        waits = case.after in [other.name for other in cases]
        return "" if waits else f"{case.name}: it takes the weights of {case.after!r}, which is not done; name that one, too"
    tried = subprocess.run([*launcher, *case.command(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{case.name}: {tried.stderr.strip()}" if tried.returncode else ""


def keep(case: Case) -> None:
    """Write the numbers of a comparison to results/."""
    file = HERE / "results" / f"{slug(case.name)}.json"
    file.parent.mkdir(exist_ok=True)
    content = {"name": case.name, "about": case.about, **distilled(ROOT / case.output)}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
