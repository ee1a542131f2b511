"""Formats as a set: the contract that each keeps, how one is recognized, and how one is named in a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel.testing.contract import ContractError
from bilevel_llm.data.format import Format
from bilevel_llm.data.format_contract import check_format
from bilevel_llm.data.formats.messages import Messages
from bilevel_llm.data.formats.text import Text
from bilevel_llm.data.layout import ChatLayout, Layout, TextLayout
from bilevel_llm.data.reading import read_raw_rows, read_rows
from bilevel_llm.data.registered_formats import Formats, formats_of
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.settings import Source
from bilevel_llm.mixing.mix import MixFormat
from tests.bilevel_llm.tiny import write_jsonl

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OLD_CHAT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT, "id": 1}, {"messages": OLD_CHAT}],
    "sharegpt": [{"conversations": OLD_CHAT}, {"items": CHAT}],
    "alpaca": [{"instruction": "q", "input": "i", "output": "a"}, {"instruction": "q", "output": "a"}],
    "prompt_completion": [{"prompt": "p", "completion": "c"}, {"prompt": CHAT[:2], "completion": CHAT[2:]}],
    "text": [{"text": "t"}],
}
TALK = (Turn("user", "q"), Turn("assistant", "a"))


class Lines(Format):
    """A format for tests: `lines`, learned as one text."""

    name = "lines"
    required = (("lines",),)

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return (Turn("text", "\n".join(fields["lines"])),)

    def layout(self, fields: Mapping[str, Any]) -> Layout:
        return TextLayout(self.name, "lines")


def test_every_registered_format_keeps_the_contract(plugins: Plugins) -> None:
    formats = formats_of(plugins)
    assert set(formats.names) == set(EXAMPLES)
    for name, examples in EXAMPLES.items():
        check_format(formats.find(name), examples)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_turns_of_its_own_rows_can_be_written_in_every_format(plugins: Plugins, name: str) -> None:
    format = formats_of(plugins).find(name)
    turns = format.read(EXAMPLES[name][0], "a:1")
    assert format.read(format.write(Row(turns, "a:1")), "a:1") == turns


# ------------------------------------------------------------------------------------------------- contract


class Eager(Lines):
    def fits(self, fields: Mapping[str, Any]) -> bool:
        return True

    def detect(self, fields: Mapping[str, Any]) -> int:
        return 1


class Careless(Lines):
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return (Turn("text", "".join(fields["lines"].pop() for _ in range(1))),)


class Odd(Lines):
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return (Turn("user", "q"), Turn("text", "t"))


class Silent(Lines):
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return (Turn("user", "q"), Turn("assistant", "a", masked=True))


class Early(Lines):
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return (Turn("completion", "c"), Turn("completion", "d"))


class Foreign(Lines):
    def layout(self, fields: Mapping[str, Any]) -> Layout:
        return TextLayout("text", "lines")


class Lossy(Lines):
    def write(self, row: Row) -> dict[str, Any]:
        return {"lines": ["lost"]}


@pytest.mark.parametrize(
    ("format", "says"),
    [
        (Text(), "the row has the fields lines, and the format does not know it"),
        (Eager(), "takes a row without any field for its own"),
        (Careless(), "reading the row has changed it"),
        (Odd(), "the turns have the roles user, text"),
        (Silent(), r"nothing is learned from the turns \(user, assistant\)"),
        (Early(), "without a chat template the last turn, and it alone, must be learned"),
        (Foreign(), "the layout text with the fields .* is not that of the row"),
        (Lossy(), "what is written is not read as the same turns"),
    ],
)
def test_the_contract_names_the_rule_that_a_format_breaks(format: Format, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check_format(format, [{"lines": ["x", "y"]}])
    check_format(Lines(), [{"lines": ["x", "y"]}])


# ------------------------------------------------------------------------------------------------ detection


def test_the_format_with_most_evidence_is_taken(plugins: Plugins) -> None:
    formats = formats_of(plugins)
    chat = {"text": "rendered", "prompt": "q", "completion": "a", "messages": CHAT}
    assert formats.detect(chat, "a:1").name == "messages"
    assert formats.detect({"text": "rendered", "prompt": "q", "completion": "a"}, "a:1").name == "prompt_completion"


def test_equal_evidence_for_two_formats_is_an_error_that_names_them(plugins: Plugins) -> None:
    with pytest.raises(InputError, match=r"a:1: the row may be in format 'messages' or 'sharegpt'.* as in format: messages"):
        formats_of(plugins).detect({"messages": CHAT, "conversations": OLD_CHAT}, "a:1")


def test_given_formats_are_the_ones_that_are_known(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [{"lines": ["x", "y"]}]))
    (row,) = read_rows([file], formats=Formats([Lines(), Text()]))
    assert row.turns == (Turn("text", "x\ny"),)
    with pytest.raises(InputError, match="unknown format 'messages'; known: lines, text"):
        read_rows([file], format="messages", formats=Formats([Lines(), Text()]))


def test_the_identity_of_a_format_changes_with_its_version_and_that_of_detection_with_every_format() -> None:
    class Newer(Lines):
        version = 2

    assert Formats([Lines()]).identity("lines") != Formats([Newer()]).identity("lines")
    assert Formats([Lines(), Text()]).identity("lines") == Formats([Lines()]).identity("lines")
    assert Formats([Lines(), Text()]).identity(None) != Formats([Lines()]).identity(None)
    assert Formats([Lines(), Text()]).identity(None) == Formats([Text(), Lines()]).identity(None)


# -------------------------------------------------------------------------------------- learned, layout, write


def test_a_row_from_which_nothing_is_learned_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"lines": []}])
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: no assistant turn to learn from \(turns: user, assistant, not to be learned\)"
    ):
        read_rows([str(file)], formats=Formats([Silent()]))


def test_the_layout_says_where_the_turns_are(tmp_path: Path, plugins: Plugins) -> None:
    rows = [*EXAMPLES["sharegpt"], {"prompt": CHAT[:2], "completion": CHAT[2:]}]
    layouts = [next(read_raw_rows(write_jsonl(tmp_path / f"{i}.jsonl", [row]))).layout for i, row in enumerate(rows)]
    assert layouts == [
        ChatLayout("sharegpt", ("conversations",), "from", "value"),
        ChatLayout("sharegpt", ("items",), "role", "content"),
        ChatLayout("prompt_completion", ("prompt", "completion"), "role", "content"),
    ]
    assert [str(layout) for layout in layouts[1:]] == [
        "sharegpt (items of role and content)",
        "prompt_completion (prompt and completion of role and content)",
    ]


@pytest.mark.parametrize(
    ("name", "turns", "says"),
    [
        ("messages", (Turn("text", "t"),), "it goes to the model without a chat template"),
        ("sharegpt", (Turn("user", "q"), Turn("assistant", "a", masked=True), *TALK), "not all of its answers are learned"),
        ("alpaca", TALK * 2, "it is not one question of the user's and one answer"),
        ("prompt_completion", TALK, "it is not one prompt and one completion"),
        ("text", TALK, "it is more than one text"),
    ],
)
def test_a_row_that_would_be_learned_otherwise_is_not_written(
    plugins: Plugins, name: str, turns: tuple[Turn, ...], says: str
) -> None:
    with pytest.raises(InputError, match=f"a:1: the row cannot be written in format '{name}': {says}.*--format source"):
        formats_of(plugins).find(name).write(Row(turns, "a:1"))


def test_a_format_that_only_reads_refuses_to_write() -> None:
    with pytest.raises(InputError, match="this format can only be read"):
        Lines().write(Row((Turn("text", "t"),), "a:1"))


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("kind", "value"), [(Source, {"name": "a", "path": "a", "format": "massages"}), (MixFormat, "massages")]
)
def test_an_unknown_format_in_a_recipe_is_refused_with_the_nearest(kind: Any, value: Any) -> None:
    with pytest.raises(ValidationError, match="unknown format 'massages'; did you mean 'messages'"):
        TypeAdapter(kind).validate_python(value)


def test_a_registered_name_of_another_class_is_an_error(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Messages, "name", "talks")
    with pytest.raises(InputError, match=r"the format 'messages' \(plugin 'bilevel_llm'\): .* with the name 'messages'"):
        formats_of(plugins)
