"""Decide on a mix: how many rows of each source, for a number of rows or a budget of tokens.

The weights are shares of rows, as in the lower loss of `llm-reweighting`, which is the weighted sum of each source's mean
loss over rows. A budget of tokens sets how many rows there are, not how they are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import InputError
from bilevel_llm.data.reading import common_layout, first_rows
from bilevel_llm.mixing.mix import AS_THEY_ARE, Mix, OnShortfall, writing_format
from bilevel_llm.mixing.pool import Pool, make_pools
from bilevel_llm.mixing.quotas import Counts, Weights, largest_remainder, largest_total, redistribute
from bilevel_llm.reweighting.saved_run import fit_weights

if TYPE_CHECKING:
    from bilevel_llm.reweighting.problem import LLMReweighting

MAX_REPEATS = 4
"""Copies of a row at most: up to about four epochs over the same data are nearly as good as new data, and further ones
are worth less and less (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""


def make_mix(
    problem: LLMReweighting,
    weights: Mapping[str, float],
    *,
    rows: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    max_repeats: int = MAX_REPEATS,
    on_shortfall: OnShortfall = "error",
    format: str = AS_THEY_ARE,
    selection: Mapping[str, NDArray[np.int64]] | None = None,
) -> Mix:
    """Draw rows of the problem's sources by weights.

    weights: one for every source; scaled to sum to 1; 0 leaves a source out.
    rows, tokens: size of the mix, one of the two. Tokens are a bound: one row more would exceed it.
    seed: of which rows are drawn and of their order. A larger mix of the same seed and weights holds the rows of a smaller.
    max_repeats: copies of a row at most.
    format: "source" writes rows as they are; the name of a format that writes (see `Format.write`) writes all in that one.
    selection: source -> rows of its table; no others are drawn. None: all may be.

    A row is not drawn a second time before all of its source have been drawn once. Rows that also occur in a validation
    set are never drawn, nor are those that the run left out because they have nothing to learn within max_length tokens.

    Raises `InputError` for settings out of range, weights that do not fit the sources, sources whose rows do not fit into
    one file, and a mix larger than the data allows, with the largest that fits.
    """
    _check_settings(rows, tokens, seed, max_repeats)
    written_as = writing_format(format)
    given = fit_weights(weights, [source.name for source in problem.sources], "weights")
    first = [row for source in problem.sources if given[source.name] for row in first_rows(source)]
    if written_as is None:
        layout = common_layout(first)
    else:
        layout, *_ = [written_as.layout(written_as.write(row.row())) for row in first]  # or refuse, before the long work
    pools = make_pools(problem.source_tables, problem.validation_tables, seed, selection)
    shares = np.array(list(given.values()))
    capacity = np.array([len(pool.rows) * max_repeats for pool in pools], np.int64)
    total = rows if rows is not None else _rows_for(tokens or 0, pools, shares, capacity, on_shortfall)
    quotas = largest_remainder(shares, total)
    if on_shortfall == "error":
        _check_capacity(pools, shares, quotas, capacity, max_repeats)
    if on_shortfall == "redistribute":
        counts = redistribute(shares, capacity, total)
        if counts.sum() < total:
            raise InputError(
                f"all sources together can give {counts.sum():,} rows, not {total:,} (each at most {max_repeats} times); "
                "ask for fewer, or raise --max-repeats"
            )
    else:
        counts = np.minimum(quotas, capacity)
    return Mix(
        pools,
        problem.sources,
        shares,
        quotas,
        counts,
        written_as,
        layout,
        seed,
        max_repeats,
        on_shortfall,
    )


def _check_settings(rows: int | None, tokens: int | None, seed: int, max_repeats: int) -> None:
    if (rows is None) == (tokens is None):
        raise InputError("give the size of the mix either in rows (--rows) or in tokens (--tokens), and not both")
    for name, value, least in (
        ("--rows", rows, 1),
        ("--tokens", tokens, 1),
        ("--max-repeats", max_repeats, 1),
        ("--seed", seed, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")


def _rows_for(tokens: int, pools: Sequence[Pool], weights: Weights, capacity: Counts, on_shortfall: OnShortfall) -> int:
    """How many rows have at most that many tokens, while one row more has more."""

    def used(total: int) -> int:
        fill = on_shortfall == "redistribute"
        counts = redistribute(weights, capacity, total) if fill else largest_remainder(weights, total)
        return sum(pool.tokens(int(count)) for pool, count in zip(pools, counts, strict=True))

    if on_shortfall == "redistribute":
        most = int(capacity[weights > 0].sum())
        if used(most) == tokens:
            return most
        if used(most) < tokens:
            raise InputError(
                f"all sources together can give {used(most):,} tokens ({most:,} rows), not {tokens:,}; "
                "ask for fewer, or raise --max-repeats"
            )
    elif not any(len(pool.rows) for pool, weight in zip(pools, weights, strict=True) if weight):
        raise InputError("no source with a weight has a row that may be drawn: all also occur in the validation data")
    total = _last(lambda rows: used(rows) <= tokens)
    if not total:
        raise InputError(f"a mix of {tokens:,} tokens does not hold one row; give more tokens")
    return total


def _last(fits: Callable[[int], bool]) -> int:
    """A number n with fits(n) and not fits(n + 1); fits(0) is taken for granted."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_capacity(pools: Sequence[Pool], weights: Weights, quotas: Counts, capacity: Counts, max_repeats: int) -> None:
    """Raises `InputError` naming the source that is furthest from its quota, and what would fit."""
    if (quotas <= capacity).all():
        return
    worst = int(np.argmax(quotas / np.maximum(capacity, 0.5)))  # a quota over no row at all is worst
    pool, available = pools[worst], len(pools[worst].rows)
    rows = largest_total(weights, capacity)
    fitting = largest_remainder(weights, rows)
    tokens = sum(pool.tokens(int(count)) for pool, count in zip(pools, fitting, strict=True))
    ways = [f"at most --rows {rows} (--tokens {tokens})"] if rows else []
    ways += [f"--max-repeats {-(-quotas[worst] // available)}"] if available else []
    if pool.table.sampled_from is not None:
        ways.append(f"--all-rows, or a larger max_rows (the run read a sample of {pool.table.sampled_from:,} rows)")
    ways += ["--on-shortfall report (a smaller mix)", "--on-shortfall redistribute (more of the other sources)"]
    withheld = f", {pool.withheld:,} that occur in the validation data left out" if pool.withheld else ""
    raise InputError(
        f"the mix needs {quotas[worst]:,} rows of {pool.name!r}, which has {available:,}{withheld}, and each may be used "
        f"{max_repeats} times at most. Possible: {', '.join(ways)}"
    )
