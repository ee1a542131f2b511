"""`bilevel evaluate`."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: a directory, .gguf file, cached hub id, or smollm2-135m.")],
    data: Annotated[list[str], typer.Option(metavar="FILE", help="A file of rows to evaluate on; repeatable.")],
    max_length: Annotated[int, typer.Option(help="Cut every row after this many tokens.")] = 1024,
    format: Annotated[
        str | None, typer.Option(help="The format of the rows, if it cannot be told from the first: messages, alpaca, ...")
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=COLUMN", help="What a column is: prompt=question; repeatable."),
    ] = None,
    template: Annotated[str, typer.Option(help="The chat template: auto, model or plain.")] = "auto",
    device: Annotated[str, typer.Option(help="The device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
) -> None:
    """Measure loss, perplexity and token accuracy of a model on the answers in data files."""
    from bilevel.errors import InputError
    from bilevel.terminal import Terminal
    from bilevel.trust import remote_code_is_trusted
    from bilevel_llm.evaluation import scores as evaluation

    fields = dict[str, str]()
    for one in field or []:
        role, equals, column = one.partition("=")
        if not (role and equals and column):
            raise InputError(f"--field {one}: write ROLE=COLUMN, for example prompt=question")
        fields[role] = column
    scores = evaluation.evaluate(
        model,
        data,
        max_length=max_length,
        format=format,
        fields=fields or None,
        template=template,  # type: ignore[arg-type]  # checked there, with all its names
        device=device,
        trust_remote_code=remote_code_is_trusted(),
    )
    evaluation.show(scores, Terminal())
    if json is not None:
        evaluation.write(scores, json)
