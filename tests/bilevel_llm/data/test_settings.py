"""Sources and validation sets as a recipe gives them."""

import pytest

from bilevel_llm.data.settings import Source, ValidationSet, unique_names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["v", "v", "v"], ["v", "v-2", "v-3"]),
        (["v-3", "v", "v"], ["v-3", "v", "v-2"]),
        (["v-2", "v", "v"], ["v-2", "v", "v-3"]),
        (["v", "v", "v-2"], ["v", "v-2", "v-2-2"]),
    ],
)
def test_sets_of_the_same_name_get_names_of_their_own(given: list[str], expected: list[str]) -> None:
    assert unique_names([ValidationSet("x", name) for name in given]) == expected


@pytest.mark.parametrize(("path", "patterns"), [("a.jsonl", ["a.jsonl"]), (["a.jsonl", "b/*"], ["a.jsonl", "b/*"])])
def test_a_single_path_is_a_list_of_one(path: str | list[str], patterns: list[str]) -> None:
    assert Source("s", path).patterns == ValidationSet(path).patterns == patterns
