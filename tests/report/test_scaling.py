"""The scaling law is found again from its own losses, and a gain is worth the parameters that give it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.errors import UserError
from nanodisp.report.scaling import LARGEST_LOG, Law, bounded, effective_interval, effective_parameters, fit, resampled

CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
N, D = (each.flatten() for each in np.meshgrid(np.geomspace(8e4, 2.5e6, 5), np.geomspace(1e6, 2e8, 4)))


def test_known_constants_are_found_again() -> None:
    law = fit(N, D, CHINCHILLA.loss(N, D))
    assert law == pytest.approx(CHINCHILLA, rel=0.05)
    np.testing.assert_allclose(law.loss(N, D), CHINCHILLA.loss(N, D), rtol=2e-4)


def test_one_run_that_went_wrong_moves_the_law_little() -> None:
    losses = CHINCHILLA.loss(N, D) * np.exp(np.random.default_rng(0).normal(0, 2e-4, len(N)))
    losses[7] *= 1.2
    np.testing.assert_allclose(fit(N, D, losses).loss(N, D), CHINCHILLA.loss(N, D), rtol=3e-3)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 4.0])
def test_a_loss_is_worth_the_parameters_that_give_it(factor: float) -> None:
    n, d = 3e5, 6e6
    loss = float(CHINCHILLA.loss(n * factor, d))
    assert effective_parameters(CHINCHILLA, n, d, loss) == pytest.approx(factor)


def test_a_loss_that_no_size_reaches_is_worth_infinitely_many() -> None:
    assert effective_parameters(CHINCHILLA, 3e5, 6e6, 1.0) == float("inf")
    assert effective_parameters(CHINCHILLA, 3e5, 6e6, 1e5) == 0.0


def test_runs_that_cannot_tell_the_terms_apart_are_refused() -> None:
    n = np.geomspace(8e4, 2.5e6, 6)
    with pytest.raises(UserError, match="add runs with another budget"):
        fit(n, 20 * n, CHINCHILLA.loss(n, 20 * n))
    with pytest.raises(UserError, match="as many different sizes and budgets"):
        fit(N[:4], D[:4], CHINCHILLA.loss(N[:4], D[:4]))


def test_a_term_that_only_the_smallest_runs_feel_has_finite_constants() -> None:
    losses = 2 + 300 * D**-0.35 + 0.3 * (N.min() == N)
    law = fit(N, D, losses)
    assert np.log(law.A) <= LARGEST_LOG + 1e-6, "else other runs make it infinite"
    np.testing.assert_allclose(law.loss(N, D), losses, rtol=1e-2)


@given(st.floats(-1e5, 1e5), st.floats(-100, 1000))
def test_constants_are_bounded_and_the_term_stays_where_it_is_felt_most(log_scale: float, exponent: float) -> None:
    x = np.log(N)
    scale, slope = bounded(log_scale, exponent, x)
    assert abs(scale) <= LARGEST_LOG
    felt = x.min() if log_scale > 0 else x.max()
    assert scale - slope * felt == pytest.approx(log_scale - exponent * felt, rel=1e-9, abs=1e-6)
    if abs(log_scale) <= LARGEST_LOG:
        assert (scale, slope) == (log_scale, exponent)


def test_an_interval_of_the_worth_holds_the_truth_and_shrinks_with_the_noise() -> None:
    random, widths = np.random.default_rng(0), []
    n, d = np.repeat(N, 3), np.repeat(D, 3)
    for noise in (2e-4, 2e-3):
        laws = resampled(CHINCHILLA, n, d, CHINCHILLA.loss(n, d) * np.exp(random.normal(0, noise, len(n))), times=40)
        losses = CHINCHILLA.loss(1.3 * 3e5, 6e6) * np.exp(random.normal(0, noise, 10))
        low, high = effective_interval(laws, 3e5, 6e6, losses)
        assert low < 1.3 < high
        widths.append(high - low)
    assert 3 < widths[1] / widths[0] < 30
