"""`bilevel weigh METHOD RECIPE`: weigh or select training data by a registered method."""

from pathlib import Path
from typing import Annotated

import typer

from bilevel.launch import rank


def weigh(
    method: Annotated[str, typer.Argument(help="A weighting; `bilevel list` shows them.")],
    recipe: Annotated[Path, typer.Argument(help="A recipe of an llm-reweighting problem; its solver is not used.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. weighting.share=0.1.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The run's directory; replaces run.output.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint (doremi, odm).")] = False,
) -> None:
    """Weigh or select training data by another method than bilevel optimization, to compare with."""
    from rich.console import Console

    from bilevel.plugins import load_plugins
    from bilevel_llm.baselines.run import load, run, table

    plugins = load_plugins()
    weighting, task = load(method, recipe, plugins, changes=changes or [], output=output, resume=resume)
    outcome = run(method, weighting, task)
    if rank() == 0:
        Console().print(table(method, outcome, task))
