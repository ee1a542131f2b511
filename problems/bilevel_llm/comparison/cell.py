"""One cell of a comparison: a method with a seed, in stages. A finished stage has left its file and is not repeated.

weights/      the run that found the weights, if there was one
weights.json  the weights, and what they took        done: found
mix.jsonl     the rows; mix.jsonl.json beside it     done: drawn
tuned/        the fine-tuning run
model/        the tuned model; removed once scored, unless models are kept
tuning.json   steps, tokens, seconds                 done: tuned
scores.json   every metric; rows-NAME.npz, answers-NAME.jsonl     done: scored
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bilevel import Backend, InputError
from bilevel.agreement import first_then_others, on_first, together_at_length
from bilevel.config import Config
from bilevel.documents import read_json
from bilevel.errors import DamagedError
from bilevel.files import write_atomic
from bilevel.plugins import Plugins
from bilevel.record import total_seconds, total_size
from bilevel.run_directory import RunDirectory
from bilevel_llm.comparison.held_out import HeldOut, ModelScores, RowScores, joined, score_model
from bilevel_llm.comparison.methods import Found, Method
from bilevel_llm.comparison.settings import BASE, CompareSettings, Metric
from bilevel_llm.evaluation.placed_model import placed
from bilevel_llm.finetuning.recipe import Length, finetune_config
from bilevel_llm.mixing.draw import make_mix
from bilevel_llm.mixing.mix import Mix, card_file
from bilevel_llm.model.export import export_model
from bilevel_llm.model.files import find_model
from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    problem: the recipe's problem, with the rows of the first seed.
    data: seed -> the problem with the rows of that seed.
    backend: that section of the resolved recipe; every run has a backend of its own.
    meeting: the started backend by which the processes of a launcher meet between runs.
    """

    settings: CompareSettings
    problem: LLMReweighting
    data: Callable[[int], LLMReweighting]
    backend: Mapping[str, Any]
    meeting: Backend
    sets: Sequence[HeldOut]
    device: str
    plugins: Plugins
    keep_models: bool

    @property
    def model(self) -> str:
        """The model that is tuned."""
        return self.settings.model or self.problem.model

    @property
    def max_length(self) -> int:
        """The length in tokens at which training and test rows are cut."""
        return self.settings.finetune.max_length or self.problem.max_length

    def mix(self, found: Found, seed: int) -> Mix:
        """The mix drawn by these weights. Raises `InputError` if the data do not allow it."""
        settings = self.settings
        return make_mix(
            self.data(seed),
            found.weights,
            rows=settings.rows,
            tokens=settings.tokens,
            seed=seed,
            max_repeats=settings.max_repeats,
            on_shortfall=settings.on_shortfall,
            format=settings.format,
            selection=found.rows,
        )

    def tuning(self, data: str, seed: int, output: Path, *, steps: int | None = None) -> Config:
        """The fine-tuning run on a mix. Reads the data if they, and not `steps`, decide its length."""
        settings = self.settings.finetune
        return finetune_config(
            None,
            self.plugins,
            settings={
                "problem.model": self.model,
                "problem.data": data,
                "problem.max_length": self.max_length,
                "problem.batch_size": settings.batch_size,
                "problem.mean_over": settings.mean_over,
                "problem.template": self.problem.template,
                "problem.attention": self.problem.attention,
                "problem.trust_remote_code": self.problem.trust_remote_code,
                "backend": dict(self.backend),
                "run.output": str(output),
                "run.seed": seed,
            },
            method=settings.method,
            lr=settings.lr,
            length=Length(steps=steps) if steps is not None else self._length(),
            changes=[
                f"{section}.{key}={json.dumps(value)}"
                for section, values in (("active", settings.active), ("problem.lora", settings.lora))
                for key, value in values.items()
            ],
        )

    def _length(self) -> Length:
        settings = self.settings.finetune
        if settings.steps is not None or settings.tokens is not None:
            return Length(steps=settings.steps, tokens=settings.tokens)
        epochs = 1.0 if settings.epochs is None else settings.epochs
        if self.settings.tokens is not None:  # the same number of tokens for every method, however its mix was cut
            return Length(tokens=max(1, round(epochs * self.settings.tokens)))
        return Length(epochs=epochs)


@dataclass(frozen=True)
class DrawnRows:
    """How many rows were drawn from a source."""

    rows: int


@dataclass(frozen=True)
class Drawn:
    """What a comparison needs to know of a mix; its card says more.

    departures: where it is not what the weights ask for.
    """

    rows: int
    tokens: int
    sources: Mapping[str, DrawnRows]
    departures: Sequence[str] = ()


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning took.

    loss: the training loss of its last step, in nats a token.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Cell:
    """A method with a seed. `method` None: the model as it is."""

    bench: Bench
    directory: Path
    method: Method | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The method and the seed."""
        return f"{self.method.label}, seed {self.seed}" if self.method is not None else BASE

    @property
    def done(self) -> bool:
        """Whether all stages are done."""
        return self._scores_file.exists()

    @property
    def found(self) -> Found:
        """The weights that were found."""
        return read_json(self._weights_file, Found)

    @property
    def drawn(self) -> Drawn:
        """What was drawn, from the card of the mix."""
        return read_json(card_file(self._mix_file), Drawn)

    @property
    def tuned(self) -> Tuned:
        """What the fine-tuning took."""
        return read_json(self._tuning_file, Tuned)

    @property
    def metrics(self) -> Mapping[str, float]:
        """`metric/test set` -> value."""
        scores = read_json(self._scores_file, dict[str, float])
        for key in self._measured:
            if key not in scores:
                raise DamagedError(f"{self._scores_file}: it does not hold {key}")
        return scores

    @cached_property
    def rows(self) -> Mapping[str, RowScores]:
        """Test set -> the scores of its rows."""
        return {s.name: RowScores.load(self._rows_file(s.name), s.metrics) for s in self.bench.sets}

    def check(self) -> None:
        """Read what finished stages have left. Raises `DamagedError`, naming the file, for what is not as it was written."""
        try:
            if self._weights_file.exists():
                _ = self.found
            if card_file(self._mix_file).exists():
                _ = self.drawn
            if self._tuning_file.exists():
                _ = self.tuned
            if self.done:
                _ = self.metrics, self.rows
        except DamagedError as error:
            raise DamagedError(f"{error}; remove {self.directory}, and all that it held is made again") from error

    def run(self) -> None:
        """Run the stages that are not done yet. Every process takes part; the first one writes."""
        self._on_first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        if self.method is not None:
            self._find(self.method)
            self._on_first(self._draw)
            self._on_first(self._take_over)
            self._tune()
        if not self._there(self._scores_file):
            self._score()
        if self.method is not None and not self.bench.keep_models:
            self._on_first(self._forget)

    def _on_first(self, act: Callable[[], None]) -> None:
        """Do what may take a while in the first process, with the others waiting for it."""
        first = self.bench.meeting.shard.rank == 0
        together_at_length(self.bench.meeting, act if first else lambda: None)

    def _there(self, file: Path) -> bool:
        """Whether a file is there, for the first process, and so for all."""
        return on_first(self.bench.meeting, file.exists)

    def _find(self, method: Method) -> None:
        if not self._there(self._weights_file):
            found = method.find(self.seed, self.directory / "weights")
            self._on_first(lambda: _write(self._weights_file, dataclasses.asdict(found)))

    def _draw(self) -> None:
        if card_file(self._mix_file).exists():
            return
        self._mix_file.unlink(missing_ok=True)  # the mix is whole, but its card was never written
        mix = self.bench.mix(self.found, self.seed)
        for note in mix.departures():
            log.warning("mix of %s: %s", self.name, note)
        mix.write(self._mix_file, {"weights": self.found.origin})

    def _take_over(self) -> None:
        """Take what a finished cell of this seed has found, if its mix is the same: the same model would be tuned."""
        if self._tuning_file.exists() or self.bench.keep_models:
            return
        for directory in sorted(self.directory.parent.parent.glob(f"*/{self.directory.name}")):
            other = Cell(self.bench, directory)
            if other.done and filecmp.cmp(self._mix_file, other._mix_file, shallow=False):
                log.info("%s: the mix is that of %s, and so are the scores", self.name, directory.parent.name)
                shutil.copytree(directory / "tuned", self.directory / "tuned", dirs_exist_ok=True)
                scores = [*directory.glob("rows-*.npz"), *directory.glob("answers-*.jsonl"), other._scores_file]
                for file in (*scores, other._tuning_file):  # the last one says that the rest is there
                    write_atomic(self.directory / file.name, file.read_bytes())
                return

    def _tune(self) -> None:
        if self._there(self._tuning_file):
            return
        bench, output = self.bench, self.directory / "tuned"
        config = first_then_others(bench.meeting, lambda: bench.tuning(str(self._mix_file), self.seed, output))
        resume = self._there(RunDirectory(output).recipe_file)
        history = config.fit(resume=resume, observer=bench.plugins.hooks).history
        tuned = Tuned(len(history), total_size(history), total_seconds(history), history[-1].metrics["lower_loss"])

        def keep() -> None:
            model = self.directory / "model"
            shutil.rmtree(model, ignore_errors=True)  # left by a call that stopped before writing `tuning.json`
            export_model(output, model)
            _write(self._tuning_file, dataclasses.asdict(tuned))

        self._on_first(keep)

    def _score(self) -> None:
        """All processes score together."""
        bench = self.bench
        problem, settings = bench.problem, bench.settings
        files = find_model(bench.model if self.method is None else str(self.directory / "model"))
        on_cpu = torch.device(bench.device).type == "cpu"
        with placed(
            files,
            bench.meeting,
            on_cpu=on_cpu,
            attention=problem.attention,
            trust_remote_code=problem.trust_remote_code,
        ) as model:
            found = score_model(model, bench.sets, max_new_tokens=settings.max_new_tokens)
        parts = bench.meeting.all_gather(found)
        self._on_first(lambda: self._keep(joined(parts)))

    def _keep(self, found: ModelScores) -> None:
        for name, texts in found.answers.items():
            lines = [json.dumps({"answer": text}, ensure_ascii=False) + "\n" for text in texts]
            write_atomic(self.directory / f"answers-{name}.jsonl", "".join(lines))
        for name, one in found.rows.items():
            one.save(self._rows_file(name))
        _write(self._scores_file, {key: found.rows[name].value(metric) for key, (metric, name) in self._measured.items()})

    def _forget(self) -> None:
        """Remove what is large and no longer needed."""
        for directory in ("model", "tuned/checkpoints", "weights/checkpoints"):
            shutil.rmtree(self.directory / directory, ignore_errors=True)

    @property
    def _measured(self) -> Mapping[str, tuple[Metric, str]]:
        """`metric/test set` -> the two."""
        return {f"{metric}/{s.name}": (metric, s.name) for s in self.bench.sets for metric in s.metrics}

    @property
    def _weights_file(self) -> Path:
        return self.directory / "weights.json"

    @property
    def _tuning_file(self) -> Path:
        return self.directory / "tuning.json"

    @property
    def _mix_file(self) -> Path:
        return self.directory / "mix.jsonl"

    @property
    def _scores_file(self) -> Path:
        return self.directory / "scores.json"

    def _rows_file(self, name: str) -> Path:
        return self.directory / f"rows-{name}.npz"


def check_tuning(bench: Bench) -> None:
    """Raises `InputError` if the fine-tuning's settings cannot be used, or if its batch is larger than a mix."""
    settings = bench.settings
    if settings.rows is not None and settings.finetune.batch_size > settings.rows:
        raise InputError(
            f"compare.finetune.batch_size is {settings.finetune.batch_size}, and a mix has {settings.rows} rows"
        )
    first = bench.problem.sources[0].path
    data = first if isinstance(first, str) else first[0]
    bench.tuning(data, 0, Path("unused"), steps=settings.finetune.steps or 2)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(content, indent=1, ensure_ascii=False))
