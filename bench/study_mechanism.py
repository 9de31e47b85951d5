"""What lies behind the differences: losses of others at equal cosine, the optimizer's share, the start of training.

Lines of docs/study/results.md, from the records alone. All of it is exploratory, as docs/study/plan.md says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.rivals import REFERENCE, Entry, table
from nanodisp.errors import UserError
from nanodisp.report.tables import NOTHING, paired_interval

RIVALS_SIZE, SEEDS = "77k", (1, 2, 3)  # of the comparison with other losses
REFERENCE_WEIGHT = 0.1
HIGH = 0.5  # mean cosine of the last layer: above it the tokens count as one cone
RESAMPLES = 2000

Record = dict[str, Any]


def arm_and_seed(record: Record) -> tuple[str, int]:
    arm, _, seed = record["name"].rpartition("-s")
    return arm, int(seed)


# --- losses of others ------------------------------------------------------------------------


def compared(records: Sequence[Record]) -> list[Entry]:
    """The runs of the comparison: those of other losses, and of `angular` with the same seeds and size."""
    found = []
    for record in records:
        seed = arm_and_seed(record)[1]
        plain = record["design"] == "a" and record["name"].startswith(f"a-{RIVALS_SIZE}-")
        if seed in SEEDS and (plain or record["design"] == "rivals"):
            of = record["config"]["dispersion"]
            cosine = statistics.fmean(record["val"][-1]["mean_cosine"][1:])
            found.append(Entry(of["variant"], of["lambda_disp"], seed, record["loss"], cosine))
    return found


def rivals(records: Sequence[Record]) -> Iterator[str]:
    """Each loss at its own best weight and at the mean cosine of angular at 0.1."""
    found = compared(records)
    yield f"\n### Losses of others, {RIVALS_SIZE}\n"
    try:
        if {entry.variant for entry in found} <= {REFERENCE}:
            raise UserError("no run of another loss is finished")
        lines = table(found, REFERENCE_WEIGHT)
    except UserError as error:
        yield f"Not known yet: {error}."
        return
    yield (
        f"Seeds {SEEDS[0]} to {SEEDS[-1]} as far as they are finished. Cosines are means over the layers after the "
        "embedding. At the cosine of `angular` at 0.1 a loss is interpolated between the two neighbouring weights, of "
        "which 0 may be one.\n"
    )
    yield from (line.rpartition(" | ")[0] + " |" for line in lines)  # speeds are not compared beside other work


# --- the optimizer ---------------------------------------------------------------------------


def interaction(records: Sequence[Record]) -> Iterator[str]:
    """AdamW x Muon x lambda: is the effect of dispersion another one with Muon?"""
    losses = {arm_and_seed(record): record["loss"] for record in records}
    cosines = {arm_and_seed(r): statistics.fmean(r["val"][-1]["mean_cosine"][1:]) for r in records}
    size = RIVALS_SIZE

    def of(values: dict[tuple[str, int], float], arm: str) -> dict[int, float]:
        return {seed: values[arm, seed] for seed in SEEDS if (arm, seed) in values}

    def effect(values: dict[tuple[str, int], float], arm: str) -> dict[int, float]:
        without, treated = (of(values, f"{arm}lam{lam}") for lam in ("0", "0.1"))
        return {seed: treated[seed] - without[seed] for seed in treated.keys() & without.keys()}

    yield f"\n### AdamW, Muon and lambda, {size}\n"
    arms = {"AdamW": f"a-{size}-", "Muon": f"e-{size}-muon-"}
    if not effect(losses, arms["Muon"]):
        yield "Not known yet: no pair with Muon is finished."
        return
    yield "| | AdamW, lambda 0 | AdamW, 0.1 | Muon, lambda 0 | Muon, 0.1 | interaction, 95% |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, values in (("validation loss", losses), ("mean cosine after the embedding", cosines)):
        cells = [
            f"{statistics.fmean(of(values, f'{arm}lam{lam}').values()):.4f}"
            for arm in arms.values()
            for lam in ("0", "0.1")
        ]
        gap, half = paired_interval(effect(values, arms["Muon"]), effect(values, arms["AdamW"]))
        interval = "" if math.isnan(half) else f" [{gap - half:+.4f}, {gap + half:+.4f}]"
        yield f"| {name} | {' | '.join(cells)} | {gap:+.4f}{interval} |"
    yield "\nInteraction: the effect of lambda 0.1 with Muon minus that with AdamW, paired by seed."


# --- the start of training -------------------------------------------------------------------


def time_in_cone(record: Record) -> float:
    """The share of training in which the mean cosine of the last layer is above `HIGH`, by the trapezoidal rule."""
    steps = np.array([each["step"] for each in record["condensation"]], float)
    last = np.array([each["mean_cosine"][-1] for each in record["condensation"]], float)
    fine = np.linspace(steps[0], steps[-1], 1000)
    return float((np.interp(fine, steps, last) > HIGH).mean())


def last_peak(record: Record) -> float:
    """The highest mean cosine of the last layer during training."""
    return max(each["mean_cosine"][-1] for each in record["condensation"])


def middle(record: Record) -> float:
    """The mean cosine of the layers between the embedding and the last one at the end."""
    return statistics.fmean(record["val"][-1]["mean_cosine"][1:-1])


def last(record: Record) -> float:
    return float(record["val"][-1]["mean_cosine"][-1])


MEASURES: dict[str, Callable[[Record], float]] = {
    f"share of training with the last layer's cosine above {HIGH}": time_in_cone,
    "highest cosine of the last layer": last_peak,
    "last layer's cosine at the end": last,
    "middle layers' cosine at the end": middle,
}


def partial_correlation(x: NDArray[np.float64], y: NDArray[np.float64], groups: Sequence[str]) -> float:
    """Pearson's correlation of x and y [R] after the mean of each group is taken from both; NaN without variation."""
    names, index = np.unique(groups, return_inverse=True)
    centre = lambda v: v - np.array([v[index == g].mean() for g in range(len(names))])[index]  # noqa: E731
    x, y = centre(x), centre(y)
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def correlations(records: Sequence[Record], name: str, value: Callable[[Record], float | None]) -> Iterator[str]:
    """Does a value, such as the loss, go with condensation, between runs of one size and budget?"""
    plain = [r for r in records if r["design"] == "a" and r["condensation"] and value(r) is not None]
    subsets = {
        "lambda 0 alone": [r for r in plain if r["config"]["dispersion"]["lambda_disp"] == 0],
        "lambda 0.03, 0.1 and 0.3": [r for r in plain if r["config"]["dispersion"]["lambda_disp"] > 0],
        "all of design (a)": plain,
    }
    yield f"\n### {name} and condensation, partial correlations\n"
    if not plain:
        yield "Not known yet: it has not been measured."
        return
    yield (
        "Between it and a measure, runs of design (a), after the mean of each size is taken from both"
        f" (each size has one budget), with the 95% interval of {RESAMPLES:,} resamplings of runs within each size.\n"
    )
    yield f"| measure | {' | '.join(f'{subset} ({len(runs)} runs)' for subset, runs in subsets.items())} |"
    yield "| --- |" + " --- |" * len(subsets)
    for label, measure in MEASURES.items():
        cells = [correlation_with_interval(runs, measure, value) for runs in subsets.values()]
        yield f"| {label} | {' | '.join(cells)} |"


def correlation_with_interval(
    runs: Sequence[Record], measure: Callable[[Record], float], value: Callable[[Record], float | None]
) -> str:
    """Of the runs, which all have the value; a dash for fewer than three."""
    if len(runs) < 3:
        return NOTHING
    groups = np.array([run["name"].split("-")[1] for run in runs])
    x, y = (np.array([of(run) for run in runs], float) for of in (measure, value))
    random = np.random.default_rng(0)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([random.choice(of, len(of)) for of in members])
        drawn.append(partial_correlation(x[chosen], y[chosen], groups[chosen].tolist()))
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"{partial_correlation(x, y, groups.tolist()):+.2f} [{low:+.2f}, {high:+.2f}]"
