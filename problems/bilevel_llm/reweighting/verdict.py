"""What to do with the weights of a run: use them, run longer, or do not use them."""

from __future__ import annotations

from collections.abc import Mapping

from bilevel.account import Finding, Verdict
from bilevel_llm.reweighting.trust import Trust

WANTED = 8  # rounds before an answer is good enough to use: the path to it takes about four
LONGEST = 4  # times as many rounds are the most that more evidence is asked for at once


def verdict(trust: Trust, tolerance: float) -> Verdict | None:
    """Decide from the findings. None where there is only one source.

    tolerance: the largest half-width of a weight's interval with which weights are used.
    """
    if trust.has_one_source:
        return None
    found = {finding.name: finding for finding in trust.findings}
    for name in ("not-tested", "nothing-learned", "validation-risen", "gap-open"):
        if _flagged(found, name):
            return Verdict("do not use", found[name].sentence)
    done = len(trust.rounds)
    if trust.judged is None:
        return Verdict("run longer", found["too-short"].sentence, WANTED * trust.horizon)
    if done < WANTED:
        return Verdict("run longer", f"{done} rounds are few; {WANTED} are usually enough", WANTED * trust.horizon)
    if _flagged(found, "still-moving"):
        return Verdict("run longer", found["still-moving"].sentence, -(-3 * done // 2) * trust.horizon)
    if _flagged(found, "no-order"):
        if done < LONGEST * WANTED:
            return Verdict("run longer", found["no-order"].sentence, 2 * done * trust.horizon)
        remedy = "more rows, or a longer solver.horizon, may tell them apart"
        return Verdict("do not use", f"{found['no-order'].sentence}; {remedy}")
    widest, half = max(
        ((name, (high - low) / 2) for name, (low, high) in trust.intervals.items()), key=lambda entry: entry[1]
    )
    if half > tolerance:
        rounds = min(round(done * (half / tolerance) ** 2) + 1, LONGEST * done)
        reason = f"the weight of {widest!r} is known to ±{half:.2f} only, and problem.tolerance is {tolerance:g}"
        return Verdict("run longer", reason, rounds * trust.horizon)
    reason = f"they are the best mix for {trust.horizon} steps of training from this model, to within ±{half:.2f}"
    return Verdict("use", reason)


def _flagged(found: Mapping[str, Finding], name: str) -> bool:
    return name in found and found[name].flagged
