"""The statistics of the study, as docs/study/plan.md says under "Statistics": arms, pairs, tests, and these as text."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from nanodisp.report.tables import NOTHING

FEWEST = 3  # pairs of a test
ALPHA, POWER = 0.05, 0.8
RESAMPLES = 2000  # of pairs, for slopes
WITHOUT_LAMBDA = ("c", "tuned", "rivals", "strong")  # designs whose baseline is lambda 0 of design (a)
SETTINGS = ("e", "f", "h", "s", "repeat")  # designs whose own lambda 0 is compared with that of design (a)

Arms = dict[str, dict[int, float]]  # arm -> seed -> value


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, arm minus baseline.

    half: half the width of their 95% t interval. p: of the two-sided paired t test. equivalent: the larger p of two
    one-sided t tests that the mean lies within +-margin. These and the deviation are NaN below `FEWEST` pairs.
    """

    n: int
    mean: float
    median: float
    deviation: float
    half: float
    p: float
    equivalent: float


def arm_and_seed(record: dict[str, Any]) -> tuple[str, int]:
    arm, _, seed = record["name"].rpartition("-s")
    return arm, int(seed)


def arms_of(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> Arms:
    """Of the runs that have a value."""
    arms: Arms = defaultdict(dict)
    for record in records:
        arm, seed = arm_and_seed(record)
        if (found := value(record)) is not None:
            arms[arm][seed] = found
    return dict(arms)


def gaps_of(values: dict[int, float], baseline: dict[int, float]) -> dict[int, float]:
    """Seed -> difference, of the seeds that both have."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}


def paired(values: dict[int, float], baseline: dict[int, float], margin: float) -> Paired:
    """Compare the seeds that both have."""
    gaps = [*gaps_of(values, baseline).values()]
    n = len(gaps)
    mean, median = (statistics.fmean(gaps), statistics.median(gaps)) if gaps else (math.nan, math.nan)
    if n < FEWEST:
        return Paired(n, mean, median, *[math.nan] * 4)
    deviation = statistics.stdev(gaps)
    error = deviation / math.sqrt(n)
    test = lambda of: of / error if error else math.copysign(math.inf, of) if of else 0.0  # noqa: E731
    of_t = stats.t(n - 1)
    outside = max(of_t.sf(test(mean + margin)), of_t.cdf(test(mean - margin)))
    return Paired(n, mean, median, deviation, of_t.ppf(0.975) * error, 2 * of_t.sf(abs(test(mean))), float(outside))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of one family: Holm (1979). NaN where there was no test, which is not counted."""
    tested = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * value))
        adjusted[i] = largest
    return adjusted


def power(pairs: int, shift: float) -> float:
    """The chance of p < 0.05 in a two-sided paired t test if the mean is `shift` deviations: noncentral t."""
    critical, scaled = stats.t.ppf(1 - ALPHA / 2, pairs - 1), shift * math.sqrt(pairs)
    wrong_side = np.nan_to_num(stats.nct.cdf(-critical, pairs - 1, scaled))  # NaN where it underflows
    return float(stats.nct.sf(critical, pairs - 1, scaled) + wrong_side)


def pairs_needed(effect: float, deviation: float) -> int:
    """Pairs that show a mean difference of `effect` with 80% power."""
    for n in range(FEWEST, 100_000):
        if power(n, abs(effect) / deviation) >= POWER:
            return n
    raise ValueError(f"an effect of {effect} is too small beside a deviation of {deviation}")


def detectable(pairs: int, deviation: float) -> float:
    """The mean difference that so many pairs show with 80% power."""
    return deviation * float(brentq(lambda shift: power(pairs, shift) - POWER, 0.0, 12 / math.sqrt(pairs)))


def slopes(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> list[tuple[float, float, float]]:
    """How differences depend on each predictor: slope, and its 95% interval.

    groups: (predictors [P], differences of pairs). Those with fewer than `FEWEST` pairs are left out. Least squares,
    each pair weighted by the inverse of its group's variance; for the interval pairs are drawn again within each group,
    with the weights of the original ones. Empty where the groups do not determine the slopes.
    """
    kept = [(x, np.array(gaps, float)) for x, gaps in groups if len(gaps) >= FEWEST]
    design = np.array([[1.0, *x] for x, _ in kept])
    if not kept or np.linalg.matrix_rank(design) < design.shape[1]:
        return []
    root = np.sqrt([len(gaps) / gaps.var(ddof=1) for _, gaps in kept])
    solve = np.linalg.pinv(design * root[:, None]) * root
    random = np.random.default_rng(0)
    drawn = [solve @ [random.choice(gaps, len(gaps)).mean() for _, gaps in kept] for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (ALPHA / 2, 1 - ALPHA / 2), axis=0)
    middle = solve @ [gaps.mean() for _, gaps in kept]
    return [(float(a), float(b), float(c)) for a, b, c in zip(middle, low, high, strict=True)][1:]


def baseline_of(arm: str) -> str:
    """The arm that an arm is compared with; itself for lambda 0 of a design that is compared with no other.

    With dispersion, the arm at lambda 0 with everything else alike: "f-150k-dropout-lam0.1" -> "f-150k-dropout-lam0".
    That, in turn, with lambda 0 of design (a): what does dropout do without dispersion?
    """
    design, size, *_ = arm.split("-")
    plain, without = f"a-{size}-lam0", f"{arm.rpartition('-')[0]}-lam0"
    return plain if design in WITHOUT_LAMBDA or (arm == without and design in SETTINGS) else without


# --- as text ---------------------------------------------------------------------------------


def difference(of: Paired, digits: int) -> str:
    interval = "" if math.isnan(of.half) else f" [{of.mean - of.half:+.{digits}f}, {of.mean + of.half:+.{digits}f}]"
    return f"{of.mean:+.{digits}f}{interval}"


def number(value: float, digits: int) -> str:
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}"


def probability(p: float) -> str:
    return NOTHING if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"
