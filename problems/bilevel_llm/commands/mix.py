"""`bilevel mix`: the reweighted data set of a run, as a file."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def mix(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of an llm-reweighting run.")],
    output: Annotated[Path, typer.Option(help="The file to write, .jsonl or .parquet; a card goes to FILE.json.")],
    rows: Annotated[int | None, typer.Option(help="The size of the mix in rows.")] = None,
    tokens: Annotated[int | None, typer.Option(help="The most tokens in the mix, as the run counts them.")] = None,
    weights: Annotated[str, typer.Option(help="Use average, final, or a JSON file {source: weight}.")] = "average",
    format: Annotated[
        str,
        typer.Option(help="Write rows as they are (source), or all in a registered format, such as messages."),
    ] = "source",
    max_repeats: Annotated[
        int, typer.Option(help="Use a row at most this often; up to about 4 costs little (Muennighoff et al. 2023).")
    ] = 4,
    on_shortfall: Annotated[
        Literal["error", "report", "redistribute"],
        typer.Option(help="If a source has too few rows: refuse, make a smaller mix, or fill up from the others."),
    ] = "error",
    all_rows: Annotated[
        bool,
        typer.Option("--all-rows", help="Draw from all rows of the sources, also where the run read a sample (max_rows)."),
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of the draw and of the order of rows.")] = 0,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Proceed even if the data changed after the weights were learned.")
    ] = False,
) -> None:
    """Draw a data set by the learned weights, and write it."""
    from bilevel.plugins import load_plugins
    from bilevel.terminal import Terminal
    from bilevel.working_directory import entered
    from bilevel_llm.mixing.draw import make_mix
    from bilevel_llm.mixing.mix import card_file, claimed
    from bilevel_llm.reweighting.saved_run import read_run, weights_of

    with entered(run) as place, claimed(place.path(output)):
        weighted = read_run(place.run or run, load_plugins(), weights_of(weights, place))
        if not allow_changed_data:
            weighted.check_data()
        drawn = make_mix(
            weighted.with_all_rows().problem if all_rows else weighted.problem,
            weighted.weights,
            rows=rows,
            tokens=tokens,
            seed=seed,
            max_repeats=max_repeats,
            on_shortfall=on_shortfall,
            format=format,
        )
        drawn.write(place.path(output), {"weights": weighted.origin, "recipe": str(weighted.recipe_file)})
    console = Terminal()
    console.print(drawn.table())
    console.print(f"{drawn.rows:,} rows in {output}, described in {card_file(output)}", soft_wrap=True)
