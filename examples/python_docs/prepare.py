"""Make the data of the demo from texts that come with every Python installation.

The target is the language reference (`pydoc_data.topics`). Four sources compete for weight:

    reference   other topics of the same reference
    docstrings  documentation of the standard library
    code        source code of the standard library
    shuffled    the text of `reference` with the words of every row in random order

A row consists of five consecutive lines, about 64 tokens. Rows of the target for which the validation file has no room form
the test file, unless one of their lines also appears in the validation file or in a source.

Usage: python prepare.py DIRECTORY
"""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

LINES = 5  # in a row
ROWS = 400  # in each source


def main(directory: Path) -> None:
    """Write one JSONL file for each source, the validation file and the test file."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    prose = {name: rows(topics[name]) for name in names}
    validation = [row for name in names[::3] for row in prose[name]]
    known = {line for row in validation for line in row.splitlines()}
    reference = [row for name in names if name not in names[::3] for row in prose[name]]
    reference = [row for row in reference if known.isdisjoint(row.splitlines())]  # topics quote each other
    library = [file.read_text(encoding="utf-8") for file in library_files()]
    random.seed(0)
    used = spread(validation)
    seen = {line for row in used for line in row.splitlines()}
    write(directory / "validation.jsonl", used)
    write(directory / "test.jsonl", [row for row in validation if seen.isdisjoint(row.splitlines())])
    write(directory / "reference.jsonl", reference)
    write(directory / "docstrings.jsonl", [row for text in library for words in docstrings(text) for row in rows(words)])
    write(directory / "code.jsonl", [row for text in library for row in rows(text)])
    write(directory / "shuffled.jsonl", [shuffled(row) for row in reference])


def rows(text: str) -> list[str]:
    """Rows of LINES lines, without empty lines; a shorter remainder is dropped."""
    lines = [line for line in text.splitlines() if line.strip()]
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines) - LINES + 1, LINES)]


def shuffled(row: str) -> str:
    """The words of the row in random order."""
    words = row.split()
    return " ".join(random.sample(words, len(words)))


def library_files() -> list[Path]:
    """The public single-file modules of the standard library, in a fixed order."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))


def docstrings(source: str) -> Iterable[str]:
    """Every docstring of a module that is longer than a sentence."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and len(text := ast.get_docstring(node) or "") > 80:
            yield text


def spread(rows: list[str]) -> list[str]:
    """ROWS of the rows, evenly spread."""
    return rows[:: max(1, len(rows) // ROWS)][:ROWS]


def write(file: Path, rows: list[str]) -> None:
    """Write ROWS of the rows as JSON lines; a file that already holds them is left alone."""
    chosen = spread(rows)
    text = "".join(json.dumps({"text": row}) + "\n" for row in chosen)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    print(f"{file}: {len(chosen)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
