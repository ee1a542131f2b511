"""How long the device waits for its rows: CPU milliseconds to build a batch, and those that no pass hides.

Micro-batches are built when a pass comes to them, while a GPU still computes the one before. It waits for the first one:
for dealing the rows of the global batch, and for building that. Rows of random tokens, 64 in a batch of 4 sources.

Usage: python benchmarks/batches.py [--length 1024] [--rows 64] [--repeat 20]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from bilevel import Shard, Stratified
from bilevel.data import Stream
from bilevel_llm.data.batches import micro_batches
from bilevel_llm.data.tokens import TokenTable

SOURCES, ROWS_OF_EACH = 4, 500


def source(length: int, seed: int) -> TokenTable:
    """Rows of a quarter of the length up to all of it. The second half of each carries a loss."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(length // 4, length + 1, ROWS_OF_EACH)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return TokenTable(
        ids=draw.integers(0, 32000, starts[-1]).astype(np.int32),
        labels=place >= np.repeat(lengths // 2, lengths),
        starts=starts,
        fingerprints=np.arange(ROWS_OF_EACH, dtype=np.uint64),
        files=(Path("random"),),
        file=np.zeros(ROWS_OF_EACH, np.int32),
        number=np.arange(ROWS_OF_EACH),
        rows_read=ROWS_OF_EACH,
        truncated=0,
        dropped=0,
        notes={},
        content_hash="",
    )


def milliseconds(act: Callable[[int], object], repeat: int) -> float:
    """The median CPU time of an act, which is given a number that it has not seen."""
    act(0)
    times = []
    for index in range(1, repeat + 1):
        started = time.process_time()
        act(index)
        times.append(time.process_time() - started)
    return 1e3 * median(times)


def main() -> None:
    """Build batches, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()

    tables = [source(options.length, seed) for seed in range(SOURCES)]
    sampler = Stratified(tuple(map(len, tables)), options.rows, Stream.LOWER)
    shown = Table(
        "rows",
        "micro-batch",
        "whole batch, ms",
        "until the first micro-batch, ms",
        title=f"{options.rows} × {options.length}",
    )
    for packed in (False, True):
        for size in (None, 8, 2):
            draw = partial(micro_batches, tables, sampler, shard=Shard(micro_batch_size=size), packed=packed)
            whole = milliseconds(lambda index, draw=draw: list(draw(index)), options.repeat)  # type: ignore[misc]
            first = milliseconds(lambda index, draw=draw: draw(index)[0], options.repeat)  # type: ignore[misc]
            shown.add_row("packed" if packed else "padded", str(size or options.rows), f"{whole:.1f}", f"{first:.1f}")
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
