"""The file that W&B keeps of a run that is not sent: records of protobuf in the log format of LevelDB."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD, BLOCK = 7, 32768  # bytes before the first record, and of a block; no record begins in the last six bytes of one
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Any]:
    """The records of the file, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), HEAD, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
