"""A model's chat template: turns -> text, and where in it the answers are.

A template is a program, and does not say which part of what it writes is whose. Where it marks the answers, with
`{% generation %}`, these marks are used. Otherwise an answer begins behind the generation prompt, and what a template writes
behind an answer is found by letting it write another answer in its place. The answer must then be there, word by word: what
would not be learned is refused.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from bilevel.errors import InputError
from bilevel_llm.data.bounded_template import BoundedTemplate, LimitExceeded
from bilevel_llm.data.fields import REASONING
from bilevel_llm.data.rows import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EARLIER_UNLABELLED = "an earlier response is not labelled: the chat template rewrites it once more turns follow"
NO_END = "no end-of-turn token follows the response, so the model does not learn to stop"
FIXED_DATE = "the chat template writes today's date; 26 Jul 2024 stands for it, so that tokens do not depend on the day"

_MARK = "\ue000 answer \ue000"  # of private use: no text has it, and trimming leaves it alone
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class RunawayTemplateError(InputError):
    """A chat template was stopped: not this row is at fault but the template, which would do it again."""


@dataclass(frozen=True)
class Written:
    """A row as text.

    spans: what is to be learned, as (start, end) characters, in order.
    add_bos: the text lacks the beginning-of-sequence token.
    cut_at_target: no token may cover both sides of the (only) span's start: a raw prompt is tokenized on its own when
        the model is used.
    """

    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...]
    add_bos: bool = False
    cut_at_target: bool = False


class _Start(Enum):
    """Where an answer begins."""

    PROMPT = 1
    """Behind the generation prompt."""
    TEXT = 2
    """Where its own text does: the template writes no generation prompt, or none that fits the beginning of a row."""


@dataclass(frozen=True)
class _Shape:
    """What does not depend on the words of a conversation.

    prompt: the length of the generation prompt, which may write the beginning of an answer, such as <think>.
    tail: what the template writes behind the last answer.
    """

    start: _Start
    prompt: int
    tail: str


class ChatTemplate:
    """The chat template of a tokenizer.

    source: its Jinja source.
    control_token: matches every special or added token of the tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str, control_token: re.Pattern[str]) -> None:
        self._name = tokenizer.name_or_path
        self._variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
        self._dated = "strftime_now" in source
        self.source = f"{_FIXED_STRFTIME}{source}" if self._dated else source
        self._control_token = control_token
        self._marks_answers = _GENERATION.search(source) is not None
        self._reasoning = next((name for name in REASONING if name in source), None)
        self._shapes: dict[tuple[tuple[str, bool], ...], _Shape] = {}

    def write(self, turns: Sequence[Turn], where: str) -> Written:
        """Write a conversation whose last turn is learned.

        Raises `InputError` for one that the template refuses, or of which it leaves something out, and if it cannot be told
        where the last answer is; `RunawayTemplateError` if the template had to be stopped.
        """
        full = self._render(turns, where)
        for turn in turns:
            if turn.role != "assistant" and not _holds(full, turn.text):
                raise self._refusal(where, f"leaves out words of a turn of the role {turn.role!r}")
        spans, notes = (self._marked if self._marks_answers else self._found)(full, turns, where)
        if self._dated:
            notes.add(FIXED_DATE)
        return Written(full, tuple(spans), tuple(sorted(notes)))

    def _marked(self, full: str, turns: Sequence[Turn], where: str) -> tuple[list[Span], set[str]]:
        """The answers as transformers' own assistant mask has them."""
        with self._stopped_or_refused(turns, where):
            _, marks = self._compiled.render_marked(self._messages(turns), add_generation_prompt=False, **self._variables)
        answers = [turn for turn in turns if turn.role == "assistant"]
        if len(marks) != len(answers):
            raise self._refusal(where, f"marks {len(marks)} parts as generated, and there are {len(answers)} answers")
        spans: list[Span] = []
        notes: set[str] = set()
        for turn, (start, end) in zip(answers, marks, strict=True):
            if turn.masked:
                continue
            if _holds_answer(full[start:end], turn):
                spans.append((start, end))
            elif turn is turns[-1]:
                raise self._loses(where, turn)
            else:
                notes.add(EARLIER_UNLABELLED)
        if not any(match.end() == end for match in self._control_token.finditer(full, max(start, end - 256), end)):
            notes.add(NO_END)
        return spans, notes

    def _found(self, full: str, turns: Sequence[Turn], where: str) -> tuple[list[Span], set[str]]:
        """The answers, each from behind its generation prompt to its end-of-turn token."""
        spans: list[Span] = []
        notes: set[str] = set()
        for index, turn in enumerate(turns):
            if not turn.learned:
                continue
            heard = turns[: index + 1]
            whole = full if len(heard) == len(turns) else self._render(heard, where)
            start, end = self._find(whole, heard, where, notes)
            if full.startswith(whole[:end]):
                spans.append((start, end))
            else:
                notes.add(EARLIER_UNLABELLED)
        return spans, notes

    def _find(self, whole: str, turns: Sequence[Turn], where: str, notes: set[str]) -> Span:
        """Where in `whole`, the text of these turns, the last of them is, up to its end-of-turn token."""
        key = tuple((turn.role, bool(turn.reasoning)) for turn in turns)
        shape = self._shapes.get(key)
        if shape is None or not whole.endswith(shape.tail):
            shape = self._shapes[key] = self._shape(turns, where)
        if not whole.endswith(shape.tail):
            raise self._refusal(where, "writes something else behind this answer than behind another")
        if shape.start is _Start.PROMPT:
            prefix = self._render(turns[:-1], where, generate=True)
            if not whole.startswith(prefix):
                raise self._unclear(where)
            start = len(prefix)
        else:
            start = self._start_of_text(whole, turns, where)
        text_end = len(whole) - len(shape.tail)
        end_of_turn = self._control_token.search(shape.tail)
        if end_of_turn is None:
            notes.add(NO_END)
        end = max(start, text_end + (end_of_turn.end() if end_of_turn else len(shape.tail.rstrip())))
        if not _holds_answer(whole[start - shape.prompt : end], turns[-1]):
            raise self._loses(where, turns[-1])
        return start, end

    def _shape(self, turns: Sequence[Turn], where: str) -> _Shape:
        text, mark = self._render_marked(turns, where)
        tail = text[mark + len(_MARK) :]
        opening = all(turn.role == "system" for turn in turns[:-1])  # templates want a user's turn before a prompt
        try:
            without, prompt = (self._render(turns[:-1], where, generate=generate) for generate in (False, True))
        except InputError as error:
            if not opening or isinstance(error, RunawayTemplateError):
                raise
            return _Shape(_Start.TEXT, 0, tail)
        if prompt == without or (opening and not text.startswith(prompt)):
            return _Shape(_Start.TEXT, 0, tail)
        return _Shape(_Start.PROMPT, max(0, len(prompt) - len(without)), tail)

    def _start_of_text(self, whole: str, turns: Sequence[Turn], where: str) -> int:
        """Where the words of the last turn begin, or the white space before them if there is no header."""
        text, mark = self._render_marked(turns, where)
        if not whole.startswith(text[:mark]):
            raise self._unclear(where)
        try:
            before = self._render(turns[:-1], where)
        except RunawayTemplateError:
            raise
        except InputError:
            return mark
        header = text[len(before) : mark] if turns[:-1] and text.startswith(before) else text[:mark]
        return mark if header.strip() else mark - len(header)

    def _render_marked(self, turns: Sequence[Turn], where: str) -> tuple[str, int]:
        """The text of a conversation with `_MARK` in place of its last answer, and where that is."""
        text = self._render((*turns[:-1], Turn("assistant", _MARK, reasoning=turns[-1].reasoning)), where)
        if text.count(_MARK) != 1:
            raise self._refusal(where, "does not write answers as they are")
        return text, text.index(_MARK)

    def _render(self, turns: Sequence[Turn], where: str, *, generate: bool = False) -> str:
        with self._stopped_or_refused(turns, where):
            if not turns:
                raise ValueError("there is nothing before the first answer")
            return self._compiled.render(self._messages(turns), add_generation_prompt=generate, **self._variables)

    @contextmanager
    def _stopped_or_refused(self, turns: Sequence[Turn], where: str) -> Iterator[None]:
        try:
            yield
        except LimitExceeded as error:
            raise RunawayTemplateError(
                f"{where}: the chat template of {self._name} was stopped: it {error}. Correct the template, or do "
                "without it by template: plain"
            ) from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise InputError(
                f"{where}: the chat template refuses the conversation (roles: {', '.join(t.role for t in turns)}): "
                f"{error}; change the row or set template: plain"
            ) from error

    @cached_property
    def _compiled(self) -> BoundedTemplate:
        return BoundedTemplate(self.source)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """The conversation as transformers gives it to templates: reasoning also under the names that some of them read."""
        name = self._reasoning or REASONING[0]
        return [
            {"role": turn.role, "content": turn.text}
            | (dict.fromkeys((name, "thinking", "reasoning_content"), turn.reasoning) if turn.reasoning else {})
            for turn in turns
        ]

    def _loses(self, where: str, turn: Turn) -> InputError:
        what = "its reasoning" if turn.reasoning else "it"
        return self._refusal(where, f"does not write all of the answer: a part of {what} would not be learned")

    def _unclear(self, where: str) -> InputError:
        return InputError(
            f"{where}: the chat template does not write the conversation as its generation prompt plus a response, "
            "so it is unclear which tokens to learn; set template: plain"
        )

    def _refusal(self, where: str, what: str) -> InputError:
        return InputError(f"{where}: the chat template {what}; change the row or set template: plain")


def _holds_answer(text: str, turn: Turn) -> bool:
    return _holds(text, turn.text) and _holds(text, turn.reasoning)


def _holds(text: str, part: str) -> bool:
    """Whether a text has another in it, but for white space, which templates trim."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


# Put before a template that asks for the date, this hides the `strftime_now` that transformers provides. Jinja swallows
# the line end (trim_blocks), and only that one: the template's own first character is safe.
_FIXED_STRFTIME = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f".replace('{code}', '{value}')"
        for code, value in {
            "%d": "26",
            "%m": "07",
            "%b": "Jul",
            "%B": "July",
            "%Y": "2024",
            "%y": "24",
            "%A": "Friday",
            "%a": "Fri",
            "%H": "00",
            "%M": "00",
            "%S": "00",
        }.items()
    )
    + " }}{% endmacro %}\n"
)
