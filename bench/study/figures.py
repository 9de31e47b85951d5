"""The figures of docs/study/index.md and findings.md, drawn from the records alone: `make study-report` writes them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rivals import Entry, curves
from bench.study.pairs import Arms, Paired, arm_and_seed, arms_of, baseline_of, gaps_of, paired
from bench.study.plan import EARLY_STEPS, SIZES
from bench.study.tokens import CONTEXTS, of_group
from nanodisp.condensation.figures import MARKERS, STYLE

Record = dict[str, Any]

CROSSED = ("77k", "77k-warm328", "671k-warm38", "671k")  # of (early): sizes and warm-ups
LONG = 1000  # steps
WITHOUT, WITH = "#440154", "#21918c"  # lambda 0, lambda 0.1: dark and middle of viridis


def draw(records: Sequence[Record], losses: Arms, blimp: Arms, found: Sequence[Entry]) -> dict[str, Figure]:
    """File name -> figure. found: the runs of the comparison with other losses."""
    with matplotlib.rc_context(STYLE):
        drawn = {
            "steps": steps(records, losses),
            "differences": differences(losses, blimp),
            "start": start(records),
            "rivals": rivals(found),
            "context": context(records),
        }
        if kept := [r for r in records if r["design"] == "a" and len(r.get("context_over_steps", ())) > 1]:
            drawn["copying"] = copying(kept)
        return drawn


def differences(losses: Arms, blimp: Arms) -> Figure:
    """Paired differences to lambda 0 with 95% intervals, every pair a dot: the loss, and BLiMP beside it.

    At 20 tokens per parameter, design (a), then at other budgets, (b).
    """
    figure = Figure(figsize=(7.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    sizes = [size for size in SIZES if f"a-{size}-lam0.1" in losses]
    arms = [f"a-{size}-lam{lam}" for size in sizes for lam in ("0.03", "0.1", "0.3")]
    arms += [f"b-{size}-{budget}x-lam0.1" for budget in (5, 80) for size in sizes]
    arms = [arm for arm in arms if arm in losses]
    for ax, values, unit, scale in (
        (left, losses, "loss, nats per token", 1.0),
        (right, blimp, "BLiMP, points", 100.0),
    ):
        ax.axvline(0, color="0.6", linewidth=0.8)
        for place, arm in enumerate(arms):
            baseline = values.get(baseline_of(arm), {})
            of = paired(values.get(arm, {}), baseline, margin=0.0)
            seeds = values.get(arm, {}).keys() & baseline.keys()
            dots = [scale * (values[arm][seed] - baseline[seed]) for seed in sorted(seeds)]
            interval(ax, place, of, dots, scale)
        ax.set_xlabel(f"difference to lambda 0:\n{unit}")
        ax.grid(False, axis="y")
    counts = [len(losses[arm].keys() & losses.get(baseline_of(arm), {}).keys()) for arm in arms]
    left.set_yticks(range(len(arms)), [f"{label(arm)} ({n} pairs)" for arm, n in zip(arms, counts, strict=True)])
    left.invert_yaxis()
    return figure


def label(arm: str) -> str:
    """ "a-77k-lam0.1" -> "77k, lambda 0.1"; "b-77k-5x-lam0.1" -> "77k, lambda 0.1, 5 tokens/parameter"."""
    _, size, *budget, lam = arm.split("-")
    tokens = f", {budget[0].removesuffix('x')} tokens/parameter" if budget else ""
    return f"{size}, lambda {lam.removeprefix('lam')}{tokens}"


def interval(ax: Axes, place: int, of: Paired, dots: Sequence[float], scale: float) -> None:
    """A mean with its 95% interval beside the pairs that it is of; only these if there are too few of them."""
    ax.plot(dots, [place + 0.2] * len(dots), "o", color="0.65", markersize=2.5)
    if np.isfinite(of.half):
        ax.errorbar(scale * of.mean, place - 0.1, xerr=scale * of.half, fmt="o", color=WITH, capsize=3)


def start(records: Sequence[Record]) -> Figure:
    """Design (early), a column per size and warm-up, a line per seed: the last layer's cosine, and what 0.1 changes.

    The change is that of the training loss of a step, whose batch is the same for both runs of a pair.
    """
    runs = {r["name"]: r for r in records if r["design"] == "early"}
    arms = [arm for arm in CROSSED if any(name.startswith(f"early-{arm}-lam") for name in runs)]
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots(2, max(1, len(arms)), sharex=True, sharey="row", squeeze=False)
    for arm, (above, below) in zip(arms, axes.T, strict=False):
        for lam, colour, line in (("0", WITHOUT, "-"), ("0.1", WITH, "--")):
            for run in (run for name, run in runs.items() if name.startswith(f"early-{arm}-lam{lam}-")):
                cosines = [each["mean_cosine"][-1] for each in run["condensation"]]
                at = [each["step"] for each in run["condensation"]]
                above.plot(at, cosines, line, color=colour, linewidth=1, label=f"lambda {lam}")
                warmup = EARLY_STEPS * run["config"]["optim"]["warmup_fraction"]
                above.set_title(f"{arm.partition('-')[0]}, warm-up {warmup:.0f}")
        for name in (name for name in runs if name.startswith(f"early-{arm}-lam0.1-")):
            if without := runs.get(name.replace("lam0.1", "lam0")):
                losses = [{each["step"]: each["loss"] for each in run["train"]} for run in (runs[name], without)]
                at = [step for step in losses[0] if step in losses[1]]
                below.plot(at, [losses[0][step] - losses[1][step] for step in at], color=WITH, linewidth=1)
        below.axhline(0, color="0.6", linewidth=0.8)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("mean cosine, last layer")
    axes[1, 0].set_ylabel("training loss, difference")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes[0, 0].legend(once.values(), once.keys())
    return figure


def steps(records: Sequence[Record], losses: Arms) -> Figure:
    """Paired differences at lambda 0.1 against the number of steps, designs (a) and (b), a colour per size.

    On the right those of LONG steps or more again, enlarged. Sizes are moved apart a little, since some train for the
    same number of steps.
    """
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for ax in (left, right):
        ax.axhline(0, color="0.6", linewidth=0.8)
    last_step = {arm_and_seed(r)[0]: r["val"][-1]["step"] for r in records}
    arms = [arm for arm in losses if arm[0] in "ab" and arm.endswith("-lam0.1")]
    sizes = [size for size in SIZES if any(arm.split("-")[1] == size for arm in arms)]
    for number, size in enumerate(sizes):
        colour = matplotlib.colormaps["viridis"](0.88 * number / max(1, len(sizes) - 1))
        for place, arm in enumerate(arm for arm in arms if arm.split("-")[1] == size):
            x, label = last_step[arm] * 1.03 ** (number - 2), None if place else size
            for ax in (left, right) if last_step[arm] >= LONG else (left,):
                mark(ax, (x, x * 1.03), losses[arm], losses.get(baseline_of(arm), {}), MARKERS[number], colour, label)
    left.set_ylabel("difference to lambda 0, nats per token")
    for ax, ticks in ((left, (200, 500, 1000, 2000, 5000)), (right, (1500, 3000, 6000))):
        ax.set(xscale="log", xlabel="steps of training")
        ax.set_xticks(ticks, [f"{each:,}" for each in ticks])
        ax.minorticks_off()
    if sizes:
        left.legend(title="parameters")
    return figure


def mark(
    ax: Axes,
    places: tuple[float, float],
    values: dict[int, float],
    baseline: dict[int, float],
    marker: str,
    colour: Any,
    label: str | None = None,
) -> float:
    """Draw a mean difference with its interval at the first place and every pair as a dot at the second; return it.

    Hollow where there are too few pairs for an interval.
    """
    of, gaps = paired(values, baseline, margin=0.0), [*gaps_of(values, baseline).values()]
    ax.plot([places[1]] * len(gaps), gaps, "o", color="0.65", markersize=2.5)
    half, filled = (of.half, "full") if np.isfinite(of.half) else (None, "none")
    ax.errorbar(places[0], of.mean, half, None, marker, capsize=3, color=colour, label=label, fillstyle=filled)
    return of.mean


def context(records: Sequence[Record]) -> Figure:
    """Paired differences at lambda 0.1 by size, design (a), a line per group of CONTEXTS.

    Groups are moved apart a little; every pair a dot, 95% intervals, hollow markers where there are too few pairs.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.add_subplot()
    ax.axhline(0, color="0.6", linewidth=0.8)
    measured = [r for r in records if r["design"] == "a" and "by_context" in r]
    sizes = [size for size in SIZES if any(r["name"].startswith(f"a-{size}-lam0.1-") for r in measured)]
    for number, name in enumerate(CONTEXTS):
        arms = arms_of(measured, of_group("by_context", number))
        colour = matplotlib.colormaps["viridis"](0.88 * number / (len(CONTEXTS) - 1))
        means = []
        for place, size in enumerate(sizes):
            values, baseline = arms[f"a-{size}-lam0.1"], arms.get(f"a-{size}-lam0", {})
            x = place + 0.12 * (number - 1)
            means.append((x, mark(ax, (x, x + 0.04), values, baseline, MARKERS[number], colour)))
        ax.plot(*zip(*means, strict=True) if means else ([], []), color=colour, linewidth=1, label=name)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set(xlabel="parameters", ylabel="difference to lambda 0, nats per token")
    if sizes:
        ax.legend(title="tokens")
    return figure


def copying(runs: Sequence[Record]) -> Figure:
    """The loss of each group of CONTEXTS over the steps of training: solid without dispersion, dashed at lambda 0.1."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.add_subplot()
    styles = {"lam0": ("-", "{}"), "lam0.1": ("--", "{}, lambda 0.1")}
    for record in (r for r in runs if r["name"].split("-")[2] in styles):
        style, label = styles[record["name"].split("-")[2]]
        steps, *groups = zip(*record["context_over_steps"], strict=True)
        for number, losses in enumerate(groups):
            colour = matplotlib.colormaps["viridis"](0.88 * number / (len(CONTEXTS) - 1))
            ax.plot(steps, losses, style, color=colour, label=label.format(CONTEXTS[number]))
    ax.set(xlabel="steps of training", ylabel="loss, nats per token")
    lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one of each label
    figure.legend(lines.values(), lines.keys(), title="tokens", loc="outside right upper")
    return figure


def rivals(found: Sequence[Entry]) -> Figure:
    """Validation loss against mean cosine, a line per loss through its weights, means over seeds."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.add_subplot()
    lines = {name: points for name, points in curves(found).items() if len(points) > 1}
    for number, (name, points) in enumerate(lines.items()):
        colour = matplotlib.colormaps["viridis"](0.88 * number / max(1, len(lines) - 1))
        x, y = [point.cosine for point in points], [point.loss for point in points]
        ax.plot(x, y, marker=MARKERS[number], color=colour, label=name, linestyle=("-", "--", ":")[number % 3])
    if lines:
        without = [entry.loss for entry in found if entry.weight == 0]
        ax.axhline(statistics.fmean(without), color="0.6", linewidth=0.8)
        figure.legend(loc="outside right upper")
    ax.set(xlabel="mean cosine, layers after the embedding", ylabel="validation loss, nats per token")
    return figure
