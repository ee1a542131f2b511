"""Whether there is anything by which the weights can be tested."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel.evidence import ENOUGH
from bilevel_llm.reweighting.trust import Trust


def evidence(trust: Trust) -> Sequence[Finding]:
    """Looks for rounds in which the weights were held. Says nothing where there are enough."""
    if trust.has_one_source:
        return []
    if not trust.of_rounds:
        words = (
            "not tested: the solver moved the weights while the model was still learning, so that they can have passed the "
            "best mix on their way to a corner, and nothing in its records would show it; solver.name=rounds finds weights "
            "that can be tested, and `bilevel compare` measures what any weights are worth"
        )
        return [Finding("not-tested", True, words)]
    done = len(trust.rounds)
    if done < ENOUGH:
        words = (
            f"too short to judge: {done} whole {'round' if done == 1 else 'rounds'} of {trust.horizon} steps, and {ENOUGH} "
            f"are the fewest that have a standard error"
        )
        return [Finding("too-short", True, words)]
    return []
