"""Short training runs for what kills and disturbs them: how they are started, and what is compared."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from nanodisp.runs import checkpoint

ROOT = Path(__file__).parent.parent
SHORT = (
    *("model=nano", "data=pystdlib_bytes", "optim=adamw"),
    *("train.steps=24", "train.checkpoint_interval=2", "train.eval_interval=8", "train.eval_windows=8"),
    *("train.batch_size=4", "train.sample_tokens=0", "train.dtype=float32", "device=cpu"),
)
STEADY = ("optim.schedule=constant", "optim.warmup_steps=0")  # the same for any number of steps
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return checkpoint.all_checkpoints(run / checkpoint.CHECKPOINTS)


def weights(run: Path) -> str:
    """The sha256 of the final weights."""
    return json.loads((checkpoint.find(run) / "state.json").read_text())["sha256"]["model.safetensors"]


def curve(run: Path) -> list[float]:
    """The training losses in a run's metrics.jsonl, each step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == sorted(set(steps)), f"a step twice: {steps}"
    return [line["loss"] for line in lines if line["split"] == "train"]


def difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves; infinite when they are not equally long."""
    return float(np.max(np.abs(np.subtract(a, b)) / np.abs(b))) if len(a) == len(b) else float("inf")
