"""Whether there are enough validation rows, and whether the order holds when they are resampled."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.resampling import (
    TargetRows,
    effective_rows,
    loss_error,
    rows_seen,
    share_reversed,
    steps_of_a_pass,
)
from bilevel_llm.reweighting.trust import Trust

FEW_ROWS = 100  # a mean over fewer is off by more than a tenth of the spread between rows
REVERSED = 0.025  # of the resamples: the usual 5%, on the one side where the order turns


def validation_rows(trust: Trust) -> Sequence[Finding]:
    """Says nothing where the validation rows are not known, or where there is no more than one source."""
    if trust.target is None or trust.has_one_source:
        return []
    rows = effective_rows(trust.moving, trust.target)
    resampled = _resampled(trust, trust.target)
    if rows >= FEW_ROWS:
        return [resampled]
    words = (
        f"few validation rows: {rows:.0f} effective ones, and the weights serve these more than their kind; at least "
        f"{FEW_ROWS} are safer; {_more_rows(trust, trust.target)}"
    )
    return [Finding("few-rows", True, words), resampled]


def _more_rows(trust: Trust, target: TargetRows) -> str:
    seen = rows_seen(trust.moving, target)
    if seen < target.total:
        return f"run more steps, as only {seen} of {target.total} rows were seen"
    return "add validation rows"


def _resampled(trust: Trust, target: TargetRows) -> Finding:
    """Whether the order holds when the validation rows are resampled; see `resampling`."""
    rows = rows_seen(trust.moving, target)
    loss = f"its loss is known to ±{1.96 * loss_error(trust.moving, target):.3f}"
    clear = [(upper, lower) for upper, lower, clear in trust.neighbors if clear]
    if not clear:
        words = f"target set not tested: no two neighbors are told apart, so nothing depends on its rows yet; {loss}"
        return Finding("target-small", False, words)
    push = {name: trust.pushes[:, i] for i, name in enumerate(trust.names)}
    fragile = []
    for upper, lower in clear:
        share = share_reversed(push[upper] - push[lower], trust.moving, target)
        if share is None:
            again = steps_of_a_pass(trust.moving, target)
            words = (
                f"target set too small to test: its {rows} rows come round every {again:.1f} steps, so how far "
                f"the weights depend on them cannot be told; {loss}; add rows, or lower problem.validation_batch_size"
            )
            return Finding("target-small", True, words)
        if share > REVERSED:
            fragile.append(f"{lower} comes out above {upper} in {share:.0%} of the resamples")
    if fragile:
        turned = "; ".join(fragile)
        words = f"target set too small: with {rows} other rows of its kind, {turned}; {loss}; {_more_rows(trust, target)}"
        return Finding("target-small", True, words)
    words = f"target set passes: the order holds when its {rows} rows are resampled; {loss}"
    return Finding("target-small", False, words)
