"""The command line. No logic: it parses, calls, prints, and turns errors into exit codes (0 done, 1 failed, 2 bad input)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from bilevel.errors import BilevelError, InputError

INTERRUPTED = 130  # as shells report a program that Ctrl-C ended

app = typer.Typer(
    help="Learn how much weight each training-data source deserves, and solve other bilevel problems.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe: YAML, or Python that defines `recipe`.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. solver.penalty=20.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The run's directory; replaces run.output.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, exactly.")] = False,
) -> None:
    """Do what a recipe says."""
    from bilevel.config import load_config
    from bilevel.plugins import load_plugins

    plugins = load_plugins()
    config = load_config(recipe, plugins, changes=changes or [], output=output)
    config.fit(resume=resume, observer=plugins.hooks)


@app.command("list")
def list_parts() -> None:
    """Show the problems, solvers, backends and checks that are installed, and broken plugins with the reason."""
    from bilevel.plugins import load_plugins

    plugins = load_plugins()
    table = Table("kind", "name", "plugin", "class", box=None, header_style="bold")
    for kind, parts in plugins.parts.items():
        for part in sorted(parts.values(), key=lambda part: part.name):
            table.add_row(kind[:-1], part.name, part.plugin, part.target)
    Console(soft_wrap=True).print(table)
    for plugin, reason in plugins.broken.items():
        errors.print(f"broken plugin {plugin!r}: {reason}", markup=False, style="red", soft_wrap=True)


def main() -> None:
    """Entry point of the command `bilevel`."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
    )
    logging.getLogger("bilevel").setLevel(logging.INFO)
    try:
        app()
    except InputError as error:
        errors.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except BilevelError as error:
        from bilevel.loop import Interrupted

        errors.print(f"{error}", markup=False, style="yellow" if isinstance(error, Interrupted) else "red", soft_wrap=True)
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)


if __name__ == "__main__":
    main()
