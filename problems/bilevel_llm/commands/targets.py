"""`bilevel targets`: what the mix would be for each validation set alone."""

from pathlib import Path
from typing import Annotated

import typer


def targets(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The directory of a finished run with several validation sets."),
    ],
) -> None:
    """Learn the mix for each validation set alone, beside that for all of them.

    The run is made again for each set, in RUN/targets, which takes as long as RUN did for each; what is there already is
    not done again. `bilevel report RUN` then shows the table, too.
    """
    from bilevel.launch import rank
    from bilevel.plugins import load_plugins
    from bilevel.terminal import Terminal
    from bilevel_llm.reweighting.target_runs import mixes_of_targets
    from bilevel_llm.reweighting.targets import comparisons, table

    plugins = load_plugins()
    mixes = mixes_of_targets(run, plugins, plugins.hooks)
    if rank() == 0:
        console = Terminal()
        console.print(table(mixes))
        for sentence in comparisons(mixes):
            console.print(f"- {sentence}")
