"""`bilevel init`: a first recipe for a model and data."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def init(
    model: Annotated[str, typer.Option(help="The model: a directory, .gguf file, cached hub id, or smollm2-135m.")],
    target: Annotated[
        list[str], typer.Option(metavar="FILE", help="A file of rows like those the model must do well on; repeatable.")
    ],
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A source: a file, a glob, or a folder, of which every file and folder is one; repeatable.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    run: Annotated[str, typer.Option(help="The directory that the run will have.")] = "runs/weights",
    template: Annotated[Literal["auto", "model", "plain"], typer.Option(help="The chat template.")] = "auto",
    device: Annotated[str, typer.Option(help="The device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Search for the step size, and measure time and memory.")
    ] = True,
) -> None:
    """Look at a model and data, and write a recipe that learns weights for the sources, with the reason of each setting."""
    import shlex

    from bilevel.errors import InputError
    from bilevel.files import write_atomic
    from bilevel.plugins import load_plugins
    from bilevel.schema import schema_text
    from bilevel.terminal import Terminal
    from bilevel_llm.first_recipe.measured import measure
    from bilevel_llm.first_recipe.named_sources import named_sources
    from bilevel_llm.first_recipe.text import recipe_text

    if output.exists():
        raise InputError(f"--output {output} exists, and nothing is overwritten; name another file or remove it")
    if output.suffix not in (".yaml", ".yml") or not output.parent.is_dir():
        raise InputError(f"--output {output}: name a .yaml file in a folder that exists")
    sources = named_sources(source or [], target)
    if len(sources) < 2:
        raise InputError(f"--source: there {'is one' if sources else 'is none'}; name two or more, to be weighed")
    plugins = load_plugins()
    found = measure(model, sources, target, plugins, output=run, template=template, device=device, probe=probe)
    schema = output.with_name("bilevel.schema.json")
    write_atomic(schema, schema_text(plugins))
    text = recipe_text(found, schema=schema.name)
    write_atomic(output, text)
    console = Terminal()
    console.print(text, soft_wrap=True)
    console.print(f"written to {output}; learn the weights by\n    bilevel run {shlex.quote(str(output))}", soft_wrap=True)
