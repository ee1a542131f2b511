"""Damaged files of models and of runs: they are read, or refused in words, and a refusal writes nothing."""

import contextlib
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bilevel import InputError
from bilevel.plugins import load_plugins
from bilevel.run_reader import read_run
from bilevel_llm.model.files import find_model
from bilevel_llm.reweighting import saved_run
from tests.bilevel_llm.model.test_files import write_gguf

FEW, MANY = 4, 1500
HEADER = 6000  # bytes at the beginning of a file of weights, where names, shapes and places are
ROOM = 4 << 30  # bytes that reading may take
NUMBERS = ["0", "-1", "1", "3", "1e400", "99999999999", "1.5", '"1"', "null", "true", "[]", "{}", "NaN", "9" * 400]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three faults: bits, bytes and pieces changed, moved and lost, numbers that are others."""
    for _ in range(draw.randint(1, 3)):
        at, end = sorted(draw.randrange(min(len(content), HEADER) + 1) for _ in "ab")
        what = draw.randrange(6)
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content[:HEADER]))
        if what == 0:
            content = content[:at]
        elif what == 1:
            content = content[:at] + content[min(end, at + 9) :]
        elif what == 2:
            content = content[:at] + content[at:end] + content[at:]
        elif what == 3 and numbers:
            number = draw.choice(numbers)
            content = content[: number.start()] + draw.choice(NUMBERS).encode() + content[number.end() :]
        elif content:
            changed = bytearray(content)
            place = min(at, len(content) - 1)
            changed[place] = draw.choice([changed[place] ^ (1 << draw.randrange(8)), 0, 255, draw.randrange(256)])
            content = bytes(changed)
    return content


@contextlib.contextmanager
def refused_in_words(folder: Path) -> Iterator[None]:
    """Anything but an `InputError` passes through and fails the test; nothing may have been written, or asked much memory."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        with contextlib.suppress(InputError):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def both(test: Callable[..., None]) -> Any:
    """The same test with a few examples, always the same, and with many (marked `soak`)."""
    return pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.soak)], ids=["few", "many"])(test)


def each_damaged(file: Path, examples: int, check: Callable[[], None]) -> None:
    """Check with every damage of a file. What fails names its seed."""
    whole = file.read_bytes()
    for seed in range(examples):
        file.write_bytes(damaged(whole, random.Random(f"{file.name} {seed}")))
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"{file.name}, damage {seed}: {file.read_bytes()[:2000]!r}") from error
    file.write_bytes(whole)


@both
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_damaged_models(name: str, examples: int, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(model_directory("llama"), tmp_path / "model"))

    def check() -> None:
        with refused_in_words(tmp_path):
            files = find_model(str(place))
            tokenizer = files.load_tokenizer()
            tokenizer("a b")
            model, read = files.load_skeleton()
            if read is not None:
                for parameter, _ in model.named_parameters():
                    read(parameter)
            files.load_model()

    each_damaged(place / name, examples, check)


@both
def test_damaged_gguf(
    examples: int,
    model_directory: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "files" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, find_model(str(model_directory("llama"))).load_model())

    def check() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with refused_in_words(file.parent):
            find_model(str(file)).load_tokenizer()

    each_damaged(file, examples, check)


@both
@pytest.mark.parametrize("name", ["recipe.yaml", "weights.json"])
def test_damaged_runs(name: str, examples: int, make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, plugins = make_run(), load_plugins()

    def check() -> None:
        with refused_in_words(tmp_path):
            read_run(run)
            found = saved_run.read_run(run, plugins)
            assert sum(found.weights.values()) == pytest.approx(1.0)

    each_damaged(run / name, examples, check)
