"""Whether there are enough validation rows for what the run says to hold for others of their kind."""

from collections.abc import Sequence

from bilevel.account import Finding
from bilevel_llm.reweighting.trust import Trust

FEW_ROWS = 100  # a mean over fewer is off by more than a tenth of the spread between rows


def rows(trust: Trust) -> Sequence[Finding]:
    """Counts the rows of the smallest validation set. Says nothing where they are not known."""
    if trust.has_one_source or not trust.validation_rows:
        return []
    name, count = min(trust.validation_rows.items(), key=lambda entry: entry[1])
    if count >= FEW_ROWS:
        return []
    words = (
        f"few validation rows: {name!r} has {count}, and the weights may serve these more than others of their kind; at "
        f"least {FEW_ROWS} are safer"
    )
    return [Finding("few-rows", True, words)]
