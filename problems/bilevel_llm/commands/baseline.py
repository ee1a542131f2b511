"""`bilevel baseline METHOD RECIPE`: weigh or select training data by a baseline."""

from pathlib import Path
from typing import Annotated

import typer

from bilevel.completion import keys_of_recipe, names_of
from bilevel.launch import rank


def baseline(
    method: Annotated[
        str, typer.Argument(help="The name of a baseline; `bilevel list` shows them.", autocompletion=names_of("baselines"))
    ],
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe of an llm-reweighting problem, or the directory of a run. Its solver is not used."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", autocompletion=keys_of_recipe, help="Change a key, such as baseline.share=0.1."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The directory to write to, in place of run.output.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the last checkpoint, where the baseline keeps any."),
    ] = False,
) -> None:
    """Weigh or select training data by a baseline, to compare learned weights with."""
    from bilevel.plugins import load_plugins
    from bilevel.terminal import Terminal
    from bilevel.working_directory import entered
    from bilevel_llm.baselines.run import load, run, table

    plugins = load_plugins()
    is_run = recipe.is_dir()
    with entered(recipe) as place:
        given = place.path(Path(output)) if output is not None else place.run if resume and is_run else None
        where = None if given is None else str(given)
        chosen, task = load(method, place.recipe, plugins, changes=changes or [], output=where, resume=resume)
        outcome = run(method, chosen, task)
    if rank() == 0:
        Terminal().print(table(method, outcome, task))
