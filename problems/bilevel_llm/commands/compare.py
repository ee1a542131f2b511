"""`bilevel compare`."""

from pathlib import Path
from typing import Annotated

import typer

from bilevel.completion import keys_of_recipe


def compare(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe of an llm-reweighting problem with a section `compare`, or the directory of a comparison."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", autocompletion=keys_of_recipe, help="Change a key, e.g. compare.seeds=[0,1,2]."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The comparison's directory; replaces run.output.")] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep every tuned model and checkpoint, and write commands for lm-eval.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, say what there is to do, and stop.")
    ] = False,
) -> None:
    """Tune the same model on the mixes of several methods, and say which is better, and whether that is more than noise.

    Resumes by itself where an earlier call with the same output stopped.
    """
    import sys
    from contextlib import ExitStack

    from bilevel.launch import rank
    from bilevel.plugins import load_plugins
    from bilevel.terminal import Terminal
    from bilevel.working_directory import entered
    from bilevel_llm.comparison.run import announce, load, run

    is_run = recipe.is_dir()
    with entered(recipe) as place, ExitStack() as leaving:
        given = place.path(Path(output)) if output is not None else place.run if is_run else None
        where = None if given is None else str(given)
        comparing = load(
            place.recipe,
            load_plugins(),
            changes=changes or [],
            output=where,
            keep_models=keep_models,
            leaving=leaving,
        )
        # a pipe has no width to wrap at; one process speaks for all
        console = Terminal(width=None if sys.stdout.isatty() else 160, quiet=rank() != 0)
        (announce if dry_run else run)(comparing, console)
