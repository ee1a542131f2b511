import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import InputError
from bilevel.plugins import load_plugins
from bilevel_llm.baselines.proportional import sizes
from bilevel_llm.data.chat import encode
from bilevel_llm.data.reading import read_rows
from bilevel_llm.data.settings import Source
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.mixing.draw import make_mix
from bilevel_llm.mixing.mix import Mix, card_file
from bilevel_llm.reweighting.problem import LLMReweighting
from bilevel_llm.reweighting.saved_run import read_run
from tests.bilevel_llm.tiny import AVERAGE, alpaca, make_tokenizer, write_jsonl

Make = Callable[..., LLMReweighting]
Row = dict[str, Any]


def written(mix: Mix, path: Path) -> list[Row]:
    mix.write(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def drawn(mix: Mix) -> list[tuple[int, int, int]]:
    """(source, row, copy), in order."""
    return list(zip(*(part.tolist() for part in mix.sequence), strict=True))


# -------------------------------------------------------------------------------------------------- which rows are drawn


def test_rows_are_shared_by_the_weights(make_problem: Make) -> None:
    mix = make_mix(make_problem(), AVERAGE, rows=30)
    assert Counter(source for source, _, _ in drawn(mix)) == {0: 15, 1: 9, 2: 6}
    assert len(set(drawn(mix))) == 30  # no row twice


def test_weights_need_not_sum_to_1_and_0_leaves_a_source_out(make_problem: Make) -> None:
    mix = make_mix(make_problem(), {"web": 3, "books": 1, "chat": 0}, rows=20)
    assert mix.counts.tolist() == [15, 5, 0]


def test_a_row_comes_a_second_time_only_after_all_of_its_source_came_once(make_problem: Make) -> None:
    mix = make_mix(make_problem(), AVERAGE, rows=130)  # 65, 39 and 26 of 40, 20 and 10 rows
    for source, size in enumerate((40, 20, 10)):
        times = Counter(row for s, row, _ in drawn(mix) if s == source)
        assert len(times) == size
        assert max(times.values()) - min(times.values()) <= 1
        copies = {row: sorted(copy for s, r, copy in drawn(mix) if (s, r) == (source, row)) for row in times}
        assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in copies.values())


def test_the_same_seed_draws_the_same_and_another_seed_does_not(make_problem: Make) -> None:
    problem = make_problem()
    assert drawn(make_mix(problem, AVERAGE, rows=30)) == drawn(make_mix(problem, AVERAGE, rows=30, seed=0))
    other = drawn(make_mix(problem, AVERAGE, rows=30, seed=1))
    assert set(drawn(make_mix(problem, AVERAGE, rows=30))) != set(other)


def test_the_order_is_shuffled_over_the_sources(make_problem: Make) -> None:
    sources = [source for source, _, _ in drawn(make_mix(make_problem(), AVERAGE, rows=60))]
    changes = sum(a != b for a, b in pairwise(sources))
    assert changes > 20  # 36.6 are expected of a random order, 2 of sources one after another


def test_a_larger_mix_holds_the_smaller_one(make_problem: Make) -> None:
    problem = make_problem()
    assert set(drawn(make_mix(problem, AVERAGE, rows=30))) < set(drawn(make_mix(problem, AVERAGE, rows=70)))


def test_rows_of_the_validation_data_are_never_drawn(make_problem: Make) -> None:
    target = [{**row, "instruction": row["instruction"].upper()} for row in alpaca("books", 20)[4:8]]  # case is ignored
    mix = make_mix(make_problem(validation=target), AVERAGE, rows=60)
    assert {row for source, row, _ in drawn(mix) if source == 1} == {*range(20)} - {4, 5, 6, 7}
    assert mix.pools[1].withheld == 4
    assert mix.notes() == ["rows of 'books' that also occur in the validation data, and are left out: 4"]


def test_rows_with_nothing_to_learn_are_never_drawn(make_problem: Make, tmp_path: Path) -> None:
    rows = alpaca("web", 6)
    rows[2]["instruction"] = "too long " * 50
    mix = make_mix(make_problem({"web": rows, "chat": alpaca("chat", 10)}, max_length=60), {"web": 1, "chat": 1}, rows=10)
    assert {row["_bilevel"]["row"] for row in written(mix, tmp_path / "m.jsonl") if row["_bilevel"]["source"] == "web"} == {
        1, 2, 4, 5, 6,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- tokens


def tokens_of(rows_file: Path, max_length: int) -> int:
    """Counted from the written file, row by row, with the tokenizer alone."""
    tokenizer = make_tokenizer()
    return sum(min(max_length, len(encode(row, tokenizer).ids)) for row in read_rows([str(rows_file)]))


@pytest.mark.parametrize("budget", [500, 2000, 7001])
def test_a_budget_of_tokens_is_filled_but_for_less_than_a_row(make_problem: Make, tmp_path: Path, budget: int) -> None:
    problem = make_problem(max_length=70)
    mix = make_mix(problem, AVERAGE, tokens=budget)
    mix.write(tmp_path / "mix.jsonl")
    make_mix(problem, AVERAGE, rows=mix.rows + 1).write(tmp_path / "more.jsonl")
    assert sum(mix.tokens) == tokens_of(tmp_path / "mix.jsonl", 70) <= budget
    assert tokens_of(tmp_path / "more.jsonl", 70) > budget
    assert max(mix.repeats) > 1 or budget < 7000  # repeats are counted as well


# ------------------------------------------------------------------------------------------------------------ shortfalls


def test_a_mix_that_is_too_large_is_refused_with_the_largest_that_fits(make_problem: Make) -> None:
    problem = make_problem()
    with pytest.raises(InputError) as caught:
        make_mix(problem, {"web": 1, "books": 1, "chat": 2}, rows=100, max_repeats=2)
    message = str(caught.value)
    assert "the mix needs 50 rows of 'chat', which has 10, and each may be used 2 times at most" in message
    assert "--rows 40" in message  # half of 41 is 20.5, and the row that is left would be one of chat's
    assert "--max-repeats 5" in message
    weights = {"web": 1, "books": 1, "chat": 2}
    fitting = make_mix(problem, weights, rows=40, max_repeats=2)
    assert fitting.counts[2] == 20
    assert f"--tokens {sum(fitting.tokens)}" in message
    assert make_mix(problem, weights, tokens=sum(fitting.tokens), max_repeats=2).rows == 40
    with pytest.raises(InputError, match="needs 21 rows of 'chat'"):
        make_mix(problem, weights, rows=41, max_repeats=2)


def test_a_shortfall_can_be_reported(make_problem: Make) -> None:
    mix = make_mix(make_problem(), {"web": 1, "books": 1, "chat": 2}, rows=100, max_repeats=2, on_shortfall="report")
    assert mix.counts.tolist() == [25, 25, 20]
    assert mix.notes() == ["'chat' gives 20 rows, 30 fewer than its weight asks: it has 10, used at most 2 times each"]


def test_a_shortfall_can_be_filled_from_the_others(make_problem: Make) -> None:
    mix = make_mix(make_problem(), {"web": 3, "books": 1, "chat": 4}, rows=80, max_repeats=2, on_shortfall="redistribute")
    assert mix.counts.tolist() == [45, 15, 20]
    with pytest.raises(InputError, match="all sources together can give 140 rows, not 141"):
        make_mix(make_problem(), AVERAGE, rows=141, max_repeats=2, on_shortfall="redistribute")
    with pytest.raises(InputError, match=r"can give [\d,]+ tokens \(140 rows\), not 1,000,000"):
        make_mix(make_problem(), AVERAGE, tokens=10**6, max_repeats=2, on_shortfall="redistribute")


def test_tokens_are_filled_up_from_the_others_too(make_problem: Make) -> None:
    weights = {"web": 1, "books": 1, "chat": 8}
    mix = make_mix(make_problem(), weights, tokens=2000, max_repeats=1, on_shortfall="redistribute")
    more = make_mix(make_problem(), weights, rows=mix.rows + 1, max_repeats=1, on_shortfall="redistribute")
    assert mix.counts[2] == 10
    everything = make_mix(make_problem(), AVERAGE, rows=70, max_repeats=1, on_shortfall="redistribute")
    budget = sum(everything.tokens)
    assert make_mix(make_problem(), AVERAGE, tokens=budget, max_repeats=1, on_shortfall="redistribute").rows == 70
    assert sum(mix.tokens) <= 2000 < sum(more.tokens)


# --------------------------------------------------------------------------------------------------------------- writing


def test_rows_are_written_unchanged_with_where_they_are_from(make_problem: Make, tmp_path: Path) -> None:
    mix = make_mix(make_problem(), AVERAGE, rows=100)
    rows = written(mix, tmp_path / "mix.jsonl")
    assert len(rows) == 100
    for row in rows:
        origin = row.pop("_bilevel")
        line = Path(origin["file"]).read_text(encoding="utf-8").splitlines()[origin["row"] - 1]
        assert json.dumps(row, ensure_ascii=False) == line
        assert Path(origin["file"]).stem == origin["source"]
    copies = Counter(row["_bilevel"]["repeat"] for row in written(mix, tmp_path / "again.jsonl"))
    assert copies == {1: 70, 2: 30}  # 50, 30, 20 rows of 40, 20, 10
    assert (tmp_path / "mix.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_rows_of_every_kind_of_file_come_back(make_problem: Make, tmp_path: Path) -> None:
    import gzip

    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    rows = alpaca("x", 5)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n\n" for row in rows).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    files = {name: str(tmp_path / name) for name in ("a.json", "b.jsonl.gz", "c.parquet", "d")}
    mix = make_mix(make_problem(files), dict.fromkeys(files, 1), rows=20)
    back: dict[str, list[Row]] = {name: [] for name in files}
    for row in written(mix, tmp_path / "mix.jsonl"):
        back[row.pop("_bilevel")["source"]].append(row)
    for name in files:
        assert sorted(back[name], key=lambda row: row["id"]) == rows, name


def test_parquet_holds_the_same_as_jsonl(make_problem: Make, tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = alpaca("web", 40)
    for row in rows[:3]:
        del row["input"]
    mix = make_mix(make_problem({"web": rows, "chat": alpaca("chat", 10)}), {"web": 4, "chat": 1}, rows=50)
    lines = written(mix, tmp_path / "mix.jsonl")
    mix.write(tmp_path / "mix.parquet")
    table = parquet.read_table(tmp_path / "mix.parquet").to_pylist()
    assert [{"input": None, **row} for row in lines] == table
    assert [row.turns for row in read_rows([str(tmp_path / "mix.parquet")])] == [
        row.turns for row in read_rows([str(tmp_path / "mix.jsonl")])
    ]


def test_parquet_batches_may_differ_in_their_fields(
    make_problem: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel_llm.mixing.row_files._BATCH", 2)
    test_parquet_holds_the_same_as_jsonl(make_problem, tmp_path)


def test_messages_are_the_turns_that_the_run_has_seen(make_problem: Make, tmp_path: Path) -> None:
    sharegpt = [
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": f"q{i}"},
                {"from": "gpt", "value": "a"},
            ]
        }
        for i in range(5)
    ]
    asked = [{"instruction": "do", "input": str(i), "output": "done"} for i in range(5)]
    problem = make_problem({"chat": sharegpt, "tasks": asked}, max_length=90)
    rows = written(make_mix(problem, {"chat": 1, "tasks": 1}, rows=10, format="messages"), tmp_path / "mix.jsonl")
    assert all(set(row) == {"messages", "_bilevel"} for row in rows)
    for row in rows:
        origin = row["_bilevel"]
        turns = read_rows([origin["file"]])[origin["row"] - 1].turns
        assert row["messages"] == [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize(
    "row",
    [
        alpaca("a", 1)[0], {"text": "a"}, {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)  # fmt: skip
def test_readers_do_not_mind_where_a_row_is_from(tmp_path: Path, row: Row) -> None:
    origin = {"source": "a", "file": "text", "row": 1, "repeat": 1}
    (marked,) = read_rows([str(write_jsonl(tmp_path / "marked.jsonl", [{"_bilevel": origin, **row}]))])
    (plain,) = read_rows([str(write_jsonl(tmp_path / "plain.jsonl", [row]))])
    assert marked.turns == plain.turns


def test_a_mix_can_be_read_and_mixed_again(make_problem: Make, tmp_path: Path) -> None:
    make_mix(make_problem(), AVERAGE, rows=20).write(tmp_path / "one.jsonl")
    assert len(read_rows([str(tmp_path / "one.jsonl")])) == 20
    again = make_problem({"mixed": str(tmp_path / "one.jsonl"), "chat": alpaca("chat", 10)})
    rows = written(make_mix(again, {"mixed": 1, "chat": 0}, rows=20), tmp_path / "two.jsonl")
    assert {row["_bilevel"]["file"] for row in rows} == {str(tmp_path / "one.jsonl")}


def test_the_card_says_what_was_drawn_from_what(make_problem: Make, tmp_path: Path) -> None:
    import hashlib

    problem = make_problem()
    mix = make_mix(problem, {"web": 1, "books": 1, "chat": 2}, rows=100, max_repeats=2, on_shortfall="report", seed=4)
    mix.write(tmp_path / "mix.jsonl", {"recipe": "runs/x/recipe.yaml"})
    card = json.loads(card_file(tmp_path / "mix.jsonl").read_text())
    assert card["rows"] == 70
    assert card["tokens"] == tokens_of(tmp_path / "mix.jsonl", problem.max_length)
    assert {name: (s["weight"], s["quota"], s["rows"], s["repeats"]) for name, s in card["sources"].items()} == {
        "web": (0.25, 25, 25, 25 / 40), "books": (0.25, 25, 25, 1.25), "chat": (0.5, 50, 20, 2.0),
    }  # fmt: skip
    assert card["sources"]["web"]["hash"] == problem.source_tables["web"].content_hash
    assert card["file"]["sha256"] == hashlib.sha256((tmp_path / "mix.jsonl").read_bytes()).hexdigest()
    assert (card["seed"], card["max_repeats"], card["format"], card["recipe"]) == (4, 2, "alpaca", "runs/x/recipe.yaml")
    assert card["notes"] == mix.notes()


# ------------------------------------------------------------------------------------------------------------- bad input


TEXT = [{"text": f"once {i}"} for i in range(5)]
MESSAGES = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}]} for i in range(5)]


@pytest.mark.parametrize(
    ("sources", "settings", "says"),
    [
        (None, {"rows": 5, "tokens": 5}, "either in rows (--rows) or in tokens (--tokens)"),
        (None, {}, "either in rows (--rows) or in tokens (--tokens)"),
        (None, {"rows": 0}, "--rows must be at least 1, not 0"),
        (None, {"rows": 5, "max_repeats": 0}, "--max-repeats must be at least 1, not 0"),
        (None, {"tokens": 3}, "a mix of 3 tokens does not hold one row"),
        ({"a": TEXT, "b": alpaca("b", 5)}, {"rows": 4}, "do not share one row format: "),
        ({"a": TEXT, "b": alpaca("b", 5)}, {"rows": 4, "format": "messages"}, "a.jsonl:1: the row cannot be written in format 'messages': it goes to the model without a chat template"),
        ({"a": MESSAGES, "b": alpaca("b", 5)}, {"rows": 4}, "messages of role and content), but "),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_said(make_problem: Make, sources: Any, settings: Any, says: str) -> None:
    weights = AVERAGE if sources is None else dict.fromkeys(sources, 1)
    with pytest.raises(InputError) as caught:
        make_mix(make_problem(sources), weights, **settings)
    assert says in str(caught.value)


def test_formats_of_sources_that_are_left_out_do_not_matter(make_problem: Make, tmp_path: Path) -> None:
    mix = make_mix(make_problem({"a": TEXT, "b": alpaca("b", 5)}), {"a": 1, "b": 0}, rows=4)
    assert {row["_bilevel"]["source"] for row in written(mix, tmp_path / "mix.jsonl")} == {"a"}


def test_a_row_laid_out_otherwise_than_the_first_is_named(make_problem: Make, tmp_path: Path) -> None:
    odd = {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}
    mix = make_mix(make_problem({"a": [*MESSAGES, odd], "b": MESSAGES[:2]}), {"a": 3, "b": 1}, rows=8)
    with pytest.raises(InputError, match=r"a.jsonl:6: the row is messages \(messages of from and value\), unlike the first"):
        mix.write(tmp_path / "mix.jsonl")
    assert not list(tmp_path.glob("*mix*"))


def test_what_jsonl_or_parquet_cannot_hold_is_said_and_nothing_is_left(make_problem: Make, tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    dated = [{**row, "day": datetime.date(2024, 1, 1)} for row in alpaca("dated", 5)]
    parquet.write_table(pyarrow.Table.from_pylist(dated), tmp_path / "dated.parquet")
    mix = make_mix(make_problem({"a": str(tmp_path / "dated.parquet"), "b": alpaca("b", 5)}), {"a": 1, "b": 1}, rows=10)
    with pytest.raises(InputError, match=r"JSON cannot hold the field 'day'.*name a \.parquet output"):
        mix.write(tmp_path / "mix.jsonl")
    mix.write(tmp_path / "mix.parquet")
    rows = parquet.read_table(tmp_path / "mix.parquet").to_pylist()
    assert Counter(row["day"] for row in rows) == {datetime.date(2024, 1, 1): 5, None: 5}
    odd = [{**row, "id": "seven"} for row in alpaca("odd", 5)]
    with pytest.raises(InputError, match=r"a Parquet file cannot hold these rows \(field 'id'.*name a \.jsonl output"):
        make_mix(make_problem({"a": odd, "b": alpaca("b", 5)}), {"a": 1, "b": 1}, rows=10).write(tmp_path / "odd.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {
        "dated.parquet", "a.jsonl", "b.jsonl", "target.jsonl", "mix.parquet", "mix.parquet.json",
    }  # fmt: skip


def test_nothing_is_overwritten(make_problem: Make, tmp_path: Path) -> None:
    mix = make_mix(make_problem(), AVERAGE, rows=5)
    (tmp_path / "mix.jsonl").write_text("mine")
    (tmp_path / "other.jsonl.json").write_text("mine")
    for name in ("mix.jsonl", "other.jsonl"):
        with pytest.raises(InputError, match="exists, and nothing is overwritten"):
            mix.write(tmp_path / name)
    with pytest.raises(InputError, match=r"unknown type of file '\.csv'; known: \.jsonl, \.parquet"):
        mix.write(tmp_path / "mix.csv")
    assert (tmp_path / "mix.jsonl").read_text() == (tmp_path / "other.jsonl.json").read_text() == "mine"


def test_a_file_that_changes_in_between_is_noticed(make_problem: Make, tmp_path: Path) -> None:
    from bilevel.errors import RunError

    mix = make_mix(make_problem(), AVERAGE, rows=70)
    write_jsonl(tmp_path / "web.jsonl", alpaca("web", 30))
    with pytest.raises(RunError, match=r"web\.jsonl: row \d+ is not there any more"):
        mix.write(tmp_path / "mix.jsonl")


def test_a_file_that_somebody_else_writes_meanwhile_is_kept(
    make_problem: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bilevel_llm.mixing import mix

    def write_rows(*arguments: Any) -> None:
        write(*arguments)
        (tmp_path / "out" / "mix.jsonl").write_text("theirs")

    write = mix.write_rows
    monkeypatch.setattr(mix, "write_rows", write_rows)
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        make_mix(make_problem(), AVERAGE, rows=70).write(tmp_path / "out" / "mix.jsonl")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_mix_is_read_in_the_format_that_its_source_was_read_in(make_problem: Make, tmp_path: Path) -> None:
    """Rows that look like alpaca's, and of which the recipe says that the rendered text is to be learned."""
    rows = [{**row, "text": f"{i} rendered"} for i, row in enumerate(alpaca("web", 8))]
    problem = make_problem({"web": rows, "books": [{"text": "1 rendered"}]})
    problem.sources = [replace(source, format="text") for source in problem.sources]
    for name in ("mix.jsonl", "mix.parquet"):
        make_mix(problem, {"web": 1, "books": 0}, rows=5).write(tmp_path / name)
        assert {turn.role for row in read_rows([str(tmp_path / name)]) for turn in row.turns} == {"text"}
    tuning = FineTuning(problem.model, str(tmp_path / "mix.jsonl"), max_length=40)
    lengths = tuning.source_tables["training data"].lengths
    assert set(lengths) == {len("0 rendered") + 1}
    assert {turn.role for row in read_rows([str(tmp_path / "mix.jsonl")], format="alpaca") for turn in row.turns} == {
        "user",
        "assistant",
    }


# -------------------------------------------------------------------------------------- columns of other names, and samples


def asked(rows: int) -> list[Row]:
    return [{"question": f"q {i}", "answer": str(i), "rejected": "worse", "id": i} for i in range(rows)]


def test_rows_whose_columns_were_named_are_written_as_the_format_has_them(make_problem: Make, tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "asked.jsonl", asked(20)))
    web = Source("web", file, fields={"prompt": "question", "response": "answer"})
    problem = make_problem({"web": web, "books": [{"instruction": "b", "output": str(i)} for i in range(20)]})
    rows = written(make_mix(problem, {"web": 1, "books": 1}, rows=20), tmp_path / "mix.jsonl")
    web_rows = [row for row in rows if row["_bilevel"]["source"] == "web"]
    assert len(web_rows) == 10
    for row in web_rows:
        number = row["_bilevel"]["row"] - 1
        assert {key: row[key] for key in row if key != "_bilevel"} == {"instruction": f"q {number}", "output": str(number)}
    assert len(read_rows([str(tmp_path / "mix.jsonl")])) == 20  # needs no columns to be named


def test_a_mix_draws_from_the_sample_and_says_how_to_draw_from_all(make_run: Callable[..., Path], tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "many.jsonl", alpaca("many", 50)))
    run = read_run(
        make_run({"many": Source("many", file, max_rows=10), "few": alpaca("few", 20)}, {"many": 0.5, "few": 0.5},
                 {"many": 0.5, "few": 0.5}),
        load_plugins(),
    )  # fmt: skip
    run.check_data()
    mix = make_mix(run.problem, run.weights, rows=20)
    assert mix.pools[0].rows.tolist() == list(range(10))
    assert mix.notes() == ["'many' is a sample of 50 rows (max_rows)"]
    with pytest.raises(InputError, match=r"--all-rows, or a larger max_rows \(the run read a sample of 50 rows\)"):
        make_mix(run.problem, run.weights, rows=40, max_repeats=1)
    whole = run.with_all_rows()
    whole.check_data()
    assert make_mix(whole.problem, run.weights, rows=40, max_repeats=1).counts.tolist() == [20, 20]


def test_sizes_of_sampled_sources_are_those_of_the_whole(make_problem: Make, tmp_path: Path) -> None:
    """The proportional baseline, and weights that start in proportion to size, are about the data and not about the sample."""
    file = str(write_jsonl(tmp_path / "many.jsonl", alpaca("many", 60)))
    problem = make_problem({"many": Source("many", file, max_rows=15), "few": alpaca("few", 20)}, initial="size")
    assert sizes(problem.source_tables, "rows") == {"many": 60, "few": 20}
    assert problem._start.tolist() == [0.75, 0.25]
