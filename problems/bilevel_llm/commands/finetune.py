"""`bilevel finetune`."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer


def finetune(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe of the problem llm-finetuning, if you have one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model: a directory, .gguf file, cached hub id, or smollm2-135m.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE", help="A file of training rows; repeatable.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A file of rows to evaluate on, never trained on; repeatable.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A file of test rows, also never trained on; repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The run's directory; the tuned model will be in DIR/model.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Train full, lisa (two random layers at a time) or lora. (default: full)")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The peak step size. (default: 1e-5; lora: 1e-4)")] = None,
    epochs: Annotated[float | None, typer.Option(help="Train for this many passes through the rows. (default: 1)")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for this many steps, in place of --epochs.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Train for this many tokens, prompts included.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Use this many rows per step. (default: 16)")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut every row after this many tokens. (default: 1024)")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of everything random. (default: 0)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --output; nothing else is needed.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the recipe: backend.dtype=bfloat16."),
    ] = None,
) -> None:
    """Tune a model on rows of data, and write it as a Hugging Face directory.

    The options make a recipe, which is written to DIR/recipe.yaml; they override the keys of a given RECIPE.
    """
    from bilevel.launch import rank
    from bilevel.plugins import load_plugins
    from bilevel.run_directory import RunDirectory
    from bilevel.working_directory import entered
    from bilevel_llm.finetuning.recipe import Length, finetune_recipe, output_of, with_length
    from bilevel_llm.finetuning.run import find_resumed, run

    given = find_resumed(output) if resume and recipe is None else recipe
    with ExitStack() as leaving:
        if given is not None:
            place = leaving.enter_context(entered(given))
            given, output = place.recipe, None if output is None else str(place.path(Path(output)))
        plugins, length = load_plugins(), Length(epochs, steps, tokens)
        described = finetune_recipe(
            given,
            settings={
                "problem.model": model,
                "problem.data": data or None,
                "problem.validation": [{"path": path, "name": Path(path).name} for path in validation or []] or None,
                "problem.held_out": held_out or None,
                "problem.batch_size": batch_size,
                "problem.max_length": max_length,
                "run.output": output,
                "run.seed": seed,
            },
            method=method,
            lr=lr,
            changes=changes or [],
        )
        directory = RunDirectory(output_of(described))
        if not resume and rank() == 0:
            directory.check_free()
        with directory.owned() if rank() == 0 else nullcontext():  # before the data are read, and until all is written
            run(with_length(described, plugins, lr=lr, length=length), resume=resume, observer=plugins.hooks)
