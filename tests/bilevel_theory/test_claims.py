"""The claims themselves: the short form in every test run, the full one with the slow tests."""

import pytest

from bilevel.testing.session import plugins
from bilevel.verify.run import measure

NAMES = list(plugins().parts["checks"])


@pytest.mark.parametrize("name", NAMES)
def test_the_claim_holds_in_its_short_form(name: str) -> None:
    outcome = measure(name, quick=True)
    assert outcome.verdict == "holds", outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_claim_holds(name: str) -> None:
    outcome = measure(name, quick=False)
    assert outcome.verdict == "holds", outcome
