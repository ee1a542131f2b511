"""`bilevel export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a fine-tuning or reweighting run.")],
    directory: Annotated[Path, typer.Argument(help="Where to write the model; must not exist.")],
    variable: Annotated[
        str | None,
        typer.Option(
            help="Export z, trained on training data alone, or y, which reweighting also fits to validation. (default: z)"
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Export the checkpoint of this step. (default: the last)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Write float32, bfloat16 or float16. (default: as in the checkpoint)")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the LoRA adapter without merging it.")] = False,
) -> None:
    """Write the model of a run's checkpoint as a Hugging Face directory."""
    from bilevel_llm.model.export import export_model

    export_model(run, directory, variable=variable, step=step, dtype=dtype, adapter=adapter)
