"""What is written for each trainer; whether the trainers read it is asked in test_trainers.py."""

import csv
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel_llm.data.settings import Source
from bilevel_llm.exporters.run import export, write
from bilevel_llm.mixing.draw import make_mix
from bilevel_llm.reweighting.saved_run import read_run
from tests.bilevel_llm.tiny import AVERAGE, FINAL, alpaca, write_jsonl

MakeRun = Callable[..., Path]


def talks(name: str, rows: int, names: tuple[str, str] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": names[0], "content": f"{name} {i}"}, {"role": names[1], "content": "a"}], "id": i}
        for i in range(rows)
    ]


def sharegpt(rows: int, user: str = "human") -> list[dict[str, Any]]:
    return [{"conversations": [{"from": user, "value": "q"}, {"from": "gpt", "value": str(i)}]} for i in range(rows)]


def texts(rows: int) -> list[dict[str, Any]]:
    return [{"text": f"once {i}"} for i in range(rows)]


def pairs(rows: int) -> list[dict[str, Any]]:
    return [{"prompt": f"1 + {i} = ", "completion": str(i + 1)} for i in range(rows)]


TALKS = {"web": talks("web", 40), "books": talks("books", 20), "chat": talks("chat", 10)}


def mixed(run: Path, plugins: Plugins, file: Path, **settings: Any) -> Path:
    weighted = read_run(run, plugins)
    make_mix(weighted.problem, weighted.weights, rows=30, **settings).write(file)
    return file


# ----------------------------------------------------------------------------------------------------------- weights alone


def test_json_is_read_back_by_mix(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run()
    write(export(run, "json", plugins, weights="final"), tmp_path / "w.json")
    assert json.loads((tmp_path / "w.json").read_text()) == pytest.approx(FINAL, abs=1e-15)
    assert read_run(run, plugins, str(tmp_path / "w.json")).weights == pytest.approx(FINAL, abs=1e-15)


def test_csv_has_a_line_for_each_source(make_run: MakeRun, plugins: Plugins) -> None:
    (text,) = export(make_run(), "csv", plugins).values()
    lines = list(csv.DictReader(text.splitlines()))
    assert {line["source"]: float(line["weight"]) for line in lines} == pytest.approx(AVERAGE, abs=1e-15)


# ------------------------------------------------------------------------------------------------------------ interleaving


def test_the_module_for_interleave_datasets_runs_and_keeps_the_weights(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sources = {name: alpaca(name, rows) for name, rows in (("web", 900), ("books", 600), ("chat", 400))}
    write(export(make_run(sources), "interleave", plugins, seed=3), tmp_path / "interleaved.py")
    module = runpy.run_path(str(tmp_path / "interleaved.py"))
    data = module["data"]
    assert data.column_names == ["instruction", "input", "output"]
    shares = {name: n / len(data) for name, n in Counter(text.split()[0] for text in data["instruction"]).items()}
    assert shares == pytest.approx(AVERAGE, abs=0.04)  # 3 standard errors of about 1800 draws
    assert len(set(data["instruction"])) == len(data)  # stops before a row comes twice


def test_sources_of_other_files_can_be_interleaved(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Dataset.from_list(alpaca("saved", 20)).save_to_disk(str(tmp_path / "saved"))
    Dataset.from_list(alpaca("table", 20)).to_parquet(str(tmp_path / "t.parquet"))
    run = make_run(
        {"a": str(tmp_path / "saved"), "b": str(tmp_path / "t.parquet")},
        average={"a": 0.5, "b": 0.5},
        final={"a": 1, "b": 1},
    )
    write(export(run, "interleave", plugins, stop="all"), tmp_path / "i.py")
    data = runpy.run_path(str(tmp_path / "i.py"))["data"]
    assert len(set(data["instruction"])) == 40  # all rows of both came


def test_a_source_without_weight_is_left_out(make_run: MakeRun, plugins: Plugins) -> None:
    (text,) = export(make_run(average={"web": 0.5, "books": 0.0, "chat": 0.5}), "interleave", plugins).values()
    assert "books" not in text


# ---------------------------------------------------------------------------------------------------------- LLaMA-Factory


def test_llamafactory_gets_a_description_of_every_source(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run({"web": alpaca("web", 9), "books": TALKS["books"], "chat": sharegpt(5)})
    files = export(run, "llamafactory", plugins, output=tmp_path / "lf")
    arguments = yaml.safe_load(files["data.yaml"])
    assert arguments == {
        "dataset_dir": str(tmp_path / "lf"), "dataset": "web,books,chat", "mix_strategy": "interleave_under",
        "interleave_probs": "0.5,0.3,0.2",
    }  # fmt: skip
    info = json.loads(files["dataset_info.json"])
    assert info["web"]["file_name"] == str(tmp_path / "web.jsonl")
    assert info["web"]["columns"] == {"prompt": "instruction", "query": "input", "response": "output"}
    assert info["books"]["tags"] == {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    }  # fmt: skip
    assert info["chat"]["columns"] == {"messages": "conversations"}
    assert (info["chat"]["tags"]["user_tag"], info["chat"]["tags"]["assistant_tag"]) == ("human", "gpt")


def test_a_source_of_several_files_shares_its_weight_by_rows(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "web-a.jsonl", alpaca("a", 30))
    write_jsonl(tmp_path / "web-b.jsonl", alpaca("b", 10))
    run = make_run({"web": str(tmp_path / "web-?.jsonl"), "books": alpaca("c", 5), "chat": alpaca("d", 5)})
    arguments = yaml.safe_load(export(run, "llamafactory", plugins, stop="all")["data.yaml"])
    assert arguments["dataset"] == "web-1,web-2,books,chat"
    assert list(map(float, arguments["interleave_probs"].split(","))) == pytest.approx([0.375, 0.125, 0.3, 0.2])
    assert arguments["mix_strategy"] == "interleave_over"


# ------------------------------------------------------------------------------------------------------------ TRL, axolotl


def test_trl_gets_fractions(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    (text,) = export(make_run(TALKS), "trl", plugins).values()
    entries = yaml.safe_load(text)["datasets"]
    assert [entry["fraction"] for entry in entries] == pytest.approx(list(AVERAGE.values()), abs=1e-15)
    assert entries[0]["data_files"] == [str(tmp_path / "web.jsonl")]
    assert entries[0]["columns"] == ["messages"]


def test_trl_before_1_8_gets_the_mix(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run(TALKS)
    with pytest.raises(InputError, match=r"TRL before 1\.8 has no weights; `bilevel mix"):
        export(run, "trl", plugins, trainer_version="1.0.0")
    file = mixed(run, plugins, tmp_path / "mix.jsonl")
    (text,) = export(run, "trl", plugins, trainer_version="1.0.0", mix=file).values()
    assert yaml.safe_load(text)["datasets"] == [{"path": "json", "data_files": [str(file)], "columns": ["messages"]}]


@pytest.mark.parametrize(
    ("sources", "settings", "entry"),
    [
        (None, {}, {"type": "alpaca"}),
        (None, {"format": "messages"}, {"type": "chat_template", "field_messages": "messages"}),
        ({"web": texts(40), "books": texts(20), "chat": texts(10)}, {}, {"type": "completion", "field": "text"}),
        (
            {"web": sharegpt(40, "prompter"), "books": sharegpt(20), "chat": sharegpt(10)},
            {},
            {
                "type": "chat_template", "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
                "roles": {"user": ["human", "prompter"], "assistant": ["gpt"]},
            },
        ),
    ],
)  # fmt: skip
def test_axolotl_gets_the_mix(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, sources: Any, settings: Any, entry: Any
) -> None:
    run = make_run(sources, max_length=80)
    file = mixed(run, plugins, tmp_path / "mix.jsonl", **settings)
    (text,) = export(run, "axolotl", plugins, mix=file).values()
    assert yaml.safe_load(text)["datasets"] == [{"path": str(file), "ds_type": "json", **entry}]


def test_axolotl_from_0_20_keeps_parts_that_make_the_shares(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    """axolotl would keep int(weight * rows) of each; the weights are .5, .3 and .2."""
    run = make_run({"web": talks("web", 90), "books": talks("books", 600), "chat": talks("chat", 50)})
    (text,) = export(run, "axolotl", plugins, trainer_version="0.20.0").values()
    entries = yaml.safe_load(text)["datasets"]
    assert [Path(entry["path"]).stem for entry in entries] == ["web", "books", "chat"]
    assert max(entry["weight"] for entry in entries) == 1
    kept = [entry["weight"] * rows for entry, rows in zip(entries, (90, 600, 50), strict=True)]
    assert [rows / sum(kept) for rows in kept] == pytest.approx([AVERAGE[name] for name in ("web", "books", "chat")])
    with pytest.raises(InputError, match=r"repeats no row, so --stop all cannot be had"):
        export(run, "axolotl", plugins, trainer_version="0.20.0", stop="all")
    with pytest.raises(InputError, match=r"what axolotl 0\.21 reads is not known"):
        export(run, "axolotl", plugins, trainer_version="0.21")


# ---------------------------------------------------------------------------------------------------------------- Megatron


def long_and_short(rows: int, words: int) -> list[dict[str, Any]]:
    return [{"text": f"{i % 10} " + "x" * words} for i in range(rows)]


def test_a_blend_has_the_shares_of_tokens_that_the_shares_of_rows_are(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path
) -> None:
    """Every byte is a token; the rows of `web` have 3, those of the others 12 tokens, and one that begins or ends a text."""
    run = make_run({"web": long_and_short(40, 1), "books": long_and_short(20, 10), "chat": long_and_short(30, 10)})
    (text,) = export(run, "megatron", plugins).values()
    blend = json.loads(text)
    shares = {Path(prefix).name: float(share) for share, prefix in zip(blend[::2], blend[1::2], strict=True)}
    tables = read_run(run, plugins).problem.source_tables
    tokens = {name: AVERAGE[name] * len(table.ids) / len(table) for name, table in tables.items()}
    assert shares == pytest.approx({f"{name}_text_document": n / sum(tokens.values()) for name, n in tokens.items()})
    assert shares["web_text_document"] < 0.3 < AVERAGE["web"]


def test_a_source_of_several_files_is_blended_by_their_tokens(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", long_and_short(10, n)) for n in (2, 8)]
    run = make_run(
        {"web": Source("web", [*map(str, files)]), "books": long_and_short(20, 10), "chat": long_and_short(10, 10)}
    )
    blend = json.loads(*export(run, "megatron", plugins).values())
    shares = dict(zip(map(Path, blend[1::2]), map(float, blend[::2]), strict=True))
    short, long = (shares[file.with_name(f"{file.stem}_text_document")] for file in map(Path, files))
    table = read_run(run, plugins).problem.source_tables["web"]
    assert long / short == pytest.approx(table.lengths[10:].sum() / table.lengths[:10].sum())
    assert sum(shares.values()) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sources", "to", "settings", "says"),
    [
        (None, "axolotl", {}, "axolotl before 0.20 has no weights for data sets; `bilevel mix RUN --format messages"),
        (None, "megatron", {}, "source 'web': a blend is of texts, and the rows are"),
        (None, "trl", {}, "source 'web': TRL reads messages of role and content"),
        (None, "trl", {"trainer_version": "9.0"}, "what trl 9.0 reads is not known; known: >=0.25,<1.17"),
        (None, "llamafactory", {"trainer_version": "0.7.1"}, "what llamafactory 0.7.1 reads is not known"),
        (None, "axolotl", {"trainer_version": "new"}, "--trainer-version 'new' is not a version, as 0.19.0 is"),
        (None, "axolotel", {}, "no exporter is named 'axolotel'; did you mean 'axolotl'?"),
        (None, "json", {"trainer_version": "1"}, "--trainer-version has no meaning here"),
        (None, "interleave", {"weights": "none.json"}, "there is no such file"),
        (TALKS, "trl", {"stop": "all"}, "TRL's fractions never use a row twice"),
        ({**TALKS, "chat": alpaca("a", 5)}, "interleave", {}, "but 'chat' of alpaca; `bilevel mix"),
        ({**TALKS, "chat": talks("c", 5, ("human", "assistant"))}, "trl", {}, "with the roles assistant, human"),
        ({**TALKS, "chat": sharegpt(3) + sharegpt(3, "user")}, "llamafactory", {}, "calls the user by several names (human, user)"),
        ({"web": pairs(5), "books": pairs(5), "chat": pairs(5)}, "llamafactory", {}, "there is no faithful export"),
        ({"web": texts(5), "books": texts(5), "chat": alpaca("a", 5)}, "llamafactory", {}, "but 'chat' of alpaca"),
        ({"web": [{"instruction": "a", "output": "b"}] * 3, "books": alpaca("b", 5), "chat": alpaca("c", 5)},
         "interleave", {}, "only some of the sources have the field 'input'"),
    ],
)  # fmt: skip
def test_what_a_trainer_cannot_be_told_is_said(
    make_run: MakeRun, plugins: Plugins, sources: Any, to: str, settings: Any, says: str
) -> None:
    run = make_run(sources)
    with pytest.raises(InputError) as caught:
        export(run, to, plugins, **settings)
    assert says in str(caught.value)


def test_other_files_are_no_mix(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(InputError, match=r"web\.jsonl is not a mix that .* there is no .*web\.jsonl\.json"):
        export(run, "axolotl", plugins, mix=tmp_path / "web.jsonl")
    with pytest.raises(InputError, match=r"there is no .*none\.jsonl"):
        export(run, "axolotl", plugins, mix=tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="leave --mix out"):
        export(run, "interleave", plugins, mix=mixed(run, plugins, tmp_path / "mix.jsonl"))


def test_a_mix_of_other_weights_or_data_and_a_changed_one_are_refused(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path
) -> None:
    run = make_run()
    mix = mixed(run, plugins, tmp_path / "mix.jsonl")
    export(run, "axolotl", plugins, mix=mix)
    with pytest.raises(InputError, match=r"drawn by other weights \('web': 0\.5000, and 0\.2500 in"):
        export(run, "axolotl", plugins, weights="final", mix=mix)
    card = tmp_path / "mix.jsonl.json"
    whole = card.read_text()
    card.write_text(whole.replace('"web": {', '"wiki": {'))
    with pytest.raises(InputError, match=r"a mix of 'wiki', 'books', 'chat', but the sources of .* are 'web'"):
        export(run, "axolotl", plugins, mix=mix)
    facts = json.loads(whole)
    facts["sources"]["web"]["hash"] = "0" * 64
    card.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="drawn from other data: the hash of 'web'"):
        export(run, "axolotl", plugins, mix=mix)
    for damaged in ("{}", "null", "[1]", '{"file": 3}'):
        card.write_text(damaged)
        with pytest.raises(InputError, match=r"mix\.jsonl\.json: "):
            export(run, "axolotl", plugins, mix=mix)
    card.write_text(whole)
    mix.write_text(mix.read_text() + "\n")
    with pytest.raises(InputError, match="has changed since `bilevel mix` wrote it"):
        export(run, "axolotl", plugins, mix=mix)


def test_files_that_llamafactory_does_not_read_are_named(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(alpaca("a", 1)[0]).encode()))
    run = make_run({"web": str(tmp_path / "a.jsonl.gz"), "books": alpaca("b", 5), "chat": alpaca("c", 5)})
    with pytest.raises(InputError, match=r"LLaMA-Factory reads \.json, \.jsonl, \.parquet, not a\.jsonl\.gz"):
        export(run, "llamafactory", plugins)


def test_changed_data_is_refused_unless_allowed(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run()
    write_jsonl(tmp_path / "web.jsonl", alpaca("web", 41))
    with pytest.raises(InputError, match="the data of 'web' changed"):
        export(run, "interleave", plugins)
    assert export(run, "interleave", plugins, allow_changed_data=True)
    assert export(run, "json", plugins)  # weights alone do not ask for the data


def test_the_command_prints_or_writes_and_overwrites_nothing(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bilevel_llm.commands.export_weights import export_weights

    run = make_run()
    export_weights(run, "json")
    assert json.loads(capsys.readouterr().out) == pytest.approx(AVERAGE, abs=1e-15)
    export_weights(run, "llamafactory", output=tmp_path / "lf")
    assert {path.name for path in (tmp_path / "lf").iterdir()} == {"data.yaml", "dataset_info.json"}
    for to in ("llamafactory", "json"):
        with pytest.raises(InputError, match="exists, and nothing is overwritten"):
            export_weights(run, to, output=tmp_path / "lf")


@pytest.mark.parametrize("to", ["interleave", "llamafactory"])
@pytest.mark.parametrize(
    ("stop", "weights", "says"),
    [
        ("first", {"web": 0.5, "books": 0.5, "chat": 0}, r"end after about 8 of 404 rows, when 'books' is used up"),
        ("all", {"web": 0.5, "books": 0.5, "chat": 0}, r"repeat the rows of 'books' about 100 times"),
        ("first", {"web": 400 / 404, "books": 4 / 404, "chat": 0}, None),
    ],
)
def test_what_interleaving_makes_of_a_small_source_is_said(
    make_run: MakeRun,
    plugins: Plugins,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    to: str,
    stop: Any,
    weights: dict[str, float],
    says: str | None,
) -> None:
    run = make_run({"web": talks("web", 400), "books": talks("books", 4), "chat": talks("chat", 10)})
    given = tmp_path / "w.json"
    given.write_text(json.dumps(weights))
    export(run, to, plugins, weights=str(given), stop=stop)
    assert re.search(says, caplog.text) if says else "interleaved" not in caplog.text


def answered(**fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", **fields},
            *talks("x", 1)[0]["messages"],
        ]
    }


@pytest.mark.parametrize(
    ("row", "trainer", "says"),
    [
        (
            answered(weight=0),
            "trl",
            "some that are not to be learned, which trainers cannot be told; there is no faithful export",
        ),
        (
            answered(content=[{"type": "text", "text": "a"}]),
            "trl",
            "not every turn has 'role' and 'content', a string; `bilevel mix",
        ),
        ({**talks("web", 1)[0], "system": "s"}, "trl", "the row says more than its messages, and trainers would be told"),
        (
            {**alpaca("web", 1)[0], "system": "s"},
            "llamafactory",
            "the row says more than its instruction and input and output",
        ),
        ({**alpaca("web", 1)[0], "history": [["q", "a"]]}, "llamafactory", "the row says more than its instruction"),
    ],
)
def test_a_row_that_a_trainer_would_learn_otherwise_is_not_exported(
    make_run: MakeRun, plugins: Plugins, row: dict[str, Any], trainer: str, says: str
) -> None:
    rows = {"web": [row], "books": [alpaca("b", 1)[0] if "output" in row else talks("books", 1)[0]]}
    with pytest.raises(InputError, match=says):
        export(make_run(rows, {"web": 0.5, "books": 0.5}, {"web": 0.5, "books": 0.5}, max_length=99), trainer, plugins)


# ----------------------------------------------------------------------------------------- columns of other names, and CSV


def asked(path: Path, rows: int) -> Source:
    content = [{"question": f"q {i}", "answer": str(i), "input": "not read", "id": i} for i in range(rows)]
    return Source("web", str(write_jsonl(path, content)), fields={"prompt": "question", "response": "answer"})


HALVES: dict[str, Any] = {"average": {"web": 0.5, "books": 0.5}, "final": {"web": 0.5, "books": 0.5}}


def test_llamafactory_is_told_the_columns_of_the_file(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run({"web": asked(tmp_path / "asked.jsonl", 30), "books": alpaca("books", 20)}, **HALVES)
    entries = json.loads(export(run, "llamafactory", plugins)["dataset_info.json"])
    assert entries["web"]["columns"] == {"prompt": "question", "response": "answer"}
    assert entries["books"]["columns"] == {"prompt": "instruction", "query": "input", "response": "output"}


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("interleave", "'web' has rows of alpaca in question and answer, but 'books' of alpaca in instruction and"),
        ("trl", "but 'books' of alpaca in instruction"),
    ],
)
def test_who_cannot_be_told_the_columns_is_given_a_mix(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, to: str, message: str
) -> None:
    run = make_run({"web": asked(tmp_path / "asked.jsonl", 30), "books": alpaca("books", 20)}, **HALVES)
    with pytest.raises(InputError, match=f"{message}.*`bilevel mix RUN --format messages"):
        export(run, to, plugins)
    mix = mixed(run, plugins, tmp_path / "mix.jsonl", format="messages")
    if to == "trl":
        assert "question" not in export(run, to, plugins, mix=mix)["datasets.yaml"]


def test_the_cells_of_csv_files_are_not_left_to_a_guess(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    for name in ("web", "books"):
        (tmp_path / f"{name}.csv").write_text("text\n" + "".join(f"{i}\n" for i in range(20)))
    run = make_run({name: str(tmp_path / f"{name}.csv") for name in ("web", "books")}, **HALVES)
    for to in ("interleave", "trl"):
        with pytest.raises(InputError, match=r"trainers would guess the types of the cells of web\.csv; `bilevel mix"):
            export(run, to, plugins)
