"""A row -> token ids, and which of them are targets: the assistant's words and the token that ends its turn.

A label says "the model must predict this token, from the ones before it". Labelled are the tokens of a response and the
end-of-turn token after it; not labelled are the role header (generation prompt) before it, what a template writes after
the end-of-turn token, and everything that somebody else says. A row's first token is never labelled: nothing stands
before it.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean
from bilevel_llm.data.rows import Row, Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "model", "plain"]
"""The chat template to use. "auto" takes the model's own if its tokenizer has one, and the plain one otherwise."""

PLAIN_TEMPLATE: Mapping[str, str] = {
    "system": "{text}",
    "user": "### Instruction:\n{text}",
    "assistant": "### Response:\n{text}{eos}",
}
"""The plain chat template: what each turn becomes. `{eos}` is the tokenizer's end-of-sequence token, if it has one; a
blank line separates turns. For one question and its answer:

    ### Instruction:
    {user}

    ### Response:
    {assistant}{eos}
"""

EARLIER_UNLABELLED = "an earlier response is not labelled: the chat template rewrites it once more turns follow"
NO_END = "no end-of-turn token follows the response, so the model does not learn to stop"
FIXED_DATE = "the chat template writes today's date; 26 Jul 2024 stands for it, so that tokens do not depend on the day"


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it.

    ids: token ids.
    labels: as long as ids; True where the token is a target, predicted from the position before it.
    notes: what a user should know about how the row was labelled (`EARLIER_UNLABELLED`, `NO_END`, `FIXED_DATE`).
    """

    ids: list[int]
    labels: list[bool]
    notes: tuple[str, ...] = ()


def encode(row: Row, tokenizer: "PreTrainedTokenizerBase", *, template: Template = "auto") -> Encoded:
    """Tokenize one row. For many rows, keep an `Encoder`: setting one up takes longer than a row.

    Raises `InputError` as `Encoder` and `Encoder.encode` do.
    """
    (encoded,) = Encoder(tokenizer, template).encode([row])
    return encoded


class Encoder:
    """Tokenizes rows with one tokenizer and chat template.

    A conversation is written out with the template and tokenized as one text, to which no special tokens are added that
    the template does not write; turns after the last response are left out. The plain template is `PLAIN_TEMPLATE`,
    after the beginning-of-sequence token if the tokenizer normally adds it.
    Rows of prompt and completion, or of text, do not use the template: they are the beginning-of-sequence token if the
    tokenizer normally adds it, the texts, and the end-of-sequence token if there is one.

    tokenizer: fast or slow. A slow one cannot say which characters a token covers, so prompts and responses are
        tokenized one by one.
    template: see `Template`.

    Raises `InputError` for an unknown template, or for "model" with a tokenizer that has none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template = "auto") -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = None
        if tokenizer.is_fast:
            self._backend = _without_postprocessing(tokenizer.backend_tokenizer)
        self._eos: str = tokenizer.eos_token or ""
        self._bos: int | None = None
        if tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
            self._bos = tokenizer.bos_token_id
        added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        self._control_tokens = tuple(token for token in added if token.strip())  # some vocabularies add runs of spaces
        longest_first = sorted(self._control_tokens, key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.chat_template: str | None = _chat_template(tokenizer, template)
        """The Jinja source of the model's chat template; None if the plain one is used."""
        self._dated = self.chat_template is not None and "strftime_now" in self.chat_template
        if self._dated:
            self.chat_template = f"{_FIXED_STRFTIME}{self.chat_template}"

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokenize rows: a few hundred at a time make good use of a fast tokenizer.

        Raises `InputError` for a row that the model's chat template refuses, or writes so that it cannot be told where
        the last response starts.
        """
        written = [self._write(row) for row in rows]
        if self._backend is None:
            return [self._encode_in_pieces(text) for text in written]
        encodings = self._backend.encode_batch([text.text for text in written], add_special_tokens=False)
        return [self._label(text, one.ids, one.offsets) for text, one in zip(written, encodings, strict=True)]

    # ------------------------------------------------------------------------------------------------- rows -> text

    def _write(self, row: Row) -> "_Written":
        if not row.is_chat:
            return self._write_raw(row.turns)
        last = max(index for index, turn in enumerate(row.turns) if turn.learned)
        turns = row.turns[: last + 1]
        return self._write_plain(turns) if self.chat_template is None else self._write_with_model(turns, row.where)

    def _write_raw(self, turns: Sequence[Turn]) -> "_Written":
        *prompt, target = (turn.text for turn in turns)
        start = sum(map(len, prompt))
        text = "".join(prompt) + target
        if not text.endswith(self._eos):
            text += self._eos
        notes = () if self._eos else (NO_END,)
        return _Written(text, ((start, len(text)),), notes, add_bos=True, cut_at_target=True)

    def _write_plain(self, turns: Sequence[Turn]) -> "_Written":
        text, spans = "", []
        for turn in turns:
            text += "\n\n" if text else ""
            header, _, tail = PLAIN_TEMPLATE[turn.role].partition("{text}")
            start = len(text) + len(header)
            text += header + turn.text + tail.format(eos=self._eos)
            if turn.learned:
                spans.append((start, len(text)))
        return _Written(text, tuple(spans), () if self._eos else (NO_END,), add_bos=True)

    def _write_with_model(self, turns: Sequence[Turn], where: str) -> "_Written":
        full = self._render(turns, where)
        notes = {FIXED_DATE} if self._dated else set()
        spans = []
        for index, turn in enumerate(turns[:-1]):
            if turn.learned:
                with suppress(InputError):  # some templates want a user's turn first
                    if span := self._find_response(full, turns, index, where):
                        spans.append(span)
                        continue
                notes.add(EARLIER_UNLABELLED)
        last = self._find_response(full, turns, len(turns) - 1, where)
        if last is None:
            raise InputError(
                f"{where}: the chat template does not write the conversation as its generation prompt plus a response, "
                "so it is unclear which tokens to learn; set template: plain"
            )
        if not full[slice(*last)].endswith(self._control_tokens):
            notes.add(NO_END)
        return _Written(full, (*spans, last), tuple(sorted(notes)))

    def _find_response(self, full: str, turns: Sequence[Turn], index: int, where: str) -> tuple[int, int] | None:
        """Where in `full`, the text of all turns, the response turns[index] is, up to its end-of-turn token.

        It is what follows the generation prompt. None if `full` does not have it there as it was when it came last.
        """
        prefix = self._render(turns[:index], where, generate=True)
        whole = self._render(turns[: index + 1], where)
        if not whole.startswith(prefix):
            return None
        start = len(prefix)
        body = turns[index].text.strip()  # templates often strip it too
        body_start = len(whole) - len(whole[start:].lstrip())
        if body and whole.startswith(body, body_start):
            end_of_turn = self._control_token.search(whole, body_start + len(body))
        else:  # the template has rewritten it, say with an empty block of thoughts first
            end_of_turn = max(self._control_token.finditer(whole, start), key=re.Match.end, default=None)
        end = end_of_turn.end() if end_of_turn else max(start, len(whole.rstrip()))
        return (start, end) if full.startswith(whole[:end]) else None

    def _render(self, turns: Sequence[Turn], where: str, *, generate: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=generate, tokenize=False
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise InputError(
                f"{where}: the chat template refuses the conversation (roles: {', '.join(t.role for t in turns)}): "
                f"{error}; change the row or set template: plain"
            ) from error
        return text

    # ----------------------------------------------------------------------------------------------- text -> tokens

    def _label(self, written: "_Written", ids: list[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
        target = written.spans[0][0]
        if written.cut_at_target and any(start < target < end for start, end in offsets):
            return self._encode_in_pieces(written)
        labelled = bytearray(len(written.text) + 1)  # by character; a token may stand, empty, behind the last one
        for start, end in written.spans:
            labelled[start:end] = b"\1" * (end - start)
        return self._finish(written, ids, [bool(labelled[start]) for start, _ in offsets])

    def _encode_in_pieces(self, written: "_Written") -> Encoded:
        ids: list[int] = []
        labels: list[bool] = []
        done = 0
        for start, end in (*written.spans, (len(written.text), len(written.text))):
            for piece, label in ((written.text[done:start], False), (written.text[start:end], True)):
                tokens = self._piece(piece) if piece else []
                ids += tokens
                labels += [label] * len(tokens)
            done = end
        return self._finish(written, ids, labels)

    def _piece(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _finish(self, written: "_Written", ids: list[int], labels: list[bool]) -> Encoded:
        if written.add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids, labels = [self._bos, *ids], [False, *labels]
        if labels:
            labels[0] = False
        return Encoded(ids, labels, written.notes)


@dataclass(frozen=True)
class _Written:
    """A row as text.

    spans: what is to be learned, as (start, end) characters, in order.
    add_bos: the text lacks the beginning-of-sequence token.
    cut_at_target: no token may cover both sides of the (only) span's start: a raw prompt is tokenized on its own when
        the model is used. A chat template sees to that itself, and a token that does is not labelled.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    add_bos: bool = False
    cut_at_target: bool = False


def _chat_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> str | None:
    known = get_args(Template)
    if template not in known:
        raise InputError(f"unknown template {template!r}{did_you_mean(template, known)}")
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return None
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template to use; set template: plain"
        ) from error
    return text


def _without_postprocessing(backend: "Tokenizer") -> "Tokenizer":
    """A tokenizer that never cuts or pads, and whose offsets cover white space: some post-processors trim it."""
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


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
