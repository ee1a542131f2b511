"""Whether the mix is in truth a single source."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust

NEARLY_ALL = 0.9  # of the weight


def one_source(trust: Trust) -> Sequence[Finding]:
    """Looks at the largest weight. Says nothing where there is no more than one source."""
    most = trust.ranked[0]
    if trust.has_one_source or trust.average[most] < NEARLY_ALL:
        return []
    words = (
        f"one source has nearly all the weight: {most!r} has {trust.average[most]:.1%}. That can be right, if it looks like "
        "the target; check that its rows are not those of the validation set, and keep the others in the mix, if you want "
        "them, by problem.floor or solver.pull"
    )
    return [Finding("one-source", not trust.is_clear(most, trust.ranked[1]), words)]
