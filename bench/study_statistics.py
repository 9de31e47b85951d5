"""The statistics of the study, as docs/study/plan.md says under "Statistics"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST = 3  # pairs of a test
ALPHA, POWER = 0.05, 0.8
RESAMPLES = 2000  # of pairs, for the slope
WITHOUT_LAMBDA = ("c", "tuned", "rivals", "strong")  # designs whose baseline is lambda 0 of design (a)
SETTINGS = ("e", "f", "h", "s", "repeat")  # designs whose own lambda 0 is compared with that of design (a)

Arms = dict[str, dict[int, float]]  # arm -> seed -> value


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, arm minus baseline.

    half: half the width of their 95% t interval. p: of the two-sided paired t test. equivalent: the larger p of two
    one-sided t tests that the mean lies within +-margin. All NaN below `FEWEST` pairs.
    """

    n: int
    mean: float
    deviation: float
    half: float
    p: float
    equivalent: float


def paired(values: dict[int, float], baseline: dict[int, float], margin: float) -> Paired:
    """Compare the seeds that both have."""
    gaps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    n = len(gaps)
    if n < FEWEST:
        return Paired(n, statistics.fmean(gaps) if gaps else math.nan, *[math.nan] * 4)
    mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps)
    error = deviation / math.sqrt(n)
    test = lambda of: math.copysign(math.inf, of) if error == 0 else of / error  # noqa: E731
    of_t = stats.t(n - 1)
    outside = max(of_t.sf(test(mean + margin)), of_t.cdf(test(mean - margin)))
    return Paired(n, mean, deviation, of_t.ppf(0.975) * error, 2 * of_t.sf(abs(test(mean))), float(outside))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of one family: Holm (1979). NaN where there was no test, which is not counted."""
    tested = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * value))
        adjusted[i] = largest
    return adjusted


def pairs_needed(effect: float, deviation: float) -> int:
    """Pairs that show a mean difference of `effect` with 80% power at 5%, two-sided: noncentral t distribution."""
    for n in range(FEWEST, 100_000):
        critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
        shift = abs(effect) / deviation * math.sqrt(n)
        if stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift) >= POWER:
            return n
    raise ValueError(f"an effect of {effect} is too small beside a deviation of {deviation}")


def slope_on_size(gaps: Mapping[float, Sequence[float]]) -> tuple[float, float, float]:
    """How much a difference changes with each doubling of the parameters, and its 95% interval.

    gaps: non-embedding parameters -> differences of pairs. Sizes with fewer than `FEWEST` pairs are left out. Least
    squares on log2 of the parameters, each pair weighted by the inverse of its size's variance; pairs are drawn again
    within each size for the interval, with the weights of the original ones. NaN with fewer than two sizes.
    """
    sizes = [n for n in gaps if len(gaps[n]) >= FEWEST]
    if len(sizes) < 2:
        return math.nan, math.nan, math.nan
    x = np.log2(np.array(sizes, float))
    values = [np.array(gaps[n], float) for n in sizes]
    weights = np.array([len(of) / of.var(ddof=1) for of in values])
    centre = (weights * x).sum() / weights.sum()

    def slope(means: Sequence[float]) -> float:
        shifted = weights * (x - centre)
        return float((shifted * np.array(means)).sum() / (shifted * (x - centre)).sum())

    random = np.random.default_rng(0)
    drawn = [slope([random.choice(of, len(of)).mean() for of in values]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (ALPHA / 2, 1 - ALPHA / 2))
    return slope([of.mean() for of in values]), float(low), float(high)


def baseline_of(arm: str) -> str:
    """The arm that an arm is compared with; itself for lambda 0 of a design that is compared with no other.

    With dispersion, the arm at lambda 0 with everything else alike: "f-150k-dropout-lam0.1" -> "f-150k-dropout-lam0".
    That, in turn, with lambda 0 of design (a): what does dropout do without dispersion?
    """
    design, size, *_ = arm.split("-")
    plain, without = f"a-{size}-lam0", f"{arm.rpartition('-')[0]}-lam0"
    return plain if design in WITHOUT_LAMBDA or (arm == without and design in SETTINGS) else without
