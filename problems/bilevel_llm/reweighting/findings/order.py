"""Whether the order of the sources can be told from the noise of the draws and of the rows."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust


def order(trust: Trust) -> Sequence[Finding]:
    """Compares neighbors in the ranking, and the first with the last; see `bilevel.evidence.Evidence.t_value`."""
    if trust.judged is None:
        return []
    first, last = trust.ranked[0], trust.ranked[-1]
    if not trust.is_clear(first, last):
        words = (
            "no order: not even the heaviest and the lightest source differ by more than the noise of draws and rows, so "
            "that equal weights may serve as well"
        )
        return [Finding("no-order", True, words)]
    unclear = [f"{upper} and {lower}" for upper, lower, clear in trust.neighbors if not clear]
    if unclear:
        words = f"do not read an order into {'; '.join(unclear)}: these are within the noise"
        return [Finding("order-unclear", False, words)]
    words = "every neighboring pair in the ranking differs by more than the noise of draws and rows"
    return [Finding("order-unclear", False, words, passed=True)]
