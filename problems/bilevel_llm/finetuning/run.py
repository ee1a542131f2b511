"""Fine-tune, write the model, and say how well it does."""

from __future__ import annotations

from pathlib import Path

from bilevel import InputError
from bilevel.config import Config
from bilevel.launch import rank
from bilevel.loop import Observer
from bilevel.run_directory import RunDirectory
from bilevel.terminal import Terminal
from bilevel_llm.evaluation.scores import evaluate, show, write
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.export import check_new, export_model


def find_resumed(output: str | None) -> Path:
    """The recipe of the run to resume. Raises `InputError` if there is none."""
    if output is None:
        raise InputError("--output is missing: the directory of the run to resume")
    file = RunDirectory(Path(output)).recipe_file
    if not file.is_file():
        raise InputError(f"there is no run to resume in {output} (no {file.name} there); run without --resume")
    return file


def run(config: Config, *, resume: bool, observer: Observer) -> None:
    """Train, export to OUTPUT/model, and evaluate that on the whole validation sets (OUTPUT/evaluation.json).

    resume: do what is left to do of that.

    Raises `InputError` before anything is trained, and whatever `fit` raises.
    """
    assert isinstance(config.problem, FineTuning)
    assert config.run.output is not None  # a recipe must say it
    output = Path(config.run.output)
    model, scored = output / "model", output / "evaluation.json"
    trained = resume and model.exists() and config.run.limit in RunDirectory(output).saved()
    if resume and not trained:
        check_new(model)
    config.fit(resume=resume, observer=observer)
    if rank() != 0:  # the first process writes
        return
    if not trained:
        scored.unlink(missing_ok=True)  # it would be about an earlier model
        export_model(output, model)
    problem = config.problem
    if problem.validation and not scored.exists():
        scores = evaluate(
            str(model),
            problem.validation,
            max_length=problem.max_length,
            template=problem.template,
            on_bad_row=problem.on_bad_row,
            trust_remote_code=problem.trust_remote_code,
        )
        write(scores, scored)
        show(scores, Terminal())
