"""Run directories in which something was lost or changed: what it is gets a name, and the newest whole checkpoint is used."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bilevel import AdamW, InputError, ScaleBiO, fit
from bilevel.checkpoint import damage
from bilevel.errors import DamagedError
from bilevel.run_reader import read_run
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

SOLVER = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=0.2, optimizer_x=AdamW(), optimizer_z=AdamW(), warmup=1)
LAST, BEFORE = "checkpoints/step-00000008", "checkpoints/step-00000006"


def run(output: Path, steps: int = 8, resume: bool = False) -> torch.Tensor:
    result = fit(
        Distance(noise=0.3),
        SOLVER,
        TorchBackend(device="cpu"),
        steps=steps,
        output=output,
        checkpoint_every=2,
        resume=resume,
    )
    return result.x["value"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("made")
    run(where / "run")
    (where / "x.txt").write_text(repr(run(where / "longer", 10).tolist()))
    return where


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


FILES = ["manifest.json", "run.json", "variables.json", "x-00001-of-00001.safetensors", "z-00001-of-00001.safetensors"]


def flip(file: Path, at: float, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(copy: Path, file: str) -> None:
    whole = (copy / LAST / file).read_bytes()
    for part in range(16):
        flip(copy / LAST / file, part / 15, bit=part % 8)
        found = damage(copy / LAST)
        if file != "manifest.json":
            assert found is not None
            assert file in found
        elif found is None:  # white space between its entries
            assert json.loads((copy / LAST / file).read_bytes()) == json.loads(whole)
        (copy / LAST / file).write_bytes(whole)
    assert damage(copy / LAST) is None


@pytest.mark.soak
@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_in_a_checkpoint_is_found(copy: Path, file: str) -> None:
    whole = (copy / LAST / file).read_bytes()
    for byte in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[byte] ^= 1 << bit
            (copy / LAST / file).write_bytes(data)
            found = damage(copy / LAST)
            assert found is not None or (file == "manifest.json" and json.loads(data) == json.loads(whole)), (byte, bit)


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def put(text: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(text) and None  # type: ignore[func-returns-value]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def replaced(file: Path) -> None:
    file.unlink()
    file.mkdir()


CHECKPOINT_DAMAGE = [
    *(
        (f, damage)
        for f in FILES
        for damage in (Path.unlink, cut, put(b""), put(b"{}"), put(b"null"), put(b"\xff\xfe"), replaced)
    ),
    ("z-00001-of-00001.safetensors", lambda file: flip(file, 0.0, 6)),
    ("variables.json", edited(z=[])),
    ("run.json", edited(memory=None)),
    ("run.json", edited(steps=7)),
    ("manifest.json", edited(files={})),
    ("manifest.json", put(b"[" * 100_000)),
]


@pytest.mark.parametrize(("file", "do"), CHECKPOINT_DAMAGE)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(
    copy: Path, made: Path, file: str, do: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    do(copy / LAST / file)
    with caplog.at_level(logging.WARNING):
        x = run(copy, 10, resume=True)
    (message,) = [record.getMessage() for record in caplog.records if "whole" in record.getMessage()]
    assert LAST in message
    assert f"going on from {copy / BEFORE}, the newest checkpoint that is whole" in message
    assert repr(x.tolist()) == (made / "x.txt").read_text()
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
        "damaged-step-00000008", "step-00000008", "step-00000010",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["step-00000009-copy", "step-9", "step-00000009.tar", "step-00000009"])
def test_copies_and_other_files_beside_checkpoints_are_no_checkpoints(copy: Path, made: Path, name: str) -> None:
    other = copy / "checkpoints" / name
    if name.endswith(".tar"):
        other.write_bytes(b"tar")
    else:
        shutil.copytree(copy / BEFORE, other)
    assert repr(run(copy, 10, resume=True).tolist()) == (made / "x.txt").read_text()


def test_without_any_whole_checkpoint_a_resume_is_refused_and_nothing_is_changed(copy: Path) -> None:
    for step in (LAST, BEFORE):
        flip(copy / step / "x-00001-of-00001.safetensors", 0.9)
    before = content(copy)
    with pytest.raises(DamagedError, match=r"step-00000008/x-.* its hash differs; no checkpoint in .* is whole"):
        run(copy, 10, resume=True)
    assert content(copy) == before


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(b"\n".join(change(file.read_bytes().split(b"\n")))) and None  # type: ignore[func-returns-value]


METRICS_DAMAGE = {
    "a number": lines(lambda all: [all[0], b"1", *all[2:]]),
    "an empty object": lines(lambda all: [all[0], b"{}", *all[2:]]),
    "an empty line": lines(lambda all: [all[0], b"", *all[1:]]),
    "not UTF-8": lines(lambda all: [all[0], b"\xff" + all[1], *all[2:]]),
    "a line separator of Unicode": lines(lambda all: [all[0], "\u2028".encode() + all[1], *all[2:]]),
    "a line twice": lines(lambda all: [all[0], all[0], *all[1:]]),
    "a line that is lost": lines(lambda all: all[1:]),
    "deep nesting": lines(lambda all: [all[0], b"[" * 100_000, *all[2:]]),
    "another name of the upper variable": lines(lambda all: [all[0], all[1].replace(b'"x0"', b'"y0"'), *all[2:]]),
    "a directory": replaced,
}


@pytest.mark.parametrize("kind", METRICS_DAMAGE)
def test_damaged_metrics_are_named_by_who_reads_and_who_resumes(copy: Path, kind: str) -> None:
    METRICS_DAMAGE[kind](copy / "metrics.jsonl")
    with pytest.raises(DamagedError, match=r"metrics\.jsonl"):
        read_run(copy)
    before = content(copy)
    with pytest.raises(DamagedError, match=r"metrics\.jsonl"):
        run(copy, 10, resume=True)
    assert content(copy) == before


def test_a_changed_number_in_the_metrics_is_found_when_they_are_resumed_from(copy: Path) -> None:
    file = copy / "metrics.jsonl"
    file.write_text(file.read_text().replace('"seconds": 0', '"seconds": 1', 1))
    with pytest.raises(DamagedError, match="is not as it was written: the hash of its first 8 lines differs"):
        run(copy, 10, resume=True)


@pytest.mark.parametrize(
    "text", [b"", b"a: [", b"\x00\x01", b"\xff", b"null", b"- 1", b"a: 2024-13-45", b"problem: 3", b"[" * 1500]
)
def test_a_damaged_recipe_is_named_by_who_reads_and_who_resumes(copy: Path, text: bytes) -> None:
    (copy / "recipe.yaml").write_bytes(text)
    before = content(copy)
    with pytest.raises(DamagedError, match=r"recipe\.yaml"):
        read_run(copy)
    with pytest.raises(InputError, match=r"recipe\.yaml|a different recipe"):
        run(copy, 10, resume=True)
    assert content(copy) == before


def test_a_refused_resume_changes_nothing(copy: Path) -> None:
    before = content(copy)
    for steps, problem, words in ((6, Distance(noise=0.3), "has done 8 steps already"), (10, Distance(noise=0.1), "noise")):
        with pytest.raises(InputError, match=words):
            fit(problem, SOLVER, TorchBackend(device="cpu"), steps=steps, output=copy, resume=True)

    class Other(Distance):
        def fingerprint(self) -> str:
            return "other data"

    Other.__qualname__, Other.__module__ = Distance.__qualname__, Distance.__module__
    with pytest.raises(InputError, match="different data or a different model"):
        fit(Other(noise=0.3), SOLVER, TorchBackend(device="cpu"), steps=10, output=copy, resume=True)
    assert content(copy) == before
