"""`bilevel export-model`."""

from pathlib import Path
from typing import Annotated

import typer


def export_model(
    run: Annotated[Path, typer.Argument(help="The directory of a fine-tuning or reweighting run.")],
    directory: Annotated[Path, typer.Argument(help="The directory to write the model to. It must not exist.")],
    variable: Annotated[
        str | None,
        typer.Option(
            help="The lower variable to export: z, which was trained on training data alone, or y of a reweighting run, "
            "which was trained on the validation data as well. (default: z)"
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="The step of the checkpoint to export. (default: the last one)")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="The precision to write: float32, bfloat16 or float16. (default: that of the checkpoint)"),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a LoRA adapter by itself instead of merging it into the model.")
    ] = False,
) -> None:
    """Write the model in a run's checkpoint as a Hugging Face directory."""
    from bilevel.working_directory import entered
    from bilevel_llm.model import export

    with entered(run) as place:
        export.export_model(
            place.run or run, place.path(directory), variable=variable, step=step, dtype=dtype, adapter=adapter
        )
