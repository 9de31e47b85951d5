"""Losses compared at the same dispersion: the runs of `experiment=rivals`, a line per formula.

    python -m bench.rivals out/rivals [--weight 0.1]

A formula's weight decides how far apart its tokens end, so losses at arbitrary weights say little. Two comparisons are
fair: each formula at its own best weight, and all at the final mean cosine of `angular` at the weight `--weight`. There
the loss is interpolated between the two neighbouring weights with cosines on either side; weight 0 is a point of every
formula. Cosines are the mean over layers after the embedding at the last validation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nanodisp.dispersion.placement import DispersionConfig
from nanodisp.errors import UserError
from nanodisp.report.tables import NOTHING, paired_interval
from nanodisp.runs.read import LAMBDA, RunSummary, read_runs

WITHOUT, REFERENCE = "off", "angular"


class Entry(NamedTuple):
    """A finished run. cosine: the mean over the layers after the embedding. milliseconds: per step, NaN if unknown."""

    variant: str
    weight: float
    seed: int
    loss: float
    cosine: float
    milliseconds: float = math.nan


class Point(NamedTuple):
    """The runs of one formula and weight: means over seeds."""

    weight: float
    loss: float
    cosine: float
    milliseconds: float


def entries(runs: Sequence[RunSummary]) -> list[Entry]:
    """Of the finished runs; UserError for one that is too short to have all numbers."""
    found = []
    for run in runs:
        if run.status == "finished":
            tokens = int(run.config["train.batch_size"]) * int(run.config["model.block_size"])
            found.append(
                Entry(
                    run.config["dispersion.variant"],
                    float(run.config[LAMBDA]),
                    int(run.config["seed"]),
                    number(run, run.loss_name),
                    statistics.fmean(run.layers["mean_cosine"][1:]),
                    1e3 * tokens / number(run, "tokens_per_second"),
                )
            )
    return found


def number(run: RunSummary, name: str) -> float:
    value = run.numbers.get(name)
    if value is None:
        raise UserError(f"{run.folder} has no {name}: it is too short; remove it or train it for more steps")
    return value


def curves(found: Iterable[Entry]) -> dict[str, list[Point]]:
    """Formula -> a point per weight, rising; the runs of weight 0 are in each and in "off"."""
    groups: dict[str, dict[float, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in found:
        groups[entry.variant if entry.weight else WITHOUT][entry.weight].append(entry)
    without = [mean(of) for of in groups.pop(WITHOUT, {}).values()]
    with_loss = {name: [mean(of[weight]) for weight in sorted(of)] for name, of in sorted(groups.items())}
    return ({WITHOUT: without} if without else {}) | {name: without + points for name, points in with_loss.items()}


def mean(of: Sequence[Entry]) -> Point:
    return Point(of[0].weight, *(statistics.fmean(values) for values in zip(*(entry[3:] for entry in of), strict=True)))


def loss_at(cosine: float, points: Sequence[Point]) -> float | None:
    """The loss where the curve, from the smallest weight on, first has this cosine; None if it never has."""
    for point, following in pairwise(points):
        if min(point.cosine, following.cosine) <= cosine <= max(point.cosine, following.cosine):
            if point.cosine == following.cosine:
                return min(point.loss, following.loss)
            share = (cosine - point.cosine) / (following.cosine - point.cosine)
            return point.loss + share * (following.loss - point.loss)
    return None


def table(found: Sequence[Entry], weight: float) -> list[str]:
    """Lines of a Markdown table; UserError unless there are runs of `angular` at `weight`.

    Differences are to `angular`: to its best weight, and to the weight whose cosine is compared; paired by seed, with
    the 95% interval of a paired t test.
    """
    all_seeds = curves(found)
    cosines = [point.cosine for point in all_seeds.get(REFERENCE, []) if point.weight == weight]
    if not cosines:
        raise UserError(f"there is no finished run with dispersion=angular {LAMBDA}={weight:g}: give another --weight")
    seeds = sorted({entry.seed for entry in found})
    of_seed = {seed: curves(entry for entry in found if entry.seed == seed) for seed in seeds}

    def at_weight(name: str, wanted: float) -> dict[int, float]:
        """Seed -> loss."""
        points = {seed: [p.loss for p in of.get(name, ()) if p.weight == wanted] for seed, of in of_seed.items()}
        return {seed: losses[0] for seed, losses in points.items() if losses}

    def at_cosine(name: str) -> dict[int, float]:
        losses = {seed: loss_at(cosines[0], of.get(name, ())) for seed, of in of_seed.items()}
        return {seed: loss for seed, loss in losses.items() if loss is not None}

    best = {name: min(own(points), key=lambda point: point.loss) for name, points in all_seeds.items()}
    reference = at_weight(REFERENCE, best[REFERENCE].weight)
    heads = ["loss", "best validation loss", "at weight", "its mean cosine", "difference to angular's best"]
    heads += [f"loss at cosine {cosines[0]:.3f}", "difference to angular's", "ms per step"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for name, points in all_seeds.items():
        same, milliseconds = loss_at(cosines[0], points), [point.milliseconds for point in own(points)]
        cells = [name, f"{best[name].loss:.4f}", f"{best[name].weight:g}", f"{best[name].cosine:.3f}"]
        cells.append(difference(at_weight(name, best[name].weight), reference))
        cells.append(NOTHING if same is None else f"{same:.4f}")
        cells.append(difference(at_cosine(name), at_weight(REFERENCE, weight)))
        cells.append(NOTHING if math.isnan(milliseconds[0]) else f"{statistics.median(milliseconds):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def own(points: Sequence[Point]) -> Sequence[Point]:
    """The points of a formula without that at weight 0, which all share."""
    return [point for point in points if point.weight] or points


def difference(losses: dict[int, float], baseline: dict[int, float]) -> str:
    gap, half = paired_interval(losses, baseline)
    if math.isnan(gap):
        return NOTHING
    return f"{gap:+.4f}" + ("" if math.isnan(half) else f" [{gap - half:+.4f}, {gap + half:+.4f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses compared at the same dispersion.")
    parser.add_argument("folder", type=Path, help="a folder of runs, such as out/rivals")
    parser.add_argument("--weight", type=float, default=DispersionConfig().lambda_disp, help="of angular")
    options = parser.parse_args()
    print(*table(entries(read_runs(options.folder)), options.weight), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
