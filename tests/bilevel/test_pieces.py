"""Files that are hashed while they are written, and tensors whose pieces are in several of them."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bilevel import InputError
from bilevel.checkpoint import INDEX, MANIFEST, SavedVariable, damage
from bilevel.errors import DamagedError
from bilevel.pieces import Piece, write_pieces
from bilevel.sealed import broken, write_sealed

WHOLE = {
    "weights/a": torch.arange(35.0).view(5, 7),
    "weights/low": torch.arange(9, dtype=torch.bfloat16),
    "weights/flag": torch.tensor([True, False, True]),
    "weights/none": torch.empty(0, 3),
    "optimizer/a/step": torch.tensor(7.0, dtype=torch.float64),
}


def save(where: Path, *cuts: tuple[float, float]) -> SavedVariable:
    """A variable in as many files as there are stretches, which are given as shares of every tensor."""
    files = []
    for number, (begin, end) in enumerate(cuts):
        pieces = []
        for name, tensor in WHOLE.items():
            start, stop = round(begin * tensor.numel()), round(end * tensor.numel())
            pieces.append(Piece(name, tuple(tensor.shape), start, tensor.reshape(-1)[start:stop]))
        files.append(f"y-{number}.safetensors")
        write_pieces(where / files[-1], pieces)
    facts = {"active": [], "steps": 3, "marked": False, "files": files}
    (where / INDEX).write_text(json.dumps({"y": facts}))
    return SavedVariable(where, "y")


@pytest.mark.parametrize(
    "cuts", [[(0, 1)], [(0, 0.5), (0.5, 1)], [(0, 0), (0, 0.1), (0.1, 1)], [(0.4, 1), (0, 0.7), (0.3, 0.5)]]
)
def test_a_tensor_and_any_stretch_of_it_are_read_from_however_many_pieces(
    tmp_path: Path, cuts: list[tuple[float, float]]
) -> None:
    saved = save(tmp_path, *cuts)
    for name, tensor in WHOLE.items():
        found = saved.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
    flat = WHOLE["weights/a"].reshape(-1)
    for start in range(36):
        for stop in range(start, 36):
            assert torch.equal(saved.read("weights/a", range(start, stop)), flat[start:stop])
    assert dict(saved.weights()).keys() == {"a", "low", "flag", "none"}


def test_a_file_of_whole_tensors_is_one_that_any_reader_of_safetensors_takes(tmp_path: Path) -> None:
    save(tmp_path, (0, 1))
    found: dict[str, Tensor] = load_file(tmp_path / "y-0.safetensors")
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in WHOLE.items())
    data = (tmp_path / "y-0.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begins = {name: header[name]["data_offsets"][0] % tensor.element_size() for name, tensor in WHOLE.items()}
    assert not any(begins.values()), "a tensor that is mapped into memory begins at a multiple of its width"


@pytest.mark.parametrize("cuts", [[(0, 0.5)], [(0.5, 1)], [(0, 0.4), (0.6, 1)]])
def test_a_tensor_of_which_a_piece_is_missing_is_named(tmp_path: Path, cuts: list[tuple[float, float]]) -> None:
    with pytest.raises(DamagedError, match=r"of y/\S+, which has the shape \(.*\), the numbers from \d+ on are missing"):
        save(tmp_path, *cuts)


def test_a_precision_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    piece = Piece("weights/a", (1,), 0, torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(InputError, match=r"weights/a is in torch\.complex128"):
        write_pieces(tmp_path / "y", [piece])


def test_a_file_is_hashed_as_it_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.sealed.CHUNK", 7)
    content = bytes(range(200))
    seal = write_sealed(tmp_path / "file", [content[:50], b"", content[50:]])
    assert (tmp_path / "file").read_bytes() == content
    assert (seal.bytes, seal.sha256) == (200, hashlib.sha256(content).hexdigest())
    assert broken(tmp_path / "file", seal) is None
    (tmp_path / "file").write_bytes(content[::-1])
    assert "its hash differs" in (broken(tmp_path / "file", seal) or "")


def test_a_disk_that_is_full_while_a_file_is_written_is_told_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_sealed(tmp_path / "file", [b"a" * 100])
    assert os.fspath(caught.value.filename) == str(tmp_path / "file")


def test_each_process_verifies_the_files_that_it_wrote_and_will_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{variable}-{rank}-of-3.safetensors" for variable in "xyz" for rank in (1, 2, 3)]
    seals = {name: {"bytes": 0, "sha256": ""} for name in (*names, INDEX, "run.json")}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2, "files": seals}))
    asked: list[str] = []
    monkeypatch.setattr("bilevel.checkpoint.broken", lambda file, seal: asked.append(file.name))
    for rank in range(3):
        assert damage(tmp_path, rank, 3) is None
        assert [name for name in asked if name in names] == [f"{variable}-{rank + 1}-of-3.safetensors" for variable in "xyz"]
        names, asked = [name for name in names if name not in asked], []
    assert names == []


def test_a_checkpoint_of_another_format_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {}}))
    assert re.search(r"written by another version of bilevel \(its format of checkpoints is 1, and", damage(tmp_path) or "")
