"""Whether the mix is in truth a single source."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust

NEARLY_ALL = 0.9  # of the weight: what is left for the others together is as small as what one run differs from the next by


def one_source(trust: Trust) -> Sequence[Finding]:
    """Looks at the largest weight after the last step. Says nothing where there is no more than one source."""
    final = trust.history[-1].upper
    most = max(final, key=lambda name: final[name])
    if trust.has_one_source or final[most] < NEARLY_ALL:
        return []
    words = (
        f"one source has nearly all the weight: {most!r} has {final[most]:.1%}; check that its rows are not those of the "
        "validation set, and keep the others in the mix by problem.floor or problem.prior_strength"
    )
    return [Finding("one-source", True, words)]
