"""How two evaluated runs differ: a paired bootstrap over the items of their tasks.

    python -m nanodisp.evaluate compare out/<run> out/<other run>

Both are compared by their last checkpoints. If `checkpoints=all` has evaluated several, they are also compared by the
best of each, chosen by the mean over the tasks, as arXiv 2602.00217 reports it: choosing the best of n raises a figure
even where nothing differs, so what the choice adds to each run is printed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanodisp.errors import UserError, to_stderr
from nanodisp.evaluate.results import averaged, read_items
from nanodisp.runs.evaluation import EVALUATION, EVALUATIONS_OF_STEPS, items_file, main_metric, read_evaluation, step_of

RESAMPLES, SEED = 2000, 0
INTERVAL = (2.5, 97.5)  # percent
OF_ITEMS = ("limit", "seed", "num_fewshot", "data")  # settings that decide which items a task has, and their prompts


class Evaluated(NamedTuple):
    """The evaluations of a run, by step in ascending order: their entries by task, and their items by task."""

    name: str
    entries: list[dict[str, Any]]
    items: list[dict[str, np.ndarray]]
    steps: list[int]


def compare(arguments: Sequence[str]) -> str:
    """Two tables as text: the last checkpoints of two runs, and the best; UserError if they cannot be compared."""
    if len(arguments) != 2:
        raise UserError("compare needs two evaluated runs: compare out/<run> out/<other run>")
    a, b = (read_run(Path(name)) for name in arguments)
    tasks = common_tasks(a, b)
    lines = [f"a: {a.name}, {describe(a)}", f"b: {b.name}, {describe(b)}"]
    if missing := [task for task in dict.fromkeys([*a.items[-1], *b.items[-1]]) if task not in tasks]:
        lines.append(f"left out, because not all of these checkpoints have it: {', '.join(missing)}")
    lines += ["", f"{'last checkpoints':24} {'items':>7} {'a':>8} {'b':>8} {'b - a':>8}  95% interval"]
    # [resample, checkpoint] of each task and run; a resample has the same items in all checkpoints of both runs
    random = np.random.default_rng(SEED)
    resampled = {task: resample(random, a, b, task) for task in tasks}
    for task in tasks:
        one, other = (run.items[-1][task] for run in (a, b))
        lines.append(row(task, len(one), one.mean(), other.mean(), *(each[:, -1] for each in resampled[task])))
    exact = [np.array([np.mean([each[task].mean() for task in tasks]) for each in run.items]) for run in (a, b)]
    means = [np.mean([resampled[task][i] for task in tasks], axis=0) for i in (0, 1)]  # [RESAMPLES, checkpoints] each
    mean = f"mean of {len(tasks)} tasks"
    lines.append(row(mean, None, exact[0][-1], exact[1][-1], means[0][:, -1], means[1][:, -1]))
    if max(len(run.steps) for run in (a, b)) > 1:
        lines += ["", f"{'best checkpoints':24} {'':7} {'a':>8} {'b':>8} {'b - a':>8}  95% interval"]
        lines.append(row(mean, None, exact[0].max(), exact[1].max(), means[0].max(axis=1), means[1].max(axis=1)))
        for letter, run, of_steps in zip("ab", (a, b), exact, strict=True):
            lines.append(
                f"{letter}: best at step {run.steps[int(of_steps.argmax())]:,} of {len(run.steps)} checkpoints; "
                f"choosing the best adds {of_steps.max() - of_steps[-1]:.4f} to the last"
            )
    return "\n".join(lines)


def describe(run: Evaluated) -> str:
    return f"step {run.steps[-1]:,}" + (f" and {len(run.steps) - 1} earlier checkpoints" if run.steps[1:] else "")


def row(
    name: str, n: int | None, one: float, other: float, resampled_one: np.ndarray, resampled_other: np.ndarray
) -> str:
    low, high = np.percentile(resampled_other - resampled_one, INTERVAL)
    items = "" if n is None else f"{n:,}"
    return f"{name:24} {items:>7} {one:8.4f} {other:8.4f} {other - one:+8.4f}  [{low:+.4f}, {high:+.4f}]"


def resample(random: np.random.Generator, a: Evaluated, b: Evaluated, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Means of a task over items drawn with replacement: [RESAMPLES, checkpoints] of each run."""
    values = np.stack([each[task] for run in (a, b) for each in run.items], axis=1)  # [items, checkpoints of both]
    means = np.empty((RESAMPLES, values.shape[1]))
    for i in range(RESAMPLES):
        drawn = random.integers(0, len(values), len(values))
        means[i] = np.bincount(drawn, minlength=len(values)) @ values / len(values)
    return means[:, : len(a.items)], means[:, len(a.items) :]


def common_tasks(a: Evaluated, b: Evaluated) -> list[str]:
    """The tasks that every evaluation of both has, with items of the same data; UserError without any."""
    evaluations = [(entries, items) for run in (a, b) for entries, items in zip(run.entries, run.items, strict=True)]
    shared = [task for task in a.items[-1] if all(task in items for _, items in evaluations)]
    if not shared:
        raise UserError(f"{a.name} and {b.name} have no task in common: evaluate both with the same tasks=…")
    for task in shared:
        given = [(entries[task].get("settings") or {}, items[task]) for entries, items in evaluations]
        settings = [(of_items(each), len(items)) for each, items in given]
        if any(each != settings[0] for each in settings):
            different = next(each for each in settings if each != settings[0])
            raise UserError(
                f"{task} is not of the same items: {settings[0][1]:,} with {settings[0][0]} and {different[1]:,} with "
                f"{different[0]}; evaluate both again with the same limit, seed, num_fewshot and data"
            )
    return shared


def of_items(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an entry that decide its items, and with examples before the questions the version."""
    return {key: settings.get(key) for key in (*OF_ITEMS, *["version"] * bool(settings.get("num_fewshot")))}


def read_run(folder: Path) -> Evaluated:
    """The evaluations of a run, without those after rounding, or of a Hugging Face folder or a file as step 0.

    Steps without any task of the last one are left out, and named on stderr. Raises UserError without any.
    """
    paths = [folder] if folder.is_file() else [*sorted(folder.glob(EVALUATIONS_OF_STEPS)), folder / EVALUATION]
    found: dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
    for path in paths:
        if not (evaluation := read_evaluation(path)):
            continue
        arrays = read_items(items_file(path))
        kept = {task: f"{task}/{main_metric(evaluation['tasks'][task])}" for task in averaged(evaluation["tasks"])}
        items = {task: arrays[key].astype(np.float64) for task, key in kept.items() if key in arrays}
        found[step_of(evaluation) or 0] = evaluation["tasks"], {t: v for t, v in items.items() if v.ndim == 1}
    if not found or not any(items for _, items in found.values()):
        raise UserError(f"{folder} has no evaluation with items: run python -m nanodisp.evaluate checkpoint={folder} …")
    *earlier, last = sorted(found)
    steps = [step for step in earlier if found[step][1].keys() & found[last][1].keys()] + [last]
    if lacking := sorted(found.keys() - set(steps)):
        to_stderr(f"{folder}: left out, without any task of step {last}: step {', '.join(map(str, lacking))}")
    return Evaluated(str(folder), [found[s][0] for s in steps], [found[s][1] for s in steps], steps)
