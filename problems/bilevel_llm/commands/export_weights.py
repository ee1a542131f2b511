"""`bilevel export-weights`: the weights of a run in the form another trainer reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bilevel.completion import names_of


def export_weights(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of an llm-reweighting run.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="TRAINER",
            autocompletion=names_of("exporters"),
            help="Write for this trainer; `bilevel list` shows all exporters.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file to write, or a directory for several files. (default: print)")
    ] = None,
    weights: Annotated[str, typer.Option(help="Use average, final, or a JSON file {source: weight}.")] = "average",
    mix: Annotated[Path | None, typer.Option(help="A file that `bilevel mix` drew by these weights, to train on.")] = None,
    stop: Annotated[
        Literal["first", "all"], typer.Option(help="Interleave until the first source is used up, or until all are.")
    ] = "first",
    seed: Annotated[int, typer.Option(help="The seed of the interleaving.")] = 0,
    trainer_version: Annotated[str | None, typer.Option(help="The trainer's version. (default: newest checked)")] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Proceed even if the data changed after the weights were learned.")
    ] = False,
) -> None:
    """Write the learned weights for another trainer."""
    from bilevel.plugins import load_plugins
    from bilevel.working_directory import entered
    from bilevel_llm.exporters.run import check_free, export, write
    from bilevel_llm.reweighting.saved_run import weights_of

    if output is not None:
        check_free(output)
    with entered(run) as place:
        files = export(
            place.run or run,
            to,
            load_plugins(),
            output=None if output is None else place.path(output),
            weights=weights_of(weights, place),
            mix=None if mix is None else place.path(mix),
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
