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
            help="z (trained on training data alone) or y (of a reweighting run: also on validation). (default: z)"
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of which checkpoint. (default: the last one)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. (default: that of the checkpoint)")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Keep a LoRA adapter apart instead of merging it.")] = False,
) -> None:
    """Write the model of a run's checkpoint as a Hugging Face directory."""
    from bilevel_llm.model.export import export_model

    export_model(run, directory, variable=variable, step=step, dtype=dtype, adapter=adapter)
