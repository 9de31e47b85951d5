"""Runs read back from their folders.

A run may be in any state, written by a process that was killed in the middle of a line, by another version, or not by
nanodisp: whatever is wrong with it is reported for that run, and no other run suffers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp.condensation.cosine import trend
from nanodisp.config import ADDED, CONFIG, TrainConfig, count_steps, decides, flatten
from nanodisp.errors import UserError
from nanodisp.models.blocks import GPTConfig, architecture
from nanodisp.plan import size_of
from nanodisp.runs import checkpoint
from nanodisp.runs.evaluation import EVALUATION, read_evaluation
from nanodisp.runs.metrics import METRICS, read_records

LAMBDA = "dispersion.lambda_disp"
UNREADABLE = (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError)
STANDARD = [
    "step",
    "split",
    "loss",
    "masked_loss",
    "bpb",
    "tokens",
    "seconds",
    "lambda_disp",
    "lr",
    "grad_norm",
    "bad_steps",
    "tokens_per_second",
    "mfu",
]


@dataclass
class RunSummary:
    """One run, as far as it can be read.

    status: "finished", "unfinished", or "failed" for a run with an `error.txt`, a loss that is not a number, or files
        that cannot be read; `problem` says which.
    config: keys with dots -> values; empty when it cannot be read.
    architecture: see `blocks.architecture`.
    numbers: at the end of the run, by the names that `read_metrics` gives them.
    layers: figures of the last validation by name, one value per layer.
    losses: "train" and "val" -> steps [S] and losses [S] of the name `loss_name`, NaN where one is not a number.
    steps, cosines: [S] and [S, L + 1], the mean cosine by layer of every validation.
    trajectory_steps, trajectory: the same from the more frequent "condensation" records; from validations without them.
    tasks: from its evaluation.json, if that is of the run's last step.
    """

    folder: Path
    status: str = "unfinished"
    problem: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    n_parameters: int = 0
    architecture: str = ""
    step: int = 0
    total_steps: int = 0
    numbers: dict[str, float | None] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    cosines: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    trajectory_steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    trajectory: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_name(self) -> str:
        """As in `GPTConfig`, also if the configuration cannot be read."""
        return GPTConfig(causal=self.config.get("model.causal") is not False).loss_name

    @property
    def is_imported(self) -> bool:
        """Whether the run was written by `python -m nanodisp.hf import` and never trained here."""
        return self.status == "unfinished" and self.step == 0 and str(self.config.get("init_from")).startswith("hf:")

    @property
    def size(self) -> str:
        return f"{readable_count(self.n_parameters)} ({self.config['model.n_layer']} x {self.config['model.n_embd']})"


def read_runs(folder: Path) -> list[RunSummary]:
    """All runs in `folder`, by name; UserError for a folder without runs."""
    marks = (CONFIG, METRICS, "error.txt", checkpoint.CHECKPOINTS)
    if (folder / CONFIG).is_file() or (folder / METRICS).is_file():
        raise UserError(f"{folder} is a single run: give the folder that it is in, {folder.absolute().parent}")
    found = sorted(f for f in folder.glob("*") if any((f / mark).exists() for mark in marks))
    if not found:
        lacks = "holds no runs" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {lacks}: give the folder of a sweep, such as out/lambda")
    return [read_run(f) for f in found]


def read_run(folder: Path) -> RunSummary:
    """One run; whatever is wrong with its files is reported in `problem`, never raised."""
    run = RunSummary(folder)
    try:
        try:
            read_config(run, OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
        except UNREADABLE:
            kept = config_of_checkpoint(folder)
            if kept is None:
                raise
            read_config(run, kept)
        read_metrics(run)
    except UNREADABLE as error:
        run.status, run.problem = "failed", "cannot be read: " + str(error).strip().split("\n")[0]
    try:
        found = read_evaluation(folder / EVALUATION)
        if found and found["tasks"] and not str(found["model"]).endswith(f" at step {run.step}"):
            raise UserError(
                f"{EVALUATION} is of {found['model']}, but the run is at step {run.step}: evaluate it again"
            )
        run.tasks = found.get("tasks", {})
    except UserError as error:  # of the evaluation, not of the run
        run.problem = run.problem or str(error)
    error_file = folder / "error.txt"
    if error_file.is_file():
        run.status, run.problem = "failed", error_file.read_text(errors="replace").strip().split("\n")[-1]
    return run


def read_config(run: RunSummary, config: Any) -> None:
    """The configuration, and what follows from it; raises one of `UNREADABLE` if it is not complete."""
    run.config = flatten(config)
    run.config |= {key: default for key, default in ADDED.items() if key not in run.config}  # older runs
    if run.config.get("dispersion.schedule") == "linear":  # the name of warmup in older runs
        run.config["dispersion.schedule"] = "warmup"
    model = {key[6:]: value for key, value in run.config.items() if key.startswith("model.")}
    run.architecture = architecture(GPTConfig(**model))
    run.n_parameters = count_parameters(GPTConfig(**model))
    budget = TrainConfig(**{key[6:]: value for key, value in run.config.items() if key.startswith("train.")})
    run.total_steps = count_steps(budget, run.n_parameters, budget.batch_size * run.config["model.block_size"])
    float(run.config[LAMBDA]), int(run.config["seed"])


def config_of_checkpoint(folder: Path) -> Any:
    """What a run's newest intact checkpoint keeps of config.yaml; None without one."""
    for path in reversed(checkpoint.all_checkpoints(folder / checkpoint.CHECKPOINTS)):
        with contextlib.suppress(UserError):
            return checkpoint.read_state(path).get("config")
    return None


def read_metrics(run: RunSummary) -> None:
    """Numbers and status from metrics.jsonl; incomplete lines are skipped.

    Added figures are read under their names: lists by layer and numbers of validations as they are, numbers of training
    records (loss terms) as "<name>, training".
    """
    records = [(record["split"], record["step"], record) for record in read_records(run.folder / METRICS)]
    for split in ("train", "val"):
        of_split = [(step, number_of(record.get(run.loss_name))) for s, step, record in records if s == split]
        run.losses[split] = np.array([step for step, _ in of_split]), np.array([loss for _, loss in of_split])
    saved = [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run.folder / checkpoint.CHECKPOINTS)]
    run.step = max([*saved, *(step for _, step, _ in records)], default=0)
    all_validations = [(step, record) for split, step, record in records if split == "val"]
    bad = [step for step, record in all_validations if not isinstance(record.get(run.loss_name), (int, float))]
    validations = [(step, record) for step, record in all_validations if step not in bad]
    if bad and bad[-1] == all_validations[-1][0]:  # one that recovered has not failed
        run.status, run.problem = "failed", f"the loss is not a number at step {bad[0]}"
    elif validations and validations[-1][0] >= run.total_steps:
        run.status = "finished"
    else:
        run.problem = f"at step {run.step} of {run.total_steps}"
    if not validations:
        return
    run.steps, run.cosines = _curve(validations)
    between = [(step, record) for split, step, record in records if split == "condensation"]
    run.trajectory_steps, run.trajectory = _curve(between or validations)
    last = validations[-1][1]
    speeds = [speed for _, _, record in records if (speed := record.get("tokens_per_second"))]
    rho, tau = trend(last["mean_cosine"])
    run.layers = {
        name: [math.nan if each is None else float(each) for each in value]  # JSON has no NaN
        for name, value in last.items()
        if isinstance(value, list)
    }
    trained = [record for split, _, record in records if split == "train"]
    terms = trained[-1] if trained else {}
    run.numbers = {
        run.loss_name: last[run.loss_name],
        "bpb": last.get("bpb"),
        "mean_cosine": last["mean_cosine"][-1],
        "rho": rho,
        "tau": tau,
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,  # the first one warms up
        **{name: value for name, value in last.items() if _is_added(name, value)},
        **{f"{name}, training": value for name, value in terms.items() if _is_added(name, value)},
    }


def number_of(value: Any) -> float:
    """The value if it is a number, else NaN."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _is_added(name: str, value: Any) -> bool:
    return name not in STANDARD and isinstance(value, (int, float))


def _curve(records: Sequence[tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and mean cosines [S, L + 1] of the records with a mean cosine."""
    curve = [(step, record["mean_cosine"]) for step, record in records if record.get("mean_cosine")]
    return np.array([step for step, _ in curve]), np.array([means for _, means in curve], dtype=np.float64)


def count_parameters(config: GPTConfig) -> int:
    return _count_parameters(dataclasses.astuple(config))


@lru_cache
def _count_parameters(shape: tuple[Any, ...]) -> int:
    return size_of(GPTConfig(*shape))[0]


def differences(runs: Sequence[RunSummary]) -> dict[str, dict[Path, Any]]:
    """The keys that decide a result and differ between the runs, each with its values by run folder."""
    readable = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in readable for key in run.config)
    values: dict[str, dict[Path, Any]] = {
        key: {run.folder: _anywhere(key, run.config.get(key)) for run in readable} for key in keys if decides(key)
    }
    return {key: by_run for key, by_run in values.items() if len({json.dumps(v) for v in by_run.values()}) > 1}


def _anywhere(key: str, value: Any) -> Any:
    """The value on any machine: the path of a tokenizer's file begins with the folder of the shards beside it."""
    return "/".join(Path(value).parts[-2:]) if key == "data.tokenizer" and isinstance(value, str) else value


def as_text(value: Any) -> str:
    """A configuration value: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def readable_count(n: int) -> str:
    """1255552 -> 1.3M."""
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"
