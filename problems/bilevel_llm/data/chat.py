"""A row -> token ids, and which of them are targets: the assistant's words and the token that ends its turn.

A label says "the model must predict this token, from the ones before it". Labelled are the tokens of a response and the
end-of-turn token after it; not labelled are the role header (generation prompt) before it, what a template writes after
the end-of-turn token, and everything that somebody else says. A token that covers the end of the header and the beginning
of the response is labelled: the response would lose its first word. A row's first token is never labelled: nothing stands
before it.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean
from bilevel_llm.data.chat_template import (
    EARLIER_UNLABELLED,
    FIXED_DATE,
    NO_END,
    ChatTemplate,
    RunawayTemplateError,
    Span,
    Written,
)
from bilevel_llm.data.rows import Row, Turn

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["EARLIER_UNLABELLED", "FIXED_DATE", "NO_END", "PLAIN_TEMPLATE", "Encoded", "Encoder", "Template", "encode"]

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

_CHARACTERS_PER_TOKEN = 64  # of text that is looked at first: 16 times what words need
_SLACK = 128  # tokens before a cut in the text that the cut might have changed


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it.

    ids: token ids; of a row that is much longer than an encoder's max_length, the first ones, but more than that.
    labels: as long as ids; True where the token is a target, predicted from the position before it.
    notes: what a user should know about how the row was labelled (`EARLIER_UNLABELLED`, `NO_END`, `FIXED_DATE`).
    cut: whether the row has further tokens.
    """

    ids: list[int]
    labels: list[bool]
    notes: tuple[str, ...] = ()
    cut: bool = False


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
    max_length: how many tokens of a row matter; what is far beyond is not tokenized. None: all do.

    Raises `InputError` for an unknown template, or for "model" with a tokenizer that has none.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template = "auto", max_length: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._backend: Tokenizer | None = None
        if tokenizer.is_fast:
            self._backend = _without_postprocessing(tokenizer.backend_tokenizer)
        self._eos: str = tokenizer.eos_token or ""
        self._bos: int | None = None
        if tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
            self._bos = tokenizer.bos_token_id
        source = _source(tokenizer, template)
        self._template = None if source is None else ChatTemplate(tokenizer, source, _control_token(tokenizer))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's chat template; None if the plain one is used."""
        return None if self._template is None else self._template.source

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokenize rows: a few hundred at a time make good use of a fast tokenizer.

        Raises `InputError` for a row that the chat template refuses, that holds what the template does not write, or that
        it writes so that it cannot be told where the last response starts.
        """
        return [encoded for _, encoded in self.encode_usable(rows, _raise)]

    def encode_usable(self, rows: Sequence[Row], on_bad: Callable[[InputError], None]) -> list[tuple[Row, Encoded]]:
        """Tokenize the rows that can be. on_bad: called with what is wrong with each of the others.

        Raises `RunawayTemplateError` as `ChatTemplate.write`.
        """
        written = []
        for row in rows:
            try:
                written.append((row, self._cut(self._write(row))))
            except RunawayTemplateError:
                raise
            except InputError as error:
                on_bad(error)
        texts = [text for _, (text, _) in written]
        if self._backend is None:
            encoded = [self._encode_in_pieces(text) for text in texts]
        else:
            found = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
            encoded = [self._label(text, one) for text, one in zip(texts, found, strict=True)]
        return [(row, replace(one, cut=True) if cut else one) for (row, (_, cut)), one in zip(written, encoded, strict=True)]

    # ------------------------------------------------------------------------------------------------- rows -> text

    def _write(self, row: Row) -> Written:
        if not row.is_chat:
            return self._write_raw(row.turns)
        last = max(index for index, turn in enumerate(row.turns) if turn.learned)
        turns = row.turns[: last + 1]
        return self._write_plain(turns, row.where) if self._template is None else self._template.write(turns, row.where)

    def _write_raw(self, turns: Sequence[Turn]) -> Written:
        *prompt, target = (turn.text for turn in turns)
        start = sum(map(len, prompt))
        if not target.endswith(self._eos):
            target += self._eos
        notes = () if self._eos else (NO_END,)
        return Written("".join(prompt) + target, ((start, start + len(target)),), notes, add_bos=True, cut_at_target=True)

    def _write_plain(self, turns: Sequence[Turn], where: str) -> Written:
        text, spans = "", []
        for turn in turns:
            if turn.reasoning:
                raise InputError(
                    f"{where}: the plain template has no place for the reasoning of an answer; write it into the answer "
                    "itself, or use a model whose chat template writes it"
                )
            text += "\n\n" if text else ""
            header, _, tail = PLAIN_TEMPLATE[turn.role].partition("{text}")
            start = len(text) + len(header)
            text += header + turn.text + tail.format(eos=self._eos)
            if turn.learned:
                spans.append((start, len(text)))
        return Written(text, tuple(spans), () if self._eos else (NO_END,), add_bos=True)

    def _cut(self, written: Written) -> tuple[Written, bool]:
        """The beginning of a text that has far more than max_length tokens, and whether that is not all of it."""
        if self._max_length is None:
            return written, False
        tokens = self._max_length + _SLACK
        size = _CHARACTERS_PER_TOKEN * tokens
        while size < len(written.text) and len(self._piece(written.text[:size])) < tokens:
            size *= 2
        if size >= len(written.text):
            return written, False
        spans = tuple((start, min(end, size)) for start, end in written.spans if start < size)
        return replace(written, text=written.text[:size], spans=spans), True

    # ----------------------------------------------------------------------------------------------- text -> tokens

    def _label(self, written: Written, encoding: "Encoding") -> Encoded:
        ids = encoding.ids
        labels = [False] * len(ids)
        for start, end in written.spans:
            first, last = _tokens_of(encoding, (start, end))
            if written.cut_at_target and first < last and _place(encoding, first) < start:
                return self._encode_in_pieces(written)
            labels[first:last] = [True] * (last - first)
        return self._finish(written, ids, labels)

    def _encode_in_pieces(self, written: Written) -> Encoded:
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

    def _finish(self, written: Written, ids: list[int], labels: list[bool]) -> Encoded:
        if written.add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids, labels = [self._bos, *ids], [False, *labels]
        if labels:
            labels[0] = False
        return Encoded(ids, labels, written.notes)


def _tokens_of(encoding: "Encoding", span: Span) -> tuple[int, int]:
    """The tokens that cover any character of a span: from, and up to but without."""
    start, end = span
    if start == end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # the tokenizer drops some characters
        covering = [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > start]
        return (covering[0], covering[-1] + 1) if covering else (0, 0)
    last += 1
    while last < len(encoding.ids) and _place(encoding, last) < end:  # further bytes of the last character
        last += 1
    return first, last


def _place(encoding: "Encoding", token: int) -> int:
    """The first character that a token covers."""
    characters = encoding.token_to_chars(token)
    assert characters is not None  # nothing was added to the text
    return characters[0]


def _control_token(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches every special or added token; some vocabularies add runs of spaces, which are none."""
    tokens = {token for token in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens) if token.strip()}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _source(tokenizer: "PreTrainedTokenizerBase", template: str) -> str | None:
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


def _raise(error: Any) -> None:
    raise error
