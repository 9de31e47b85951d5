"""What lies behind the differences: losses of others at equal cosine, the start of training.

Lines of docs/study/results.md, from the records alone. All of it is exploratory, as docs/study/plan.md says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.rivals import REFERENCE, Entry, table
from bench.study.pairs import arm_and_seed, arms_of, baseline_of, difference, paired
from bench.study.plan import EARLY_STEPS, SIZES
from nanodisp.errors import UserError
from nanodisp.report.tables import NOTHING

RIVALS_SIZE, SEEDS = "77k", (1, 2, 3)  # of the comparison with other losses
REFERENCE_WEIGHT = 0.1
HIGH = 0.5  # mean cosine of the last layer: above it the tokens count as one cone
OTHER_HIGHS = (0.3, 0.7, 0.9)  # does the answer depend on that choice?
RESAMPLES = 2000

Record = dict[str, Any]


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


# --- the start of training -------------------------------------------------------------------


def time_in_cone(record: Record, high: float = HIGH) -> float:
    """The share of training in which the mean cosine of the last layer is above `high`.

    It is taken as straight between the steps at which it is known, 21 of most runs.
    """
    steps = np.array([each["step"] for each in record["condensation"]], float)
    last = np.array([each["mean_cosine"][-1] for each in record["condensation"]], float)
    low, top = np.minimum(last[1:], last[:-1]), np.maximum(last[1:], last[:-1])
    above = np.where(top > low, np.clip((top - high) / np.where(top > low, top - low, 1.0), 0.0, 1.0), top > high)
    return float(np.average(above, weights=np.diff(steps)))


def last_peak(record: Record) -> float:
    """The highest mean cosine of the last layer during training."""
    return max(each["mean_cosine"][-1] for each in record["condensation"])


def beginnings(records: Sequence[Record]) -> Iterator[str]:
    """Design (early): the cone of the start, and what lambda 0.1 changes after the same steps, by size and warm-up."""
    runs = [record for record in records if record["design"] == "early"]
    yield f"\n### The first {EARLY_STEPS} steps, cosine measured every 5\n"
    if not runs:
        yield "Not known yet: no run of them is finished."
        return
    yield (
        "Last layer, means over seeds: the highest mean cosine, the step at which it is reached, and the steps with a "
        f"mean cosine above {HIGH}; then what lambda 0.1 changes in these steps, in those above {OTHER_HIGHS[0]}, in "
        "the loss of step 100's batch, and in the validation loss.\n"
    )
    yield (
        f"| arm | warm-up | pairs | highest | with 0.1 | at step | with 0.1 | steps above {HIGH} | with 0.1 | change "
        f"| above {OTHER_HIGHS[0]} | step 100 | after 250 steps | after 500 |"
    )
    yield "| --- |" + " --- |" * 13
    cone = [arms_of(runs, of) for of in (last_peak, step_of_last_peak, steps_in_cone)]
    longer = arms_of(runs, partial(steps_in_cone, high=OTHER_HIGHS[0]))
    losses = [arms_of(runs, loss_at(*at)) for at in (("train", 100), ("val", EARLY_STEPS // 2), ("val", EARLY_STEPS))]
    warmup = {arm_and_seed(run)[0]: EARLY_STEPS * run["config"]["optim"]["warmup_fraction"] for run in runs}
    for arm in sorted(cone[0], key=lambda arm: ([*SIZES].index(arm.split("-")[1]), arm)):
        without = baseline_of(arm)
        if arm == without or not cone[0].get(without, {}).keys() & cone[0][arm].keys():
            continue
        means = [f"{statistics.fmean(of[each].values()):.3f}" for of in cone[:1] for each in (without, arm)]
        means += [f"{statistics.fmean(of[each].values()):.0f}" for of in cone[1:] for each in (without, arm)]
        changes = [paired(of[arm], of[without], 0.0) for of in (cone[-1], longer, *losses)]
        cells = [difference(each, 1 if i < 2 else 4) for i, each in enumerate(changes)]
        yield f"| {' | '.join([arm, f'{warmup[arm]:.0f}', str(changes[0].n), *means, *cells])} |"


def step_of_last_peak(record: Record) -> float:
    return float(max(record["condensation"], key=lambda each: each["mean_cosine"][-1])["step"])


def steps_in_cone(record: Record, high: float = HIGH) -> float:
    return time_in_cone(record, high) * float(record["condensation"][-1]["step"])


def loss_at(split: str, step: int) -> Callable[[Record], float]:
    return lambda record: float({each["step"]: each["loss"] for each in record[split]}[step])


def middle(record: Record) -> float:
    """The mean cosine of the layers between the embedding and the last one at the end."""
    return statistics.fmean(record["val"][-1]["mean_cosine"][1:-1])


def last(record: Record) -> float:
    return float(record["val"][-1]["mean_cosine"][-1])


MEASURES: dict[str, Callable[[Record], float]] = {
    **{
        f"share of training with the last layer's cosine above {high}": partial(time_in_cone, high=high)
        for high in sorted((HIGH, *OTHER_HIGHS))
    },
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
    """Does a value, such as the loss, go with condensation, between runs of one arm?"""
    plain = [r for r in records if r["design"] == "a" and r["condensation"] and value(r) is not None]
    smallest = [r for r in plain if r["name"].startswith(f"a-{RIVALS_SIZE}-")]
    subsets = {
        f"{RIVALS_SIZE}, lambda 0": [r for r in smallest if r["config"]["dispersion"]["lambda_disp"] == 0],
        f"{RIVALS_SIZE}, all lambdas": smallest,
        "all of design (a)": plain,
    }
    yield f"\n### {name} and condensation, partial correlations\n"
    if not plain:
        yield "Not known yet: it has not been measured."
        return
    yield (
        "Between it and a measure, runs of design (a), after the mean of each arm (size and lambda) is taken from both,"
        f" with the 95% interval of {RESAMPLES:,} resamplings of seeds within each size.\n"
    )
    yield f"| measure | {' | '.join(f'{subset} ({len(runs)} runs)' for subset, runs in subsets.items())} |"
    yield "| --- |" + " --- |" * len(subsets)
    for label, measure in MEASURES.items():
        cells = [correlation_with_interval(runs, measure, value) for runs in subsets.values()]
        yield f"| {label} | {' | '.join(cells)} |"


def correlation_with_interval(
    runs: Sequence[Record], measure: Callable[[Record], float], value: Callable[[Record], float | None]
) -> str:
    """Of the runs, which all have the value; a dash for fewer than three, and without variation."""
    if len(runs) < 3:
        return NOTHING
    arms, seeds = (np.array(of) for of in zip(*(arm_and_seed(run) for run in runs), strict=True))
    sizes = np.array([run["name"].split("-")[1] for run in runs])
    x, y = (np.array([of(run) for run in runs], float) for of in (measure, value))
    whole = partial_correlation(x, y, arms.tolist())
    if math.isnan(whole):
        return NOTHING
    random = np.random.default_rng(0)
    clusters = [
        [np.flatnonzero((sizes == n) & (seeds == s)) for s in np.unique(seeds[sizes == n])] for n in np.unique(sizes)
    ]
    drawn = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([of[i] for of in clusters for i in random.integers(0, len(of), len(of))])
        drawn.append(partial_correlation(x[chosen], y[chosen], arms[chosen].tolist()))
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"{whole:+.2f} [{low:+.2f}, {high:+.2f}]"
