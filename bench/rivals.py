"""Losses compared at the same dispersion: the runs of `experiment=rivals`, a line per formula.

    python -m bench.rivals out/rivals [--weight 0.1]

A formula's weight decides how far apart its tokens end, so losses at arbitrary weights say little. Two comparisons are
fair: each formula at its own best weight, and all at the final mean cosine of `angular` at the weight `--weight`. There
the loss is interpolated between the two neighbouring weights with cosines on either side; weight 0 is a point of every
formula. Cosines are the mean over layers after the embedding at the last validation. Everything is the mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nanodisp.dispersion.placement import DispersionConfig
from nanodisp.errors import UserError
from nanodisp.report.tables import NOTHING
from nanodisp.runs.read import LAMBDA, RunSummary, read_runs

HEAD = ("loss", "best validation loss", "at weight", "its mean cosine", "loss at cosine {:.3f}", "ms per step")
WITHOUT = "off"


class Point(NamedTuple):
    """The runs of one formula and weight: means over seeds."""

    weight: float
    loss: float
    cosine: float
    milliseconds: float


def curves(runs: Sequence[RunSummary]) -> dict[str, list[Point]]:
    """Formula -> a point per weight, rising, of the finished runs; the runs of weight 0 are in each and in "off"."""
    groups: dict[str, dict[float, list[RunSummary]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.status == "finished":
            weight = float(run.config[LAMBDA])
            groups[run.config["dispersion.variant"] if weight else WITHOUT][weight].append(run)
    without = groups.pop(WITHOUT, {})
    found = {name: [mean(weight, of[weight]) for weight in sorted(of)] for name, of in sorted(groups.items())}
    baseline = [mean(weight, of_weight) for weight, of_weight in without.items()]
    return ({WITHOUT: baseline} if baseline else {}) | {name: baseline + points for name, points in found.items()}


def mean(weight: float, runs: Sequence[RunSummary]) -> Point:
    return Point(
        weight,
        statistics.fmean(number(run, run.loss_name) for run in runs),
        statistics.fmean(statistics.fmean(run.layers["mean_cosine"][1:]) for run in runs),
        statistics.fmean(1e3 * tokens_per_step(run) / number(run, "tokens_per_second") for run in runs),
    )


def number(run: RunSummary, name: str) -> float:
    value = run.numbers.get(name)
    if value is None:
        raise UserError(f"{run.folder} has no {name}: it is too short; remove it or train it for more steps")
    return value


def tokens_per_step(run: RunSummary) -> int:
    return int(run.config["train.batch_size"]) * int(run.config["model.block_size"])


def loss_at(cosine: float, points: Sequence[Point]) -> float | None:
    """The loss where the curve, from the smallest weight on, first has this cosine; None if it never has."""
    for point, following in pairwise(points):
        if min(point.cosine, following.cosine) <= cosine <= max(point.cosine, following.cosine):
            if point.cosine == following.cosine:
                return min(point.loss, following.loss)
            share = (cosine - point.cosine) / (following.cosine - point.cosine)
            return point.loss + share * (following.loss - point.loss)
    return None


def table(runs: Sequence[RunSummary], weight: float) -> list[str]:
    """Lines of a Markdown table; UserError unless there are runs of `angular` at `weight`."""
    found = curves(runs)
    reference = [point.cosine for point in found.get("angular", []) if point.weight == weight]
    if not reference:
        raise UserError(f"there is no finished run with dispersion=angular {LAMBDA}={weight:g}: give another --weight")
    head = [each.format(reference[0]) for each in HEAD]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for name, points in found.items():
        own = [point for point in points if point.weight] or points
        best = min(own, key=lambda point: point.loss)
        same = loss_at(reference[0], points)
        cells = [name, f"{best.loss:.4f}", f"{best.weight:g}", f"{best.cosine:.3f}"]
        cells.append(NOTHING if same is None else f"{same:.4f}")
        cells.append(f"{statistics.median(point.milliseconds for point in own):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses compared at the same dispersion.")
    parser.add_argument("folder", type=Path, help="a folder of runs, such as out/rivals")
    parser.add_argument("--weight", type=float, default=DispersionConfig().lambda_disp, help="of angular")
    options = parser.parse_args()
    print(*table(read_runs(options.folder), options.weight), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
