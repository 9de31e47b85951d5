"""Runs and their folders: what a run leaves there, and how it is read back.

When it is read, a run may be in any state, written by a process that was killed in the middle of a line, by another
version, or not by us: whatever is wrong with it is told of that run, and no other run suffers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import checkpoint, distributed, hf, optim
from nanodisp.condensation import trend
from nanodisp.config import BUDGET, CONF, NOT_IDENTITY, Config, TrainConfig, count_steps, identity
from nanodisp.distributed import World
from nanodisp.errors import UserError, first_line
from nanodisp.generation import generate
from nanodisp.gpt import GPT, GPTConfig
from nanodisp.loader import Corpus
from nanodisp.metrics import Metrics, read_records
from nanodisp.tokenizer import load_tokenizer

LAMBDA = "dispersion.lambda_disp"
EVALUATION = "evaluation.json"


# --- what a run leaves -----------------------------------------------------------------------


def write_config(folder: Path, config: Config, corpus: Corpus) -> None:
    """Leave the resolved configuration in the run's folder, and the tokenizer if it is a file."""
    try:
        temporary = folder / "config.tmp"
        OmegaConf.save(OmegaConf.structured(config), temporary)
        temporary.replace(folder / "config.yaml")
        if Path(corpus.tokenizer).is_file():
            shutil.copyfile(corpus.tokenizer, folder / "tokenizer.tiktoken")
    except OSError as error:
        raise UserError(f"the run's folder {folder} can not be written: {error}; choose another out_dir") from error


def conclude(folder: Path, model: GPT, corpus: Corpus, config: Config, metrics: Metrics) -> None:
    """Say how it went: loss, condensation before and after, a sample, and where everything lies."""
    if not metrics.enabled:
        return
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in records if record["split"] == "val"]
    for when, record in (("before", validations[0]), ("after", validations[-1])) if validations else ():
        cosines = " ".join("nan" if value is None else f"{value:.3f}" for value in record["mean_cosine"])
        metrics.say(f"mean cosine by layer {when:>6} training: {cosines}")
    if not validations or validations[-1]["loss"] is None:
        metrics.say(f"the loss is not finite: a lower optim.lr or a smaller optim.grad_clip may help; see {folder}")
        return
    if config.train.sample_tokens > 0:
        metrics.say(f"--- sample\n{write_sample(folder, model, corpus, config)}\n---")
    last = validations[-1]
    bpb = f", {last['bpb']:.4f} bits per byte" if last["bpb"] else ""
    metrics.say(f"validation loss {last['loss']:.4f} nats per token{bpb} after {last['step']} steps")
    metrics.say(f"config.yaml, metrics.jsonl, samples.txt and checkpoints/ lie in {folder}")
    metrics.say(f'more text: python sample.py checkpoint={folder} prompt="…"')


def write_sample(folder: Path, model: GPT, corpus: Corpus, config: Config) -> str:
    """Text that the model makes up from nothing; also written to samples.txt."""
    try:
        tokenizer = load_tokenizer(corpus.tokenizer)
    except UserError as error:  # training does not need the tokenizer's file, so a finished run is not lost by it
        return f"(no sample: {error})"
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    start = torch.full((1, 1), tokenizer.eot, device=device)
    model.eval()
    tokens = generate(model, start, config.train.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    text = tokenizer.decode_bytes(int(token) for token in tokens).decode("utf-8", errors="replace")
    with contextlib.suppress(OSError):  # a run is not lost by that, and the text is shown anyway
        (folder / "samples.txt").write_text(text, encoding="utf-8")
    return text


def restore(
    folder: Path,
    config: Config,
    corpus: Corpus,
    world: World,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> dict[str, Any] | None:
    """Put the newest whole checkpoint of the run back, if there is one; its state. Else put in what it begins with."""
    if config.resume == "never" and (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run: resume=auto goes on with it, run_name=<another> starts afresh")
    saved = checkpoint.load_newest(folder / "checkpoints") if world.is_main else None
    found = int(world.sum(torch.tensor(saved.step + 1 if saved else 0, device=world.device))) - 1  # rank 0 tells
    if found < 0:
        if config.init_from is not None:
            weights = hf.initial_weights(config.init_from, config.model, config.data.tokenizer)
            model.load_state_dict(distributed.scatter(weights, model))
        return None
    saved = saved or checkpoint.load(checkpoint.path_of(folder / "checkpoints", found))
    try:
        theirs = {**identity(saved.state["config"]), "corpus": saved.state["corpus"]}
        ours = {**identity(dataclasses.asdict(config)), "corpus": corpus.folder.name}
        differing = [key for key in ours if key not in BUDGET and theirs.get(key) != ours[key]]
        if differing:
            changes = ", ".join(f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing)
            raise UserError(f"{saved.path} is of another run: {changes}; give this one another run_name")
        model.load_state_dict(distributed.scatter(saved.model, model))
        optim.load_state_tensors(model, optimizers, distributed.scatter(saved.optimizer, model))
        scaler.load_state_dict(saved.state["scaler"])
        return {key: saved.state[key] for key in ("step", "seconds", "bad_steps", "bad_in_a_row")}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{saved.path} can not be gone on from, though its sums are right: {reason}") from error


# --- reading it back -------------------------------------------------------------------------


@dataclass
class Run:
    """One run, as far as it can be read.

    status: "finished", "unfinished", or "failed" for a run with an `error.txt`, a loss that is
        not a number, or files that can not be read; `problem` says what.
    config: keys with dots -> values; empty when it can not be read.
    numbers: of its last validation, by the names that `read_metrics` gives them.
    steps, cosines: [S] and [S, L + 1], the mean cosine by layer of every validation.
    course_steps, course: the same of the finer "condensation" records, or of the validations where there are none.
    tasks: of its evaluation.json, if that is of the run's last step.
    """

    folder: Path
    status: str = "unfinished"
    problem: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    n_parameters: int = 0
    step: int = 0
    total_steps: int = 0
    numbers: dict[str, float | None] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    cosines: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    course_steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    course: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def is_imported(self) -> bool:
        """Whether it is another's model as `python -m nanodisp.hf import` leaves it: not trained here at all."""
        return self.status == "unfinished" and self.step == 0 and str(self.config.get("init_from")).startswith("hf:")

    @property
    def size(self) -> str:
        return f"{readable_count(self.n_parameters)} ({self.config['model.n_layer']} x {self.config['model.n_embd']})"


def read_runs(folder: Path) -> list[Run]:
    """All runs in `folder`, by name; raises UserError when there is none."""
    marks = ("config.yaml", "metrics.jsonl", "error.txt", "checkpoints")
    found = sorted(f for f in folder.glob("*") if any((f / mark).exists() for mark in marks))
    if not found:
        raise UserError(f"{folder} holds no run: give the folder of a sweep, such as out/lambda")
    return [read_run(f) for f in found]


def read_run(folder: Path) -> Run:
    """One run; whatever is wrong with its files is told in `problem`, never raised."""
    run = Run(folder)
    try:
        run.config = flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        model = {key[6:]: value for key, value in run.config.items() if key.startswith("model.")}
        run.n_parameters = count_parameters(GPTConfig(**model))
        budget = TrainConfig(**{key[6:]: value for key, value in run.config.items() if key.startswith("train.")})
        run.total_steps = count_steps(budget, run.n_parameters, budget.batch_size * run.config["model.block_size"])
        float(run.config[LAMBDA]), int(run.config["seed"])
        read_metrics(run)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError) as error:
        run.status, run.problem = "failed", "can not be read: " + str(error).strip().split("\n")[0]
    try:
        told = read_evaluation(folder / EVALUATION)
        if told and told["tasks"] and not str(told["model"]).endswith(f" at step {run.step}"):
            raise UserError(f"{EVALUATION} is of {told['model']}, the run is at step {run.step}: evaluate it again")
        run.tasks = told.get("tasks", {})
    except UserError as error:  # of an evaluation: the run is what it was
        run.problem = run.problem or str(error)
    error_file = folder / "error.txt"
    if error_file.is_file():
        run.status, run.problem = "failed", error_file.read_text(errors="replace").strip().split("\n")[-1]
    return run


def read_metrics(run: Run) -> None:
    """Numbers and status from metrics.jsonl; lines that are no whole record are passed over."""
    records = [(record["split"], record["step"], record) for record in read_records(run.folder / "metrics.jsonl")]
    saved = [int(path.name[5:]) for path in checkpoint.all_checkpoints(run.folder / "checkpoints")]
    run.step = max([*saved, *(step for _, step, _ in records)], default=0)
    all_validations = [(step, record) for split, step, record in records if split == "val"]
    bad = [step for step, record in all_validations if not isinstance(record.get("loss"), (int, float))]
    validations = [(step, record) for step, record in all_validations if step not in bad]
    if bad and bad[-1] == all_validations[-1][0]:  # an update that was left out on the way is no failure
        run.status, run.problem = "failed", f"the loss is not a number at step {bad[0]}"
    elif validations and validations[-1][0] >= run.total_steps:
        run.status = "finished"
    else:
        run.problem = f"at step {run.step} of {run.total_steps}"
    if not validations:
        return
    run.steps, run.cosines = _curve(validations)
    followed = [(step, record) for split, step, record in records if split == "condensation"]
    run.course_steps, run.course = _curve(followed or validations)
    last = validations[-1][1]
    speeds = [speed for _, _, record in records if (speed := record.get("tokens_per_second"))]
    rho, tau = trend(last["mean_cosine"])
    run.numbers = {
        "loss": last["loss"],
        "bpb": last["bpb"],
        "mean_cosine": last["mean_cosine"][-1],
        "rho": rho,
        "tau": tau,
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,  # the first one warms up
    }


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


def _curve(records: Sequence[tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and mean cosines [S, L + 1] of the records that have them."""
    curve = [(step, record["mean_cosine"]) for step, record in records if record.get("mean_cosine")]
    return np.array([step for step, _ in curve]), np.array([means for _, means in curve], dtype=np.float64)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 6}} -> {"model.n_layer": 6}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}


def count_parameters(config: GPTConfig) -> int:
    return _count_parameters(dataclasses.astuple(config))


@lru_cache
def _count_parameters(shape: tuple[Any, ...]) -> int:
    with torch.device("meta"):
        return GPT(GPTConfig(*shape)).num_parameters()


def differences(runs: Sequence[Run]) -> dict[str, dict[Path, Any]]:
    """The keys that differ among the runs, each with the values by run folder; what does not decide a result aside."""
    readable = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in readable for key in run.config)
    values = {key: {run.folder: run.config.get(key) for run in readable} for key in keys if not _is_aside(key)}
    return {key: by_run for key, by_run in values.items() if len({json.dumps(v) for v in by_run.values()}) > 1}


def _is_aside(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in NOT_IDENTITY.get(section, ()) or section in NOT_IDENTITY[""]


def command_of(run: Run, defaults: dict[str, Any]) -> str:
    """A command that makes this run: what differs from the defaults, spelled out."""
    changed = {key: value for key, value in run.config.items() if key not in defaults or defaults[key] != value}
    return shlex.join(["python", "train.py", *(f"{key}={hydra_value(value)}" for key, value in changed.items())])


def hydra_value(value: Any) -> str:
    """A value as Hydra's override grammar spells it; backslashes count there only before a quote."""
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    if re.fullmatch(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_./][\w./-]*", value, re.IGNORECASE | re.ASCII):
        return value
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), value) + "'"


def default_config() -> dict[str, Any]:
    """What `python train.py` runs, flattened."""
    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return flatten(OmegaConf.to_container(hydra.compose("config")))


def readable_count(n: int) -> str:
    """1255552 -> 1.3M."""
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"
