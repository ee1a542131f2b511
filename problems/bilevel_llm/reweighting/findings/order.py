"""Whether the order of the sources can be told from the noise of the draws and of the rows."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust


def order(trust: Trust) -> Sequence[Finding]:
    """Compares neighbors in the ranking, and the first with the last; see `bilevel.evidence.Evidence.t_value`."""
    if trust.judged is None:
        return []
    if not trust.judged.ordered:
        words = (
            "no order: this run cannot tell even the heaviest source from the lightest, given the noise of draws and rows; "
            "whether equal weights would do as well, `bilevel compare` can tell"
        )
        return [Finding("no-order", True, words)]
    unclear = _chains([(upper, lower) for upper, lower, clear in trust.neighbors if not clear])
    if unclear:
        each = " each and the next of" if any(len(chain) > 2 for chain in unclear) else ""
        listed = "; ".join(f"{', '.join(chain[:-1])} and {chain[-1]}" for chain in unclear)
        return [Finding("order-unclear", False, f"do not read an order into {listed}:{each} these are within the noise")]
    words = "every neighboring pair in the ranking differs by more than the noise of draws and rows"
    return [Finding("order-unclear", False, words, passed=True)]


def _chains(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Pairs of which the second of one is the first of the next, as one list, so that each name is said once."""
    chains: list[list[str]] = []
    for upper, lower in pairs:
        if chains and chains[-1][-1] == upper:
            chains[-1].append(lower)
        else:
            chains.append([upper, lower])
    return chains
