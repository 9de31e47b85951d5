"""evaluation.json: the benchmark figures of a model, as `nanodisp.evaluate` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nanodisp.errors import UserError

EVALUATION = "evaluation.json"
EVALUATIONS_OF_STEPS = f"evaluation_step_{'[0-9]' * 8}.json"  # a pattern: not those of quantized models


def evaluation_of_step(step: int, newest: int) -> str:
    """The name of the file of a run's step: `EVALUATION` for its newest checkpoint."""
    return EVALUATION if step == newest else f"evaluation_step_{step:08d}.json"


def step_of(evaluation: dict[str, Any]) -> int | None:
    """The step that an evaluation is of; None if it is of no run."""
    step = re.search(r" at step (\d+)( in \w+)?$", evaluation.get("model", ""))
    return int(step[1]) if step else None


def quantized(file: str, name: str | None) -> str:
    """The name of the file of a model after rounding, see `models/quantize.py`."""
    return file if name is None else f"{Path(file).stem}_{name}.json"


def rename_earlier(folder: Path, newest: int, quantize: str | None) -> None:
    """Give a run's `EVALUATION` the name of its step, if the run has been trained further since.

    Not if there is a file of that name. Raises UserError for a file that `nanodisp.evaluate` did not write, OSError.
    """
    path = folder / quantized(EVALUATION, quantize)
    step = step_of(read_evaluation(path))
    if step is None or step >= newest:
        return
    of_step = folder / quantized(evaluation_of_step(step, newest), quantize)
    if not of_step.exists():
        if items_file(path).exists():
            items_file(path).replace(items_file(of_step))
        path.replace(of_step)


def items_file(evaluation: Path) -> Path:
    """The file beside an evaluation.json with the figures of each item."""
    return evaluation.with_name(f"{evaluation.stem}_items.npz")


def read_evaluation(path: Path) -> dict[str, Any]:
    """The content of an evaluation.json, {} without the file; UserError for one that `nanodisp.evaluate` did not write.

    {"model": …, "harness": version, "tasks": {name: {"metrics": {name: {"value", "stderr", "higher_is_better"}},
    "shots", "examples", "version", "seed", "settings", "cut"}}}; missing values are None.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for entry in content["tasks"].values():
            for figure in (entry["metrics"][main_metric(entry)], *entry["metrics"].values()):
                [float(value) for value in (figure["value"], figure["stderr"]) if value is not None]
            content["model"], figure["higher_is_better"], entry["shots"], entry["examples"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is not what nanodisp.evaluate writes: delete it and evaluate again") from error
    return content


def main_metric(entry: dict[str, Any]) -> str:
    """The metric that represents a task: acc, as in the figures of arXiv 2602.00217, else its first."""
    return "acc" if "acc" in entry["metrics"] else next(iter(entry["metrics"]))
