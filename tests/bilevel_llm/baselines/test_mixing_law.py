"""The law of a swarm on losses that are known exactly, and the mixes that its runs train on."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from bilevel import Stratified
from bilevel.data import Stream
from bilevel_llm.baselines.mixed_batches import DrawnByWeight, InOrder
from bilevel_llm.baselines.mixing_law import Fit, MixingLaw, fitted, project
from bilevel_llm.baselines.swarm import law_finding

Array = NDArray[np.float64]


RIDGE = 1e-12


def known(sources: int = 3, runs: int = 20, seed: int = 0) -> tuple[MixingLaw, Array, Array]:
    """A law, mixes, and the losses that the law gives them."""
    draw = np.random.default_rng(seed)
    law = MixingLaw(0.3, draw.standard_normal(sources), -draw.random(sources), 0.1)
    mixes = draw.dirichlet(np.ones(sources), runs)
    return law, mixes, law.losses(mixes)


def test_nearly_without_a_penalty_exact_losses_give_the_law_itself() -> None:
    """Its predictions and curves: slopes are known only up to a constant, because weights sum to 1."""
    law, mixes, losses = known()
    found = MixingLaw.fit(mixes, losses, 0.1, RIDGE)
    others = np.random.default_rng(9).dirichlet(np.full(3, 0.5), 50)
    np.testing.assert_allclose(found.losses(others), law.losses(others), rtol=1e-6)
    np.testing.assert_allclose(found.curves, law.curves, rtol=1e-6)
    chosen, fit = fitted(mixes, losses, RIDGE)
    assert chosen.offset == 0.1
    assert fit.r2 == pytest.approx(1)


def test_the_fit_is_that_of_bounded_ridge_regression() -> None:
    """Against scipy's solution of the whole problem, where the bounds matter: losses that are bent the other way."""
    draw = np.random.default_rng(1)
    mixes = draw.dirichlet(np.ones(3), 20)
    logs = np.log(mixes + 0.1) @ np.array([0.3, -0.4, 0.1]) + 0.05 * draw.standard_normal(20)
    features = np.hstack([mixes, np.log(mixes + 0.1)])
    center, spread = features.mean(0), features.std(0)
    system = np.vstack([(features - center) / spread, np.sqrt(0.05 * 20) * np.eye(6)])
    bounds = (np.full(6, -np.inf), np.concatenate([np.full(3, np.inf), np.zeros(3)]))
    solved = lsq_linear(system, np.concatenate([logs - logs.mean(), np.zeros(6)]), bounds, tol=1e-14).x / spread
    found = MixingLaw.fit(mixes, np.exp(logs), 0.1, 0.05)
    assert (found.curves == 0).any()
    np.testing.assert_allclose([*found.slopes, *found.curves], solved, atol=1e-6)
    assert found.constant == pytest.approx(logs.mean() - center @ solved, abs=1e-6)


@pytest.mark.parametrize(("sources", "kept"), [(2, 0.95), (3, 0.95), (8, 0.65)])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_what_needs_several_sources_gets_them(sources: int, noise: float, kept: float) -> None:
    """Texts whose words come from a mix of sources, and models that know the mix that they were trained on.

    The default number of runs keeps 95% (of eight sources: 65%) of what the best mix gains over equal weights, with the
    worst of four seeds. A law of straight lines loses several times that gain.
    """
    for seed in range(4):
        draw = np.random.default_rng(seed)
        words = draw.dirichlet(np.full(60, 0.3), sources)
        best = (
            np.array([0.7, 0.3, 0, 0, 0, 0, 0, 0])[:sources]
            if sources < 8
            else np.array([0.35, 0.25, 0.2, 0.1, 0.1, 0, 0, 0])
        )

        def loss(mixes: Array, words: Array = words, best: Array = best) -> Array:
            return -np.log(0.9 * mixes @ words + 0.1 / 60) @ (best @ words)

        mixes = np.vstack([np.full(sources, 1 / sources), draw.dirichlet(np.full(sources, 2.0), 4 * sources + 7)])
        law, fit = fitted(mixes, loss(mixes) + noise * draw.standard_normal(len(mixes)), 0.001)
        found = law.best(mixes[0], np.zeros(sources), np.ones(sources))
        equal, reached, least = loss(np.vstack([mixes[0], found, best]))
        assert (equal - reached) / (equal - least) > kept
        assert not law_finding(fit).flagged


def test_leaving_one_out_is_fitting_without_it() -> None:
    _, mixes, losses = known()
    fit = Fit.leaving_one_out(mixes, losses, 0.3, 0.05)
    law = MixingLaw.fit(mixes[1:], losses[1:], 0.3, 0.05)
    assert fit.predicted[0] == law.losses(mixes[:1])[0]
    assert (fit.measured == losses).all()


def test_exact_losses_are_explained() -> None:
    _, mixes, losses = known()
    fit = Fit.leaving_one_out(mixes, losses, 0.1, RIDGE)
    assert fit.rank_correlation == pytest.approx(1)
    assert not law_finding(fit).flagged
    assert "R² = 1.00, rank correlation 1.00" in law_finding(fit).sentence


@pytest.mark.parametrize("sources", [2, 6])
def test_how_often_noise_passes_for_a_law(sources: int) -> None:
    """Losses that do not depend on the mix, with the default number of runs: none of 25 swarms may pass."""
    draw, runs = np.random.default_rng(sources), 4 * sources + 8
    for _ in range(25):
        mixes = draw.dirichlet(np.full(sources, 2.0), runs)
        finding = law_finding(fitted(mixes, np.exp(0.1 * draw.standard_normal(runs)), 0.001)[1])
        assert finding.flagged
        assert "do not use these weights" in finding.sentence


def test_measures_of_fit_are_those_of_their_definitions() -> None:
    fit = Fit(np.exp([1.0, 2.0, 4.0, 3.0]), np.exp([1.5, 2.0, 3.0, 3.5]))
    assert fit.r2 == pytest.approx(1 - (0.25 + 0 + 1 + 0.25) / 5)
    assert fit.rank_correlation == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 Σd² / n(n² - 1)
    assert Fit(np.ones(4), np.arange(1.0, 5)).rank_correlation == 0
    assert Fit(np.ones(4), np.arange(1.0, 5)).r2 == float("-inf")


def test_the_best_mix_of_two_needs_lies_between_them() -> None:
    """-s log(p + δ) - (1 - s) log(1 - p + δ) is smallest at p = s + δ (2 s - 1)."""
    s, δ = 0.7, 0.1
    law = MixingLaw(0.0, np.zeros(3), np.array([-s, s - 1, 0.0]), δ)
    free, start = np.array([0.0] * 3), np.full(3, 1 / 3)
    best = law.best(start, free, free + 1)
    first = s + δ * (2 * s - 1)
    np.testing.assert_allclose(best, [first, 1 - first, 0], atol=1e-6)
    np.testing.assert_allclose(law.best(np.array([0.0, 0.0, 1.0]), free, free + 1), best, atol=1e-6)


def test_the_best_mix_keeps_to_its_bounds_and_none_of_many_others_is_better() -> None:
    draw = np.random.default_rng(3)
    law, *_ = known(sources=4, seed=3)
    least, most = np.full(4, 0.05), np.array([0.4, 1.0, 0.3, 1.0])
    best = law.best(np.full(4, 0.25), least, most)
    assert best.sum() == pytest.approx(1)
    assert (best >= least - 1e-12).all()
    assert (best <= most + 1e-12).all()
    others = draw.dirichlet(np.ones(4), 20_000)
    others = others[((others >= least) & (others <= most)).all(1)]
    assert len(others) > 1000
    assert law.losses(best[None])[0] <= law.losses(others).min()


def test_the_projection_is_the_nearest_point() -> None:
    draw = np.random.default_rng(4)
    least, most = np.array([0.1, 0.0, 0.0]), np.array([1.0, 0.5, 0.3])
    others = draw.dirichlet(np.ones(3), 20_000)
    others = others[((others >= least) & (others <= most)).all(1)]
    for point in draw.standard_normal((20, 3)):
        found = project(point, least, most)
        assert found.sum() == pytest.approx(1)
        assert ((found >= least) & (found <= most)).all()
        assert ((found - point) ** 2).sum() <= ((others - point) ** 2).sum(1).min() + 1e-12


WEIGHTS = (0.62, 0.25, 0.03, 0.1, 0.0)


def test_every_batch_holds_the_whole_numbers_around_its_parts() -> None:
    sampler = DrawnByWeight((50, 50, 50, 50, 50), 16, Stream.LOWER, WEIGHTS)
    counts = np.array([sampler.counts(t) for t in range(60)])
    assert (counts.sum(1) == 16).all()
    parts = 16 * np.array(WEIGHTS)
    assert (counts >= np.floor(parts)).all()
    assert (counts <= np.ceil(parts)).all()
    for steps in (10, 40, 60):
        assert np.abs(counts[:steps].sum(0) - steps * parts).max() < 3  # independent draws deviate by √(16 * 40 / 4) = 13


def test_rows_of_a_source_come_in_the_order_of_every_other_mix() -> None:
    """So that runs see the same rows, only more or fewer of them."""
    one, other = (
        DrawnByWeight((40, 30), 10, Stream.LOWER, weights) for weights in ((0.5, 0.5), (0.9, 0.1))
    )  # fmt: skip
    plain = Stratified((40, 30), 10, Stream.LOWER)

    def order(sampler: Stratified, stratum: int, batches: int) -> list[int]:
        return [row for t in range(batches) for s, row in sampler.batch(t, 7) if s == stratum]

    assert order(one, 0, 8) == order(plain, 0, 8)
    assert order(other, 0, 4) == order(plain, 0, 8)[:36]
    assert sorted(order(one, 1, 6)) == list(range(30))
    assert [len(sampler.batch(3, 7)) for sampler in (one, other)] == [10, 10]


def test_a_pass_through_a_table_meets_every_row() -> None:
    in_order = InOrder((11,), 4, Stream.UPPER)
    rows = [[row for _, row in in_order.batch(i, 0)] for i in range(in_order.batches)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [7, 8, 9, 10]]
    assert in_order.counts(0).tolist() == [4]
