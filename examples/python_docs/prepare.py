"""Make the demo's data from texts that every Python installation carries.

The target is the language reference (`pydoc_data.topics`). Four sources compete for weight:

    reference   other topics of the same reference
    docstrings  documentation of the standard library's modules
    code        commented source code of the standard library
    shuffled    the text of `reference` with the words of every row in random order

Usage: python prepare.py DIRECTORY
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

WORDS = 48  # about 64 tokens of prose
ROWS = 400  # of each source


def main(directory: Path) -> None:
    """Write one JSONL file for each source, and the validation file."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    prose = {name: list(rows_of_words(topics[name])) for name in names}
    validation = [row for name in names[::3] for row in prose[name]]
    known = {run for row in validation for run in runs_of_words(row)}
    reference = [row for name in names if name not in names[::3] for row in prose[name]]
    reference = [row for row in reference if known.isdisjoint(runs_of_words(row))]  # topics quote each other
    library = [file.read_text(encoding="utf-8") for file in library_files()]
    random.seed(0)
    write(directory / "validation.jsonl", validation)
    write(directory / "reference.jsonl", reference)
    write(directory / "shuffled.jsonl", [" ".join(random.sample(row.split(), WORDS)) for row in reference])
    write(directory / "docstrings.jsonl", [row for text in library for row in rows_of_words(" ".join(docstrings(text)))])
    write(directory / "code.jsonl", [row for text in library for row in rows_of_lines(text)])


def library_files() -> list[Path]:
    """The public single-file modules of the standard library, in a fixed order."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))


def rows_of_words(text: str) -> Iterable[str]:
    """Prose in rows of WORDS words, without markup and rulers; a remainder shorter than that is left out."""
    words = re.sub(r'[*_`"=\-]{2,}|[*`]', " ", text).split()
    for start in range(0, len(words) - WORDS + 1, WORDS):
        yield " ".join(words[start : start + WORDS])


def runs_of_words(row: str, length: int = 6) -> Iterable[tuple[str, ...]]:
    """Every run of that many words of a row."""
    words = row.split()
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def rows_of_lines(text: str) -> Iterable[str]:
    """Commented code: rows of six lines that are not empty, at least two of them comments."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = (lines[start : start + 6] for start in range(0, len(lines) - 5, 6))
    return ("\n".join(row) for row in rows if sum(line.lstrip().startswith("#") for line in row) >= 2)


def docstrings(source: str) -> Iterable[str]:
    """Every docstring of a module that is longer than a sentence."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and len(text := ast.get_docstring(node) or "") > 80:
            yield text


def write(file: Path, rows: list[str]) -> None:
    """ROWS of the rows, evenly spread, as JSON lines; an equal file is left alone."""
    step = max(1, len(rows) // ROWS)
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows[::step][:ROWS])
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    print(f"{file}: {min(ROWS, len(rows))} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
