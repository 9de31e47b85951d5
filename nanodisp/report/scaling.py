"""Loss as a law of parameters and tokens, and how many parameters a change of the loss is worth.

    L(N, D) = E + A / N^alpha + B / D^beta

is fitted as by Hoffmann et al., arXiv 2203.15556, section 3.3: Huber loss of log L, from many starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, least_squares
from scipy.special import logsumexp, softmax

from nanodisp.errors import UserError

HUBER = 1e-3  # of log L: larger residuals count linearly
# of log A and log B, alpha and beta, and log E: fits begin at all combinations
STARTS: tuple[Sequence[float], ...] = ((0.0, 5.0, 10.0), (0.2, 0.5, 1.0), (0.0, 0.7))
LARGEST_LOG = 300.0  # of |log A| and |log B|: a term that only the smallest or largest runs feel has no finite best A
WIDEST = 1e6  # a factor of parameters within which an equal loss is searched


class Law(NamedTuple):
    """E, A, B: nats per token, at N = 1 or D = 1. alpha, beta: exponents."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> NDArray[np.float64]:
        """Nats per token at N parameters and D tokens."""
        return self.E + self.A * np.asarray(n, float) ** -self.alpha + self.B * np.asarray(d, float) ** -self.beta


def fit(n: ArrayLike, d: ArrayLike, loss: ArrayLike, start: Law | None = None) -> Law:
    """The law of runs with n parameters, d tokens and a final loss in nats per token, each [R].

    From many starts, or only from `start` where a law nearby is known.

    Raises UserError with fewer different (n, d) than the law has constants, or if n or d never changes by itself: then
    the two terms cannot be told apart.
    """
    n, d, loss = (np.asarray(each, float) for each in (n, d, loss))
    if len(set(zip(n.tolist(), d.tolist(), strict=True))) < len(Law._fields):
        raise UserError(f"a law of {len(Law._fields)} constants needs as many different sizes and budgets")
    if np.linalg.matrix_rank(np.stack([np.ones_like(n), np.log(n), np.log(d)], axis=1), tol=1e-6) < 3:
        raise UserError("tokens are a fixed multiple of parameters in all runs: add runs with another budget")
    x, y, log_loss = np.log(n), np.log(d), np.log(loss)

    def terms(theta: np.ndarray) -> np.ndarray:
        a, b, e, alpha, beta = theta
        return np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])  # logs of the three terms, [3, R]

    def residuals(theta: np.ndarray) -> np.ndarray:
        return logsumexp(terms(theta), axis=0) - log_loss

    def jacobian(theta: np.ndarray) -> np.ndarray:
        of_n, of_d, of_e = softmax(terms(theta), axis=0)
        return np.stack([of_n, of_d, of_e, -x * of_n, -y * of_d], axis=1)

    def best_from(theta: ArrayLike, evaluations: int) -> tuple[float, np.ndarray]:
        exact = {"ftol": 1e-15, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": evaluations}  # the valley is narrow
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # inside scipy, of steps that it rejects
            found = least_squares(residuals, theta, jacobian, loss="huber", f_scale=HUBER, x_scale="jac", **exact)
        return float(found.cost), found.x

    starts = [(a, b, e, alpha, alpha) for a, b, alpha, e in itertools.product(STARTS[0], STARTS[0], *STARTS[1:])]
    if start is not None:
        of = start.alpha, start.beta  # and a start with a larger E, since near 0 it has no gradient
        starts = [(*np.log([start.A, start.B, e]), *of) for e in (start.E, max(start.E, 0.5 * loss.min()))]
    _, near = min((best_from(start, 100) for start in starts), key=lambda found: found[0])
    _, (a, b, e, alpha, beta) = best_from(near, 3000)
    (a, alpha), (b, beta) = bounded(a, alpha, x), bounded(b, beta, y)
    return Law(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), float(alpha), float(beta))


def bounded(log_scale: float, exponent: float, x: NDArray[np.float64]) -> tuple[float, float]:
    """A term with a log scale within +-`LARGEST_LOG`, and the same value at the run that feels it most.

    x: logs of the parameters or tokens, [R].
    """
    excess = log_scale - float(np.clip(log_scale, -LARGEST_LOG, LARGEST_LOG))
    return log_scale - excess, exponent - excess / float(x.min() if excess > 0 else x.max())


def effective_parameters(baseline: Law, n: float, d: float, loss: float) -> float:
    """How many times as many parameters a run of the baseline's law needs, on d tokens, to have this loss.

    1 where `loss` is the baseline's own at n; infinite where no size reaches it.
    """

    def gap(log_factor: float) -> float:
        return float(baseline.loss(n * np.exp(log_factor), d)) - loss

    edge = np.log(WIDEST)
    if gap(edge) > 0:
        return float("inf")
    if gap(-edge) < 0:
        return 0.0
    return float(np.exp(brentq(gap, -edge, edge)))


def resampled(law: Law, n: ArrayLike, d: ArrayLike, loss: ArrayLike, times: int) -> list[Law]:
    """The laws of runs drawn again with replacement within each (n, d): a bootstrap of their `law`."""
    random = np.random.default_rng(0)
    n, d, loss = (np.asarray(each, float) for each in (n, d, loss))
    _, kind = np.unique(np.stack([n, d]), axis=1, return_inverse=True)
    members = [np.flatnonzero(kind.ravel() == each) for each in range(kind.max() + 1)]
    laws = []
    for _ in range(times):
        drawn = np.concatenate([random.choice(of, len(of)) for of in members])
        laws.append(fit(n[drawn], d[drawn], loss[drawn], law))
    return laws


def effective_interval(laws: Sequence[Law], n: float, d: float, loss: ArrayLike) -> tuple[float, float]:
    """The 95% interval of `effective_parameters` of runs with these losses [R], all with n parameters and d tokens.

    laws: of `resampled` runs without the change; for each, the losses are drawn again, too.
    """
    random = np.random.default_rng(0)
    loss = np.asarray(loss, float)
    means = (float(random.choice(loss, len(loss)).mean()) for _ in laws)
    factors = [effective_parameters(law, n, d, mean) for law, mean in zip(laws, means, strict=True)]
    low, high = np.quantile(factors, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)
