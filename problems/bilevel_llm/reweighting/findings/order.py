"""Whether the order of the sources can be told from the noise of the run."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust


def order(trust: Trust) -> Sequence[Finding]:
    """Compares the signals of neighbors in the ranking."""
    if trust.has_one_source:
        return []
    unclear = [f"{upper} and {lower}" for upper, lower, clear in trust.neighbors if not clear]
    if unclear:
        words = f"within the noise, do not read an order into: {'; '.join(unclear)}"
        return [Finding("order-unclear", True, words)]
    return [Finding("order-unclear", False, "every neighboring pair in the ranking differs by more than the noise")]
