"""A whole data source as tokens: flat arrays, cached on disk by what they were made from."""

import hashlib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import InputError
from bilevel.files import remove_leftovers, unfinished, written_whole
from bilevel.lock import owned
from bilevel_llm.data.chat import PLAIN_TEMPLATE, Encoded, Encoder, Template
from bilevel_llm.data.file_hash import file_hash
from bilevel_llm.data.files import OnBad, file_type, pass_over
from bilevel_llm.data.progress import Progress, reading
from bilevel_llm.data.reading import OnBadRow, each_row, read_raw_rows, turned
from bilevel_llm.data.registered_formats import registered_formats
from bilevel_llm.data.rows import Row, fingerprint
from bilevel_llm.data.sample import sampled
from bilevel_llm.data.settings import DataFiles, DataSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("bilevel.llm")

_CACHE_VERSION = 2  # to be raised whenever the same input gives other arrays than before
_BATCH = 512  # rows tokenized at once: enough to keep a fast tokenizer's threads busy
_BATCH_CHARACTERS = 4 << 20  # at which a batch ends early
_LISTED = 1000  # rows that are left out of which the reason is kept
_SHOWN = 10  # of these that are logged

_Arrays = dict[str, Any]  # fields of TokenTable that are arrays, and those that are not
_Counts = dict[str, Any]


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The rows of one source that have something to learn from, as tokens.

    ids: token ids of all rows, one after another. Shape: (tokens,).
    labels: which of them are targets (see `chat`). Shape: (tokens,).
    starts: row i is ids[starts[i]:starts[i + 1]]. Shape: (rows + 1,).
    fingerprints: `rows.fingerprint` of each row. Shape: (rows,).
    files: the data files.
    file, number: where each row stands: its file's index in `files`, and line or number there. Shape: (rows,).
    rows_read: rows in the files; of a sample, the rows in it.
    truncated: rows of this table that were cut at max_length.
    dropped: rows left out because they had no target within max_length tokens; rows_read = len(table) + dropped.
    bad: rows, and lines, left out because they could not be used (`on_bad_row: skip`); rows_read does not count them.
    reasons: what was wrong with the first thousand of these.
    notes: what `Encoded.notes` said -> of how many rows of this table.
    content_hash: `content_hash` of the files.
    sampled_from: rows in the files, of which `max_rows` were sampled; None: all were read.
    stands_for: how many rows of the files each row stands for: 1 where all were read, more in a sample.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    starts: NDArray[np.int64]
    fingerprints: NDArray[np.uint64]
    files: tuple[Path, ...]
    file: NDArray[np.int32]
    number: NDArray[np.int64]
    rows_read: int
    truncated: int
    dropped: int
    notes: Mapping[str, int]
    content_hash: str
    bad: int = 0
    reasons: Sequence[str] = field(default=(), repr=False)
    sampled_from: int | None = None
    stands_for: float = 1.0

    @property
    def identity(self) -> dict[str, Any]:
        """What says which data these are: the number of rows, and the hash of the files' contents."""
        return {"rows": len(self), "hash": self.content_hash}

    @property
    def training_hash(self) -> str:
        """A hash of everything that training sees of these rows: tokens, labels, where rows begin, and their order."""
        digest = hashlib.sha256()
        for part in (self.ids, self.labels, self.starts, self.fingerprints):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and labels of one row, 0 <= index < len(table), as views. Shapes: (tokens of the row,)."""
        tokens = slice(self.starts[index], self.starts[index + 1])
        return self.ids[tokens], self.labels[tokens]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row. Shape: (rows,)."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Targets of each row, at least one. Shape: (rows,)."""
        return np.add.reduceat(self.labels, self.starts[:-1], dtype=np.int64)

    def where(self, index: int) -> str:
        """Where a row stands, as in `Row.where`."""
        return f"{self.files[self.file[index]]}:{self.number[index]}"


def tokenize(
    data: DataSet,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template = "auto",
    max_length: int,
    cache: Path | None = None,
    on_bad_row: OnBadRow = "error",
) -> TokenTable:
    """Read, tokenize and label the rows of a data set: all of them, or a sample (see `DataSet.max_rows`).

    Memory holds the tokens and a few hundred rows; while a sample is drawn, the rows of the sample.

    template: chat template; "auto" is the model's own, where it has one (see `chat`).
    max_length: tokens of a row at most; the beginning is kept. Rows without a target among them are left out.
    cache: directory that keeps the result for the next time (see `default_cache`); None keeps nothing. What is found
        there is used only if made from the same file contents, in the same order, with the same tokenizer and settings.

    on_bad_row: "skip" leaves out rows that cannot be read or encoded (see `TokenTable.bad`).

    Raises `InputError` for what cannot be read (`each_row`) or encoded (`Encoder`), if no row is left, and if the cache
    directory cannot be written.
    """
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; it must be at least 2: one token to see and one to predict")
    files = data.files()
    content = _content_hash(files)
    encoder = Encoder(tokenizer, template, max_length)
    if cache is None:
        arrays, counts = _build(data, files, encoder, max_length, on_bad_row)
    else:
        made_from = {
            "version": _CACHE_VERSION,
            "content": content,
            "format": registered_formats().identity(data.format),
            "chat_template": encoder.chat_template or dict(PLAIN_TEMPLATE),
            "tokenizer": _identity(tokenizer),
            "max_length": max_length,
            "on_bad_row": on_bad_row,
            **_selected(data),
        }
        path = cache / f"{_sha256(made_from)}.safetensors"
        cached = _load(path)
        if cached is None:
            with _claimed(path):  # if that fails, it is before the long work
                cached = _load(path)  # which another run may have made meanwhile
                if cached is None:
                    cached = _build(data, files, encoder, max_length, on_bad_row)
                    _save(path, *cached)
        arrays, counts = cached
    return TokenTable(**arrays, **counts, files=tuple(files), content_hash=content)


def content_hash(data: DataSet) -> str:
    """SHA-256 of the contents of all files of a data set, in their order. Names do not matter, endings do."""
    return _content_hash(data.files())


def rows_of(table: TokenTable, data: DataSet | None = None) -> list[Row]:
    """The whole rows of a table as text, in its order. The files are read again.

    data: what the table was made from; None: files whose rows' format is detected. Raises `InputError` if they have changed.
    """
    return list(read_again(table, data))


def read_again(table: TokenTable, data: DataSet | None = None, numbers: NDArray[np.int64] | None = None) -> Iterator[Row]:
    """The whole rows of a table as text, one by one and in its order. The files are read again.

    numbers: of the rows that are needed, in order; None: all of them. See `rows_of`.
    """
    how = data or DataFiles([str(path) for path in table.files])
    chosen = np.arange(len(table)) if numbers is None else numbers
    for index, path in enumerate(table.files):
        needed = set(table.number[chosen[table.file[chosen] == index]].tolist())
        for raw in read_raw_rows(path, how.format, None, pass_over, how.fields) if needed else ():
            if raw.number in needed:
                needed.remove(raw.number)
                yield raw.row()
            if not needed:
                break
        if needed:
            raise InputError(
                f"{path}: row {min(needed)} is not there any more: the file changed while it was read; start again"
            )


def default_cache() -> Path:
    """$BILEVEL_CACHE, or else $XDG_CACHE_HOME/bilevel, or else ~/.cache/bilevel."""
    if own := os.environ.get("BILEVEL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel"


def _selected(data: DataSet) -> dict[str, Any]:
    """Which columns and rows are read, where that is not all: tokens that were cached without these keys stay valid."""
    columns = {} if data.fields is None else {"fields": data.fields}
    rows = {} if data.max_rows is None else {"max_rows": data.max_rows, "sample_seed": data.sample_seed or 0}
    return {**columns, **rows}


def _build(
    data: DataSet, files: Sequence[Path], encoder: Encoder, max_length: int, on_bad_row: OnBadRow
) -> tuple[_Arrays, _Counts]:
    """The fields of a `TokenTable` that depend on the files' contents alone, not on where the files are."""
    ids, labels = array("i"), bytearray()
    starts, file_of, number, fingerprints = array("q", [0]), array("i"), array("q"), array("Q")
    notes: Counter[str] = Counter()
    rows_read = truncated = bad = 0
    first_dropped = ""
    reasons: list[str] = []

    def leave_out_row(error: InputError) -> None:
        nonlocal bad
        if on_bad_row == "error":
            raise error
        bad += 1
        if len(reasons) < _LISTED:
            reasons.append(str(error))

    with reading(files) as progress:
        by_file, sampled_from, stands_for = _rows(data, files, leave_out_row, progress)
        for file, rows in by_file:
            for row, encoded in _encoded(rows, encoder, leave_out_row, progress):
                rows_read += 1
                if not any(encoded.labels[:max_length]):
                    first_dropped = first_dropped or _why_dropped(row, encoded)
                    continue
                truncated += encoded.cut or len(encoded.ids) > max_length
                ids.extend(encoded.ids[:max_length])
                labels.extend(encoded.labels[:max_length])
                starts.append(len(ids))
                file_of.append(file)
                number.append(int(row.where.rpartition(":")[2]))
                fingerprints.append(fingerprint(row))
                notes.update(encoded.notes)
    if not ids:
        if not rows_read:
            raise InputError(f"none of {bad} rows can be used; the first: {reasons[0]}")
        raise InputError(
            f"no row has a token to learn within max_length={max_length}: {first_dropped} ({rows_read} rows read); "
            "raise max_length"
        )
    arrays = {
        "ids": np.frombuffer(ids, np.int32),
        "labels": np.frombuffer(labels, np.bool_),
        "starts": np.frombuffer(starts, np.int64),
        "fingerprints": np.frombuffer(fingerprints, np.uint64),
        "file": np.frombuffer(file_of, np.int32),
        "number": np.frombuffer(number, np.int64),
    }
    counts = {
        "rows_read": rows_read,
        "truncated": truncated,
        "dropped": rows_read - len(number),
        "notes": dict(notes),
        "bad": bad,
        "reasons": reasons,
        "sampled_from": sampled_from,
        "stands_for": stands_for,
    }
    return arrays, counts


def _rows(
    data: DataSet, files: Sequence[Path], on_bad: OnBad, progress: Progress
) -> tuple[Iterable[tuple[int, Iterator[Row]]], int | None, float]:
    """The rows to be tokenized, file by file, each file by its index.

    Also of how many rows they are a sample, None if they are all; and how many of these each stands for.
    """
    if data.max_rows is None:
        each = (each_row(path, data.format, None, on_bad, data.fields, progress.read) for path in files)
        return enumerate(each), None, 1.0
    raw = (
        (index, row)
        for index, path in enumerate(files)
        for row in read_raw_rows(path, data.format, None, on_bad, data.fields, progress.read)
    )
    sample, total = sampled(raw, data.max_rows, data.sample_seed or 0)
    by_file = groupby((row for _, row in sample), key=itemgetter(0))
    rows = ((index, turned((row for _, row in of_file), on_bad)) for index, of_file in by_file)
    return (rows, total, total / len(sample)) if total > len(sample) else (rows, None, 1.0)


def _encoded(rows: Iterator[Row], encoder: Encoder, on_bad: OnBad, progress: Progress) -> Iterator[tuple[Row, Encoded]]:
    while batch := list(_batch(rows)):
        yield from encoder.encode_usable(batch, on_bad)
        progress.advance(len(batch))


def _batch(rows: Iterator[Row]) -> Iterator[Row]:
    """Some hundred rows, or fewer that are long."""
    characters = 0
    for row in islice(rows, _BATCH):
        yield row
        characters += sum(len(turn.text) for turn in row.turns)
        if characters > _BATCH_CHARACTERS:
            return


def _why_dropped(row: Row, encoded: Encoded) -> str:
    if any(encoded.labels):
        return f"{row.where} has its first at token {encoded.labels.index(True) + 1} of {len(encoded.ids)}"
    if encoded.cut:
        return f"{row.where} has none among its first {len(encoded.ids)}"
    return f"{row.where} has none at all"


# ----------------------------------------------------------------------------------------------------------- the cache


def _content_hash(files: Sequence[Path]) -> str:
    parts, hashes = [], default_cache() / "hashes"
    for path in files:
        kind = file_type(path)
        if kind == "directory":
            members = sorted(member for member in path.rglob("*") if member.is_file())
            parts += [(member.relative_to(path).as_posix(), file_hash(member, hashes)) for member in members]
        else:
            parts.append((kind, file_hash(path, hashes)))
    return _sha256(parts)


def _identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        # how whoever used the tokenizer last wanted its output: no part of what it is
        del vocabulary["truncation"], vocabulary["padding"]
    else:
        vocabulary = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return _sha256([vocabulary, tokenizer.special_tokens_map])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(arrays: _Arrays, counts: str) -> str:
    digest = hashlib.sha256(counts.encode())
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _load(path: Path) -> tuple[_Arrays, _Counts] | None:
    """What `_save` wrote; None if there is no such file, or one that is not exactly as it was written."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        whole = metadata["digest"] == _digest(arrays, metadata["counts"])
        return (arrays, json.loads(metadata["counts"])) if whole else None
    except Exception:  # whatever is wrong with the file, it can be made again
        return None


def _save(path: Path, arrays: _Arrays, counts: _Counts) -> None:
    from safetensors.numpy import save_file

    facts = json.dumps(counts)
    try:
        with written_whole(path) as part:
            save_file(arrays, part, {"digest": _digest(arrays, facts), "counts": facts})
    except OSError as error:
        raise _unwritable(path.parent, error) from error


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Be the only one who makes this file, after whoever does so now; what writers that were killed have left is removed."""
    with ExitStack() as leaving:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            leaving.enter_context(owned(path, file=True, wait=True))
            for name in unfinished(path.parent):
                with suppress(InputError), owned(path.with_name(name), file=True):  # InputError: it is being written
                    remove_leftovers(path.parent, name)
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        yield


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(
        f"the cache directory {directory} cannot be written: {error.strerror}; set BILEVEL_CACHE to one that can"
    )


def report_table(what: str, table: TokenTable, max_length: int) -> None:
    """Log what was read, and what of it will not be seen."""
    count = f"{len(table)} rows" if table.sampled_from is None else f"{len(table):,} of {table.sampled_from:,} rows, sampled"
    words = f"{what}: {count}, {len(table.ids)} tokens, of which {int(table.labels.sum())} are learned"
    if table.truncated:
        words += f"; {table.truncated} rows cut at {max_length} tokens"
    if table.dropped:
        words += f"; {table.dropped} left out (nothing to learn within {max_length} tokens)"
    log.info("%s", words)
    for note, rows in table.notes.items():
        log.info("%s: in %d rows, %s", what, rows, note)
    if table.bad:
        log.warning("%s: %d rows are left out because they cannot be used (on_bad_row: skip):", what, table.bad)
        for reason in table.reasons[:_SHOWN]:
            log.warning("  %s", reason)
        if table.bad > _SHOWN:
            log.warning("  and %d more", table.bad - _SHOWN)
