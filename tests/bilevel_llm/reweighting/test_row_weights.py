"""Weights of single rows, and scorers of rows: against sums over all rows, one at a time through the plain model."""

import io
import json
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import AdamW, InputError, ScaleBiO, fit, hookimpl
from bilevel.record import Record
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.data.features import SourceRows
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.reweighting.granularity import Granularity, PerSample, PerScorer, PerSource
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import WORDS, sentences, write_rows

Make = Callable[..., LLMReweighting]
NOISE = [chr(c) * 3 for c in range(65, 91)]
SIZES = {"one": 8, "two": 8, "three": 16}
BY_ROW = {
    "sample": PerSample(),
    "linear": PerScorer(["length", "hashed-words"]),
    "hidden": PerScorer("length", hidden=3),
}


@pytest.fixture
def small(problem: Make, tmp_path: Path) -> Make:
    """32 rows in three sources, all of which a few batches hold; weights start apart, and have a floor."""
    words = {"one": WORDS, "two": [word[::-1] for word in WORDS], "three": NOISE}
    sources = [Source(n, write_rows(tmp_path / f"{n}.jsonl", sentences(s, SIZES[n], words[n]))) for s, n in enumerate(SIZES)]

    def make(granularity: Granularity, **settings: Any) -> LLMReweighting:
        initial = {"one": 0.5, "two": 0.2, "three": 0.3}
        fields = {"sources": sources, "initial": initial, "floor": 0.1, "batch_size": 6, **settings}
        return problem(granularity=granularity, **fields)

    return make


def scatter(module: torch.nn.Module) -> None:
    """Parameters away from their start, where a scorer's rows are all alike."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=0.5)


def placed(p: LLMReweighting, **settings: Any) -> tuple[TorchBackend, Any, Any]:
    backend = TorchBackend(device="cpu", **settings)
    backend.start(seed=3)
    x = backend.place("x", p.upper, AdamW(), sharded=False)
    y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
    backend.activate(y, y.blocks.names)
    scatter(x.module)
    return backend, x, y


def row_losses(p: LLMReweighting, y: Any) -> Tensor:
    """The mean over a row's labelled tokens, for all rows of all sources. Shape: (32,)."""
    losses = []
    for table in p._train.values():
        for row in range(len(table)):
            ids, labels = (torch.from_numpy(part) for part in table.row(row))
            with torch.no_grad():
                logits = y.module.model(input_ids=ids[None].long()).logits[0]
            losses.append(F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")[labels[1:]].mean())
    return torch.stack(losses).double()


def whole_objective(p: LLMReweighting, x: dict[str, Tensor], y: Any) -> tuple[float, dict[str, Tensor]]:
    """Σ_r p_r L_r over all rows, and its gradient in x by autograd."""
    module = p.upper()
    module.load_state_dict(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    total = row_distribution(p, module) @ row_losses(p, y)
    return float(total.detach()), dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def row_distribution(p: LLMReweighting, module: torch.nn.Module) -> Tensor:
    """p_r as `granularity` defines it, from the module's parameters, written out again."""
    sizes = torch.tensor([len(table) for table in p._train.values()])
    n = torch.repeat_interleave(sizes, sizes).double()
    k, floor = len(sizes), p.floor
    start = torch.repeat_interleave(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), sizes) / n
    if isinstance(p.granularity, PerSample):
        score = module.score.logits
    else:
        columns = torch.from_numpy(p._features[1].values)
        inner = (
            torch.tanh(columns @ module.score.hidden.weight.T + module.score.hidden.bias)
            if p.granularity.hidden
            else columns
        )
        score = inner @ module.score.out.weight[0]
    tilted = (start - floor / n) / (1 - k * floor) * score.exp()
    return floor / n + (1 - k * floor) * tilted / tilted.sum()


def step_gradients(p: LLMReweighting, **settings: Any) -> dict[str, Tensor]:
    """Gradients of x and y for the passes of a step, as a solver asks for them."""
    backend, x, y = placed(p, **settings)
    backend.backward(lambda b: p.lower_loss(x, y, b), p.lower_batch(5, backend.shard), wrt={x: 10.0, y: 1.0})
    backend.backward(lambda b: p.upper_loss(x, y, b), p.upper_batch(5, backend.shard), wrt={x: 1.0, y: 0.1})
    found = {f"x.{name}": g for name, g in x.gradients.items()} | {f"y.{name}": g for name, g in y.gradients.items()}
    backend.close()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """1e-5 relative to each tensor's largest entry, in float32: what differs is the order of summation."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - found[name]).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("kind", BY_ROW)
def test_the_gradient_of_a_batch_of_all_rows_is_that_of_the_sum_over_all_rows(
    small: Make, tmp_path: Path, kind: str
) -> None:
    """Equal sizes, so that one batch holds every row once. The reference differentiates Σ_r p_r L_r written out.

    The model is in float64, as x's gradient is a small difference of losses. 1e-4: tokens' weights, which are float32,
    round a loss of 5.5 by 3e-7, and the smallest of these gradients is 1e-3.
    """
    sources = [Source(n, write_rows(tmp_path / f"all-{n}.jsonl", sentences(s, 8))) for s, n in enumerate(SIZES)]
    p = small(BY_ROW[kind], sources=sources, batch_size=24)
    p.prepare()
    backend, x, y = placed(p, dtype="float64", micro_batch_size=5)
    found = backend.backward(lambda b: p.lower_loss(x, y, b), p.lower_batch(0, backend.shard), wrt={x: 1.0})
    total, expected = whole_objective(p, backend.weights(x), y)
    assert found.value == pytest.approx(total, rel=1e-6)
    assert_same(dict(x.gradients), expected, 1e-4)
    backend.close()


@pytest.mark.parametrize("kind", BY_ROW)
def test_the_mean_over_the_batches_of_an_epoch_is_the_sum_over_all_rows(small: Make, kind: str) -> None:
    """Two rows of each source a batch: after 8 batches rows of `one` and `two` were seen twice, those of `three` once.

    A walk without replacement makes the mean exact, not only its expectation; a batch that normalized its own weights
    would miss it by far, which is checked too.
    """
    p = small(BY_ROW[kind])
    p.prepare()
    backend, x, y = placed(p, dtype="float64")
    batches = [p.lower_batch(index, backend.shard) for index in range(8)]
    values = [backend.backward(lambda b: p.lower_loss(x, y, b), batch, wrt={x: 1 / 8}).value for batch in batches]
    total, expected = whole_objective(p, backend.weights(x), y)
    assert np.mean(values) == pytest.approx(total, rel=1e-6)
    assert np.std(values) > 1e-3  # the batches do differ
    assert_same(dict(x.gradients), expected, 1e-4)
    with torch.no_grad():
        weights, losses = x(slice(None)), row_losses(p, y)
    own = [float((weights[b.rows] / weights[b.rows].sum()) @ losses[b.rows]) for batch in batches for b in batch]
    assert abs(np.mean(own) - total) > 1e-4 * total
    backend.close()


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("kind", BY_ROW)
def test_gradients_do_not_depend_on_the_micro_batch_size(small: Make, kind: str, micro_batch_size: int) -> None:
    whole = step_gradients(small(BY_ROW[kind], prior_strength=0.3))
    assert_same(step_gradients(small(BY_ROW[kind], prior_strength=0.3), micro_batch_size=micro_batch_size), whole)


@pytest.mark.parametrize("kind", BY_ROW)
def test_gradients_do_not_depend_on_padding(small: Make, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    whole = step_gradients(small(BY_ROW[kind]))
    original = LLMReweighting.lower_batch

    def padded(self: LLMReweighting, index: int, shard: Any) -> Any:
        out = []
        for b in original(self, index, shard):
            places = b.positions + b.positions // b.ids.shape[1] * 7
            out.append(replace(b, ids=F.pad(b.ids, (0, 7), value=11), positions=places))
        return out

    monkeypatch.setattr(LLMReweighting, "lower_batch", padded)
    assert_same(step_gradients(small(BY_ROW[kind])), whole)


@pytest.mark.parametrize("kind", BY_ROW)
def test_gradients_summed_over_processes_are_those_of_one(small: Make, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    whole = step_gradients(small(BY_ROW[kind]))
    usual = TorchBackend.shard.fget
    total: dict[str, Tensor] = {}
    for rank in range(2):
        shard = property(lambda self, rank=rank: replace(usual(self), rank=rank, world_size=2))  # type: ignore[misc]
        monkeypatch.setattr(TorchBackend, "shard", shard)
        for name, gradient in step_gradients(small(BY_ROW[kind]), micro_batch_size=2).items():
            total[name] = total.get(name, 0) + gradient
    assert_same(total, whole)


@pytest.mark.parametrize("kind", BY_ROW)
def test_at_the_start_every_granularity_is_the_one_by_source(small: Make, kind: str) -> None:
    """Same weights of sources, same lower loss, same pull to the prior."""
    values = []
    for granularity in (PerSource(), BY_ROW[kind]):
        p = small(granularity, prior={"one": 1, "two": 1, "three": 2}, prior_strength=0.5)
        p.prepare()
        backend = TorchBackend(device="cpu")
        backend.start(seed=3)
        x = backend.place("x", p.upper, AdamW(), sharded=False)
        y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
        assert p.summary(x) == pytest.approx({"one": 0.5, "two": 0.2, "three": 0.3}, rel=1e-12)
        lower = backend.evaluate(lambda b: p.lower_loss(x, y, b), p.lower_batch(0, backend.shard))
        upper = backend.evaluate(lambda b: p.upper_loss(x, y, b), p.upper_batch(0, backend.shard))
        values.append({"lower": lower.value, **lower.parts, "upper": upper.value})
        backend.close()
    assert values[1] == pytest.approx(values[0], rel=1e-9)


def test_no_source_falls_below_the_floor_however_its_rows_score(small: Make) -> None:
    p = small(PerSample())
    p.prepare()
    module = p.upper()
    with torch.no_grad():
        module.score.logits[:8] = 300.0
    module.requires_grad_(False)
    assert module().tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert module(torch.tensor([8, 31])).tolist() == pytest.approx([0.1 / 8, 0.1 / 16])
    assert float(module(slice(None)).sum()) == pytest.approx(1)


def half_corrupted(tmp_path: Path) -> list[Source]:
    """`mixed` has, in turn, rows written like the target and rows of shouted noise; `other` has a language of its own."""
    pairs = zip(sentences(1, 12), sentences(3, 12, NOISE), strict=True)
    return [
        Source("mixed", write_rows(tmp_path / "mixed.jsonl", [row for pair in pairs for row in pair])),
        Source("other", write_rows(tmp_path / "other.jsonl", sentences(2, 12, [word[::-1] for word in WORDS]))),
    ]


def test_corrupted_rows_of_a_source_end_below_its_clean_rows(problem: Make, tmp_path: Path) -> None:
    p = problem(sources=half_corrupted(tmp_path), batch_size=12, granularity=PerSample())
    output = tmp_path / "run"
    solver = ScaleBiO(penalty=2.0, lr_x=0.3, lr_z=3e-3, warmup=15)
    result = fit(p, solver, TorchBackend(device="cpu"), steps=45, output=output)

    import pyarrow.parquet as pq

    rows = pq.read_table(output / "sample_weights.parquet").to_pylist()
    assert sum(row["weight"] for row in rows) == pytest.approx(1)
    mixed = [row["weight"] for row in rows if row["source"] == "mixed"]
    assert [row["row"] for row in rows if row["source"] == "mixed"] == list(range(1, 25))
    assert {Path(row["file"]).name for row in rows} == {"mixed.jsonl", "other.jsonl"}
    assert min(mixed[0::2]) > max(mixed[1::2])
    assert sum(mixed[0::2]) > 4 * sum(mixed[1::2])
    written = json.loads((output / "weights.json").read_text())
    assert written["sources"] == result.history[-1].upper
    assert written["sources"]["mixed"] == pytest.approx(sum(mixed), rel=1e-9)
    assert written["granularity"] == {"max_rows": 1_000_000, "per": "sample"}


def capitals(source: SourceRows) -> dict[str, Any]:
    """A feature that tells noise from the rest, and one that tells nothing."""
    texts = ["".join(turn.text for turn in row.turns) for row in source.rows]
    nothing = np.arange(len(texts)) // 2 % 2  # as often 1 among clean as among corrupted rows, and in each source
    return {"share": [sum(map(str.isupper, text)) / len(text) for text in texts], "nothing": nothing}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make functions of this module known as a third party's features."""

    def as_plugin(**functions: Any) -> None:
        @hookimpl
        def bilevel_features(register):  # type: ignore[no-untyped-def]
            for name in functions:
                register(name, f"plugin_features:{name}")

        module = types.ModuleType("plugin_features")
        for name, value in {"bilevel_features": bilevel_features, **functions}.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "plugin_features", module)
        own = [point for point in entry_points(group="bilevel") if point.name.startswith("bilevel")]
        points = [*own, EntryPoint("features", "plugin_features", "bilevel")]
        monkeypatch.setattr("bilevel.plugins.entry_points", lambda group: points)

    return as_plugin


def test_a_scorer_learns_the_sign_of_an_informative_feature(
    problem: Make, tmp_path: Path, register: Callable[..., None]
) -> None:
    register(capitals=capitals)
    p = problem(sources=half_corrupted(tmp_path), batch_size=12, granularity=PerScorer("capitals"))
    solver = ScaleBiO(penalty=2.0, lr_x=0.1, lr_z=3e-3, warmup=15)
    output = tmp_path / "run"
    result = fit(p, solver, TorchBackend(device="cpu"), steps=45, output=output)
    features = json.loads((output / "scorer.json").read_text())["features"]
    assert list(features) == ["capitals.share", "capitals.nothing"]
    assert features["capitals.share"]["weight"] < -0.5
    assert abs(features["capitals.nothing"]["weight"]) < 0.5 * abs(features["capitals.share"]["weight"])
    assert sum(result.history[-1].upper.values()) == pytest.approx(1)


def test_scorer_json_is_enough_to_score_rows(small: Make) -> None:
    """Weights computed from the file and the features as they are, up to the normalizer."""
    for granularity in (PerScorer("length"), PerScorer("length", hidden=3)):
        p = small(granularity, floor=0.0)
        p.prepare()
        module = p.upper()
        scatter(module)
        files = p.snapshot(module.state_dict())
        learned = json.loads(files["scorer.json"])
        table = next(iter(p._train.values()))
        raw = {"length.log_tokens": np.log(table.lengths), "length.labelled_share": table.supervised / table.lengths}
        f = learned["features"]
        standard = np.stack([(raw[name] - f[name]["mean"]) / f[name]["scale"] for name in raw], axis=1)
        if "tanh" in learned:
            layers = learned["tanh"]
            score = np.tanh(standard @ np.array(layers["matrix"]).T + layers["bias"]) @ np.array(layers["out"])
        else:
            score = standard @ np.array([f[name]["weight"] for name in raw])
        expected = np.exp(score) / np.exp(score).sum()
        import pyarrow.parquet as pq

        written = pq.read_table(io.BytesIO(files["sample_weights.parquet"]))["weight"].to_numpy()[: len(table)]
        np.testing.assert_allclose(written / written.sum(), expected, rtol=1e-9)


def test_an_interrupted_run_of_row_weights_ends_with_the_same_files(small: Make, tmp_path: Path) -> None:
    def go(where: str, steps: int, resume: bool = False) -> list[bytes]:
        backend = TorchBackend(device="cpu", micro_batch_size=4)
        solver = ScaleBiO(penalty=2.0, lr_z=1e-3, warmup=2)
        fit(small(PerSample()), solver, backend, steps=steps, output=tmp_path / where, resume=resume)
        return [(tmp_path / where / name).read_bytes() for name in ("weights.json", "sample_weights.parquet")]

    whole = go("whole", 7)
    cut = go("cut", 4)
    assert go("cut", 7, resume=True) == whole
    assert cut[1] != whole[1]


def test_rows_that_were_drawn_too_seldom_are_said_to(small: Make) -> None:
    p = small(PerSample())
    p.prepare()
    parts = {"upper_parts": {"validation": 1.0}, "gap_parts": dict.fromkeys(SIZES, 0.0)}
    metrics = {"lower_loss": 1.0, "gap": 0.0, "penalty": 1.0}
    history = [Record(t, 0.1, dict.fromkeys(SIZES, 1 / 3), metrics=metrics, parts=parts) for t in range(39)]
    found = {finding.name: finding for finding in p.findings(history)}
    assert found["rows-seldom"].flagged
    assert "a row of 'three' was drawn 4.9 times" in found["rows-seldom"].sentence
    assert "rows-seldom" not in {finding.name for finding in p.findings([*history, history[-1]])}


def test_hashed_words_see_words_and_not_their_number_or_case(tmp_path: Path, problem: Make) -> None:
    rows = [{"text": text} for text in ("A cat sat", "a cat sat a cat sat", "SAT, cat: a!", "blue hat")]
    p = problem(
        sources=[Source("rows", write_rows(tmp_path / "w.jsonl", rows))], granularity=PerScorer("hashed-words"), batch_size=2
    )
    names, features = p._features
    assert len(names) == 64
    raw = features.values * features.scale + features.mean
    np.testing.assert_allclose(raw[1], raw[0], atol=1e-12)
    np.testing.assert_allclose(raw[2], raw[0], atol=1e-12)
    assert abs(raw[0] @ raw[3]) < 0.5
    blue, hat = zlib.crc32(b"blue"), zlib.crc32(b"hat")  # by a hash that is the same in every process
    assert set(np.flatnonzero(raw[3])) == {blue % 64, hat % 64}
    np.testing.assert_allclose(np.linalg.norm(raw, axis=1), 1)


def test_rows_as_text_stand_in_the_order_of_the_table(problem: Make, tmp_path: Path) -> None:
    """Of two files and with a row left out, which has nothing to learn within max_length."""
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a" * 70, "completion": "b"}
    files = [
        write_rows(tmp_path / "1.jsonl", [short, long, {**short, "prompt": "c"}]),
        write_rows(tmp_path / "2.jsonl", [short]),
    ]
    p = problem(sources=[Source("rows", files)], granularity=PerSample())
    source = SourceRows("rows", p._train["rows"])
    assert [row.where for row in source.rows] == [f"{files[0]}:1", f"{files[0]}:3", f"{files[1]}:1"]
    assert [source.table.where(i) for i in range(3)] == [row.where for row in source.rows]


def test_one_source_is_enough_where_rows_have_weights(problem: Make, data: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="granularity: {per: sample}"):
        problem(sources=[Source("clean", data["clean"])])
    p = problem(sources=[Source("clean", data["clean"])], granularity=PerSample())
    result = fit(p, ScaleBiO(lr_x=0.2, lr_z=1e-3, warmup=1), TorchBackend(device="cpu"), steps=3)
    assert result.history[-1].upper["clean"] == pytest.approx(1)
    assert result.x["score.logits"].std() > 0


def fails(source: SourceRows) -> Any:
    raise KeyError("colour")


def too_few(source: SourceRows) -> Any:
    return {"a": [1.0]}


def not_finite(source: SourceRows) -> Any:
    return {"a": np.where(np.arange(len(source.table)) == 2, np.nan, 1.0)}


def changing(source: SourceRows) -> Any:
    return {source.name: np.ones(len(source.table))}


def no_mapping(source: SourceRows) -> Any:
    return np.ones((len(source.table), 2))


def words(source: SourceRows) -> Any:
    return {"a": ["x"] * len(source.table)}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, r"'fails' fail on source 'one': KeyError: 'colour'"),
        (too_few, r"'too_few\.a' of source 'one' has shape \(1,\).*8 rows"),
        (not_finite, r"'not_finite\.a' is nan for the row .*one\.jsonl:3"),
        (changing, r"'changing'.*columns.*source 'two'"),
        (no_mapping, r"'no_mapping' must give a mapping .* gave ndarray"),
        (words, r"'words\.a' of source 'one' is not an array of numbers"),
    ],
)
def test_features_that_are_no_numbers_of_rows_are_refused(
    small: Make, register: Callable[..., None], function: Any, message: str
) -> None:
    register(**{function.__name__: function})
    with pytest.raises(InputError, match=message):
        small(PerScorer(function.__name__)).prepare()


def test_a_constant_feature_says_nothing_and_breaks_nothing(problem: Make, register: Callable[..., None]) -> None:
    """0.1 in 94 rows has a mean that is not quite 0.1; divided by its deviation, that would be as good a feature as any."""
    register(constant=lambda source: {"a": np.full(len(source.table), 0.1)})
    p = problem(granularity=PerScorer("constant"))
    p.prepare()
    assert not p._features[1].values.any()
    module = p.upper()
    scatter(module)
    assert module().tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)


@pytest.mark.parametrize(
    ("granularity", "settings", "message"),
    [
        (
            PerScorer("lenght"),
            {"sources": [Source("x", "not/read.jsonl")]},
            "no feature is named 'lenght'; did you mean 'length'",
        ),
        (PerSample(max_rows=31), {}, r"one weight for each of 32 rows.*\{per: scorer\}.*max_rows \(31\)"),
        (PerSample(), {"floor": 0.25}, r"problem\.initial starts 'two' at 0\.2.*problem\.floor=0\.25"),
        (PerSource(), {"floor": 0.2}, r"problem\.initial starts 'two' at 0\.2.*problem\.floor=0\.2"),
    ],
)
def test_what_cannot_be_weighted_is_said_before_the_model_is_loaded(
    small: Make, monkeypatch: pytest.MonkeyPatch, granularity: Granularity, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=message):
        fit(small(granularity, **settings), ScaleBiO(), TorchBackend(device="cpu"), steps=2)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{per: sample}", None),
        ("{per: scorer, features: length}", None),
        ("{per: scorer, features: [length, hashed-words], hidden: 4}", None),
        ("{per: row}", r"recipe\.yaml:9: problem\.granularity is .*'source', 'sample', 'scorer'"),
        ("{per: scorer}", r"recipe\.yaml:9: problem\.granularity\.features is missing"),
        ("{per: scorer, features: []}", r"recipe\.yaml:9: problem\.granularity: features: name at least one"),
        (
            "{per: scorer, features: [length, length]}",
            r"recipe\.yaml:9: problem\.granularity: features: a name is given twice",
        ),
        ("{per: scorer, features: length, hidden: -1}", r"recipe\.yaml:9: .*hidden must be at least 0"),
        ("{per: sample, features: length}", r"recipe\.yaml:9: .*problem\.granularity\.features"),
        ("{per: sample, max_rows: 0}", r"recipe\.yaml:9: .*max_rows must be at least 1"),
    ],
)
def test_recipes_say_what_has_a_weight(plugins: Any, tmp_path: Path, written: str, message: str | None) -> None:
    from bilevel.config import load_config

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""problem:
  name: llm-reweighting
  model: some/model
  sources:
    - {{name: a, path: x.jsonl}}
    - {{name: b, path: y.jsonl}}
  validation: [{{path: z.jsonl}}]
  batch_size: 4
  granularity: {written}
solver: {{name: scalebio}}
backend: {{name: torch, device: cpu}}
run: {{steps: 2, output: out}}
""")
    if message is None:
        config = load_config(recipe, plugins)
        assert config.recipe["problem"]["granularity"].items() >= {"per": config.problem.granularity.per}.items()
        return
    with pytest.raises(InputError, match=message):
        load_config(recipe, plugins)


def test_targets_scale_their_parts_and_gradients(problem: Make, data: dict[str, str]) -> None:
    """f = Σ w_t f_t / Σ w_t, so its gradient at weights (3, 1) is ¾ of the one set's plus ¼ of the other's."""

    def gradient(one: float, two: float) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        p = problem(
            validation=[ValidationSet(data["target"], "one", weight=one), ValidationSet(data["noise"], "two", weight=two)]
        )
        backend, x, y = placed(p, micro_batch_size=3)
        found = backend.backward(lambda b: p.upper_loss(x, y, b), p.upper_batch(0, backend.shard), wrt={y: 1.0})
        gradients = dict(y.gradients)
        backend.close()
        return found.value, dict(found.parts), gradients

    value, parts, both = gradient(3.0, 1.0)
    assert value == pytest.approx(0.75 * parts["one"] + 0.25 * parts["two"], rel=1e-9)
    assert parts == pytest.approx(gradient(1.0, 5.0)[1], rel=1e-9)  # a set's own loss does not depend on the weights
    _, _, first = gradient(1.0, 1e-12)
    _, _, second = gradient(1e-12, 1.0)
    assert_same(both, {name: 0.75 * first[name] + 0.25 * second[name] for name in first})


def test_a_target_s_weight_does_not_depend_on_its_rows(problem: Make, data: dict[str, str], tmp_path: Path) -> None:
    """A set of 30 rows and one of 4, batch by batch: each counts as its weight says, however many rows a batch has of it."""
    few = write_rows(tmp_path / "few.jsonl", sentences(9, 4, NOISE))
    sets = [ValidationSet(data["target"], "many"), ValidationSet(few, "few", weight=2.0)]
    p = problem(validation=sets, validation_batch_size=7)
    backend, x, y = placed(p, micro_batch_size=3)
    for index in range(3):
        batch = p.upper_batch(index, backend.shard)
        assert sum(float(b.weights[0].sum()) for b in batch) == pytest.approx(1, rel=1e-6)
        assert sum(float(b.weights[1].sum()) for b in batch) == pytest.approx(1, rel=1e-6)
        found = backend.evaluate(lambda b: p.upper_loss(x, y, b), batch)
        assert found.value == pytest.approx(found.parts["many"] / 3 + found.parts["few"] * 2 / 3, rel=1e-6)
    backend.close()


def test_targets_of_the_same_name_are_told_apart(problem: Make, data: dict[str, str]) -> None:
    sets = [ValidationSet(data["target"], name) for name in ("a-2", "a", "a", "a-3", "a")]
    p = problem(validation=sets)
    assert list(p._targets) == ["a-2", "a", "a-3", "a-3-2", "a-4"]


def test_every_target_s_loss_is_reported(problem: Make, data: dict[str, str], tmp_path: Path) -> None:
    from rich.console import Console

    sets = [ValidationSet(data["target"], "good", weight=3.0), ValidationSet(data["noise"], "odd")]
    p = problem(validation=sets)
    result = fit(p, ScaleBiO(lr_z=1e-3, warmup=1), TorchBackend(device="cpu"), steps=5, output=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "weights.json").read_text())["targets"]
    losses = [record.parts["upper_parts"]["odd"] for record in result.history if "upper_parts" in record.parts]
    assert len(losses) == 4
    assert written["odd"] == pytest.approx({"weight": 0.25, "first": losses[0], "last": losses[-1]})
    assert written["good"]["weight"] == pytest.approx(0.75)
    console = Console(width=120, file=io.StringIO())
    console.print(p.report(result.history))
    assert "odd" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{losses[-1] - losses[0]:+.3f}" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_target_weights_that_are_none_are_refused(problem: Make, weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be positive and finite"):
        problem(validation=[ValidationSet("x", weight=weight)])
