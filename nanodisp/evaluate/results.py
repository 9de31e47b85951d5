"""Benchmark figures: read from the harness's results, written to evaluation.json, printed as a table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanodisp.errors import UserError
from nanodisp.files import write_whole
from nanodisp.runs.evaluation import main_metric

NUMBERS = re.compile(r"\[(?:\s+(?:[-\d.e+]+|null),?)+\s+\]")  # a list of numbers, which is written as one line


def entries(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks of the harness's results and their figures; of a group with figures of its own, only the group."""
    within = {child for group, children in results["group_subtasks"].items() for child in children}
    names = [name for name in results["results"] if name not in within]
    for name in names:
        metrics = dict(metrics_of(results, name))
        if not metrics:  # a group without figures of its own: its tasks instead
            names += results["group_subtasks"].get(name, [])
            continue
        leaves = list(leaves_of(results["group_subtasks"], name))
        shots = {results["n-shot"][leaf] for leaf in leaves}
        yield (
            name,
            {
                "metrics": metrics,
                "shots": shots.pop() if len(shots) == 1 else None,
                "examples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                "version": results["versions"].get(name),
            },
        )


def leaves_of(subtasks: dict[str, list[str]], name: str) -> Iterator[str]:
    """The tasks of a group at any depth, or the task itself."""
    if not subtasks.get(name):
        yield name
    for child in subtasks.get(name, []):
        yield from leaves_of(subtasks, child)


def metrics_of(results: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's metrics: value, standard error, whether higher is better. Each filter of a metric counts as one."""
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results["results"][name].get(f"{metric}_stderr,{filtered}")
        yield (
            metric if filtered == "none" else key,
            {
                "value": number_or_none(value),
                "stderr": number_or_none(stderr),
                "higher_is_better": (results["higher_is_better"].get(name) or {}).get(metric),
            },
        )


def number_or_none(value: Any) -> float | None:
    """None for NaN, which JSON does not have, and for the harness's "N/A"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def save(path: Path, evaluation: dict[str, Any]) -> None:
    """Write evaluation.json, completely or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another with out=…") from error
    text = json.dumps(evaluation, indent=2)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    write_whole(path, text.encode() + b"\n")


def table(figures: dict[str, Any]) -> str:
    """A line per metric of each task, and the mean of each task's `main_metric` if higher is better."""
    lines = [f"{'task':24} {'metric':18} {'value':>9} {'stderr':>8} {'shots':>5} {'examples':>8}"]
    show = lambda value: "\N{EN DASH}" if value is None else f"{value:.4f}"  # noqa: E731
    for task, entry in figures.items():
        for metric, figure in entry["metrics"].items():
            shots = "mixed" if entry["shots"] is None else entry["shots"]
            value, stderr = show(figure["value"]), show(figure["stderr"])
            lines.append(f"{task:24} {metric:18} {value:>9} {stderr:>8} {shots:>5} {entry['examples']:8,}")
    chosen = [entry["metrics"][main_metric(entry)] for entry in figures.values()]
    if rising := [figure for figure in chosen if figure["higher_is_better"] and figure["value"] is not None]:
        mean = sum(figure["value"] for figure in rising) / len(rising)
        error = math.sqrt(sum((figure["stderr"] or 0.0) ** 2 for figure in rising)) / len(rising)
        lines.append(f"{'mean':24} {f'of {len(rising)} tasks':18} {mean:9.4f} {error:8.4f}")
    return "\n".join(lines)
