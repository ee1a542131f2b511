"""`bilevel export-weights`: the weights of a run in the form another trainer reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export_weights(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of an llm-reweighting run.")],
    to: Annotated[str, typer.Option(metavar="TRAINER", help="Write for this trainer; `bilevel list` shows all exporters.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; a directory where there are several. Default: print.")
    ] = None,
    weights: Annotated[str, typer.Option(help="average, final, or a JSON file {source: weight}.")] = "average",
    mix: Annotated[Path | None, typer.Option(help="A file that `bilevel mix` drew by these weights, to train on.")] = None,
    stop: Annotated[
        Literal["first", "all"], typer.Option(help="Interleave until the first source is used up, or until all are.")
    ] = "first",
    seed: Annotated[int, typer.Option(help="The seed of the interleaving.")] = 0,
    trainer_version: Annotated[str | None, typer.Option(help="The trainer's version. Default: the newest checked.")] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Go on even if the data is not what the weights were learned on.")
    ] = False,
) -> None:
    """Write the learned weights for another trainer."""
    from bilevel.plugins import load_plugins
    from bilevel_llm.exporters.run import check_free, export, write

    if output is not None:
        check_free(output)
    files = export(
        run,
        to,
        load_plugins(),
        output=output,
        weights=weights,
        mix=mix,
        stop=stop,
        seed=seed,
        trainer_version=trainer_version,
        allow_changed_data=allow_changed_data,
    )
    if output is None:
        for name, content in files.items():
            typer.echo(f"# {name}\n{content}" if len(files) > 1 else content, nl=False)
    else:
        write(files, output)
        typer.echo(f"written: {output}")
