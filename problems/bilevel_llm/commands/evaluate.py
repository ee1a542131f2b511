"""`bilevel evaluate`."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub id in the cache, or smollm2-135m.")],
    data: Annotated[list[str], typer.Option(metavar="FILE", help="Rows to evaluate on; may be given several times.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a row; the rest is cut.")] = 1024,
    template: Annotated[str, typer.Option(help="auto, model or plain: the chat template.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Let the model bring code.")] = False,
) -> None:
    """Measure loss, perplexity and token accuracy of a model on the answers in data files."""
    from rich.console import Console

    from bilevel_llm.evaluation import scores as evaluation

    scores = evaluation.evaluate(
        model,
        data,
        max_length=max_length,
        template=template,  # type: ignore[arg-type]  # checked there, with all its names
        device=device,
        trust_remote_code=trust_remote_code,
    )
    Console().print(evaluation.table(scores))
    if json is not None:
        evaluation.write(scores, json)
