"""evaluation.json: the benchmark figures of a model, as `nanodisp.evaluate` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanodisp.errors import UserError

EVALUATION = "evaluation.json"


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `nanodisp.evaluate` has written, or nothing; UserError for a file that is not its own.

    {"model": …, "harness": version, "tasks": {name: {"metrics": {name: {"value", "stderr", "higher_is_better"}},
    "shots", "examples", "version", "seed"}}}; a value that there is not is None.
    """
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
        for entry in told["tasks"].values():
            for figure in (entry["metrics"][main_metric(entry)], *entry["metrics"].values()):
                [float(value) for value in (figure["value"], figure["stderr"]) if value is not None]
            told["model"], figure["higher_is_better"], entry["shots"], entry["examples"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is not what nanodisp.evaluate writes: delete it, and evaluate again") from error
    return told


def main_metric(entry: dict[str, Any]) -> str:
    """The metric that stands for a task: acc, as in the figures of arXiv 2602.00217, else its first."""
    return "acc" if "acc" in entry["metrics"] else next(iter(entry["metrics"]))
