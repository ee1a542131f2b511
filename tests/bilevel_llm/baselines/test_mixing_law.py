"""The law of a swarm on losses that are known exactly, and the mixes that its runs train on."""

import numpy as np
import pytest
from numpy.typing import NDArray

from bilevel import Stratified
from bilevel.data import Stream
from bilevel_llm.baselines.mixed_batches import DrawnByWeight, InOrder
from bilevel_llm.baselines.mixing_law import Fit, MixingLaw, project
from bilevel_llm.baselines.swarm import law_finding

Array = NDArray[np.float64]


def known(parts: int = 5, sources: int = 3, runs: int = 20, seed: int = 0) -> tuple[MixingLaw, Array, Array]:
    """A law, mixes, and the losses that the law gives them."""
    draw = np.random.default_rng(seed)
    law = MixingLaw(
        draw.standard_normal(parts) * 0.3, draw.standard_normal((parts, sources)), draw.dirichlet(np.ones(parts))
    )
    mixes = draw.dirichlet(np.ones(sources), runs)
    return law, mixes, np.exp(law.constants + mixes @ law.slopes.T)


def test_without_a_penalty_exact_losses_give_the_law_itself() -> None:
    """Its predictions: slopes are known only up to a constant, because weights sum to 1."""
    law, mixes, losses = known()
    found = MixingLaw.fit(mixes, losses, law.shares, ridge=0.0)
    others = np.random.default_rng(9).dirichlet(np.full(3, 0.5), 50)
    np.testing.assert_allclose(found.losses(others), law.losses(others), rtol=1e-8)
    np.testing.assert_allclose(found.slopes.sum(1), 0, atol=1e-8)
    np.testing.assert_allclose(found.slopes[:, :2] - found.slopes[:, 2:], law.slopes[:, :2] - law.slopes[:, 2:], rtol=1e-8)


def test_the_penalty_is_that_of_ridge_regression() -> None:
    """Against the solution of the augmented least-squares problem."""
    law, mixes, losses = known()
    center = mixes.mean(0)
    λ = 0.3 * np.trace((mixes - center).T @ (mixes - center)) / 3
    rows = np.vstack([mixes - center, np.sqrt(λ) * np.eye(3)])
    logs = np.log(losses)
    slopes = np.linalg.lstsq(rows, np.vstack([logs - logs.mean(0), np.zeros((3, 5))]), rcond=None)[0].T
    found = MixingLaw.fit(mixes, losses, law.shares, ridge=0.3)
    np.testing.assert_allclose(found.slopes, slopes, rtol=1e-8)
    np.testing.assert_allclose(found.constants, logs.mean(0) - slopes @ center, rtol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_leaving_one_out_is_fitting_without_it(ridge: float) -> None:
    """Each law refitted without the run, with the same penalty on the same squares."""
    law, mixes, losses = known()
    losses = losses * np.exp(0.1 * np.random.default_rng(1).standard_normal(losses.shape))
    fit = Fit.leaving_one_out(mixes, losses, law.shares, ridge)
    λ = ridge * np.trace((mixes - mixes.mean(0)).T @ (mixes - mixes.mean(0))) / 3
    for run in range(len(mixes)):
        kept = np.arange(len(mixes)) != run
        others, logs = mixes[kept], np.log(losses[kept])
        center = others.mean(0)
        square = (others - center).T @ (others - center) + λ * np.eye(3)
        slopes = (np.linalg.pinv(square, rcond=1e-10) @ (others - center).T @ logs).T
        expected = np.exp(logs.mean(0) + slopes @ (mixes[run] - center)) @ law.shares
        assert fit.predicted[run] == pytest.approx(expected, rel=1e-8)
        assert fit.measured[run] == pytest.approx(losses[run] @ law.shares)


def test_exact_losses_are_explained_and_noise_is_not() -> None:
    law, mixes, losses = known()
    exact = Fit.leaving_one_out(mixes, losses, law.shares, 0.0)
    assert exact.r2 == pytest.approx(1)
    assert exact.rank_correlation == pytest.approx(1)
    assert not law_finding(exact).flagged
    assert "R² = 1.00, rank correlation 1.00" in law_finding(exact).sentence


@pytest.mark.parametrize("sources", [2, 4, 8])
def test_how_often_noise_passes_for_a_law(sources: int) -> None:
    """Losses that do not depend on the mix, with the default number of runs: none of 300 swarms may pass."""
    draw, runs = np.random.default_rng(sources), 4 * sources + 8
    for _ in range(300):
        mixes = draw.dirichlet(np.full(sources, 2.0), runs)
        losses = np.exp(0.1 * draw.standard_normal((runs, 1)) + 0.1 * draw.standard_normal((runs, 30)))
        finding = law_finding(Fit.leaving_one_out(mixes, losses, np.full(30, 1 / 30), 0.01))
        assert finding.flagged
        assert "do not use these weights" in finding.sentence


def test_measures_of_fit_are_those_of_their_definitions() -> None:
    fit = Fit(np.exp([1.0, 2.0, 4.0, 3.0]), np.exp([1.5, 2.0, 3.0, 3.5]))
    assert fit.r2 == pytest.approx(1 - (0.25 + 0 + 1 + 0.25) / 5)
    assert fit.rank_correlation == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 Σd² / n(n² - 1)
    assert Fit(np.ones(4), np.arange(4.0)).rank_correlation == 0
    assert Fit(np.ones(4), np.arange(4.0)).r2 == float("-inf")


def test_the_best_mix_of_two_needs_lies_between_them() -> None:
    """s exp(-b p) + (1 - s) exp(-b (1 - p)) is smallest at p = 1/2 + log(s / (1 - s)) / 2b."""
    b, s = 2.0, 0.7
    law = MixingLaw(np.zeros(2), np.array([[-b, 0.0, 0.0], [0.0, -b, 0.0]]), np.array([s, 1 - s]))
    free, start = np.array([0.0] * 3), np.full(3, 1 / 3)
    best = law.best(start, free, free + 1)
    first = 0.5 + np.log(s / (1 - s)) / (2 * b)
    np.testing.assert_allclose(best, [first, 1 - first, 0], atol=1e-6)
    np.testing.assert_allclose(law.best(np.array([0.0, 0.0, 1.0]), free, free + 1), best, atol=1e-6)


def test_the_best_mix_keeps_to_its_bounds_and_none_of_many_others_is_better() -> None:
    draw = np.random.default_rng(3)
    law, *_ = known(parts=20, sources=4, seed=3)
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
