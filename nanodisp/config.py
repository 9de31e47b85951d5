"""The configuration of a run: a dataclass of sections, its identity, and the run's name.

The dataclasses are the one place for defaults, types, descriptions and checks; `conf/` holds what differs from the
defaults. `launch.py` brings them together.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from nanodisp.cli import LEAVE, Unused, no, one_of
from nanodisp.data.benchmarks import BENCHMARKS
from nanodisp.data.prepare import OF_DATA_SETS, DataConfig
from nanodisp.dispersion.formulas import CLAMP, CLAMPED, WITH_TAU
from nanodisp.dispersion.placement import DispersionConfig, name_layers, select_layers
from nanodisp.distributed.layout import PARALLEL
from nanodisp.models.blocks import SWITCHES, GPTConfig
from nanodisp.training.interventions import InterventionConfig
from nanodisp.training.optim import OptimConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE = ("auto", True, False)
OBJECTIVES = ("next_token", "masked_lm")  # of decoders, of encoders
RESUME = ("auto", "never")
WANDB_MODES = ("disabled", "offline", "online")
CONFIG = "config.yaml"  # in a run's folder
RUN_NAME = re.compile(r"\w[\w.,=+-]*")


@dataclass
class TrainConfig:
    """How a run trains, and for how long.

    steps: optimizer updates; or, overriding it,
    tokens: total training tokens, or
    tokens_per_param: training tokens as a multiple of the model's parameters.
    batch_size: sequences of the global batch, over all ranks and micro-batches.
    micro_batch_size: maximum sequences of one forward pass on a rank; null takes all at once.
    dtype: of matrix products: "bfloat16" or "float16" by autocast (weights stay float32; float16 scales the loss),
        "float32", or "auto": bfloat16 on a GPU or CPU that has it, else float32.
    compile: torch.compile the model and the loss; needs a compiler on the machine. "auto" compiles when the run is
        long enough for it to pay.
    parallel: how torchrun's ranks share the work: "ddp" keeps the whole model on each, "fsdp" shards weights, gradients
        and optimizer state. No difference for a single process.
    activation_checkpointing: recompute each block in backward instead of keeping its activations: less memory for one
        more forward pass.
    timeout_minutes: how long ranks wait for one that hangs, or for a machine's first to prepare data, before they fail.
    log_interval: steps between records of training figures.
    eval_interval: steps between validations.
    condensation_interval: steps between records of the layers' figures on four of the validation windows; null for
        never.
    snapshot_interval: steps between snapshots, which keep every layer's hidden states of the first 256 validation
        tokens for `python -m nanodisp.explore`; more of them at the start. Null for none.
    checkpoint_interval: steps between checkpoints.
    eval_windows: validation windows, spread evenly over the split; null takes all.
    eval_task: a file of multiple-choice questions (data/hellaswag/prepare.py makes one), answered at every validation;
        null for none.
    eval_tasks: benchmarks of local files, answered at every validation, such as [blimp,hellaswag]; see
        docs/evaluation.md. Needs the extra eval.
    eval_task_data: the folder of these files.
    eval_task_limit: the first so many items of each benchmark (of BLiMP evenly over its paradigms); null for all.
    keep_last: how many of the newest checkpoints are kept, besides the one with the lowest validation loss.
    replicate_checkpoints: every host keeps the run's folder: for hosts that share no disk, see docs/distributed.md.
    keep_every: also keep checkpoints whose step is a multiple of this; null for none.
    max_bad_steps: updates whose gradient is not finite are skipped; this many in a row end the run (on a GPU when the
        next figures are logged: checking at every step would make it wait).
    sample_tokens: tokens of the sample at the end; 0 for none.
    """

    steps: int | None = 800
    tokens: int | None = None
    tokens_per_param: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    dtype: str = "auto"
    compile: bool | str = "auto"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    timeout_minutes: float = 30.0
    log_interval: int = 50
    eval_interval: int = 200
    condensation_interval: int | None = 50
    snapshot_interval: int | None = None
    checkpoint_interval: int = 400
    eval_windows: int | None = 64
    eval_task: str | None = None
    eval_tasks: list[str] = field(default_factory=list)
    eval_task_data: str | None = None
    eval_task_limit: int | None = 300
    keep_last: int = 2
    replicate_checkpoints: bool = False
    keep_every: int | None = None
    max_bad_steps: int = 10
    sample_tokens: int = 256

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens_per_param is not None:
            raise ValueError(
                "train.tokens and train.tokens_per_param are both given; keep only one (train.tokens=null removes it)"
            )
        if self.steps is None and self.tokens is None and self.tokens_per_param is None:
            raise ValueError("no budget: give train.steps, train.tokens or train.tokens_per_param")
        if self.dtype not in DTYPES:
            raise ValueError(f"train.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if self.compile not in COMPILE:
            raise ValueError(f"train.compile={self.compile} is unknown; choose one of auto, true, false")
        if self.parallel not in PARALLEL:
            raise ValueError(f"train.parallel={self.parallel} is unknown; choose one of {', '.join(PARALLEL)}")
        if not 0 < self.timeout_minutes < math.inf:
            raise ValueError(f"train.timeout_minutes={self.timeout_minutes} must be positive")
        intervals = ("log_interval", "eval_interval", "checkpoint_interval")
        for name in ("batch_size", *intervals, "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        for task in self.eval_tasks:
            if task not in BENCHMARKS:
                near = difflib.get_close_matches(task, BENCHMARKS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(BENCHMARKS)}"
                raise ValueError(f"train.eval_tasks: {task} is unknown; {hint}")
        if self.eval_tasks and self.eval_task_data is None:
            raise ValueError(
                "train.eval_tasks needs train.eval_task_data=<folder of its files>, see docs/evaluation.md"
            )
        budget = ("steps", "tokens", "tokens_per_param")
        for name in (
            *budget,
            "micro_batch_size",
            "eval_windows",
            "eval_task_limit",
            "condensation_interval",
            "snapshot_interval",
            "keep_every",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name}={getattr(self, name)} must be positive, or null")


def count_steps(config: TrainConfig, n_parameters: int, tokens_per_step: int) -> int:
    """The budget in steps; tokens and tokens_per_param override steps, and the last step may exceed them."""
    if config.tokens is not None:
        return math.ceil(config.tokens / tokens_per_step)
    if config.tokens_per_param is not None:
        return math.ceil(config.tokens_per_param * n_parameters / tokens_per_step)
    assert config.steps is not None
    return config.steps


@dataclass
class WandbConfig:
    """Weights & Biases.

    mode: "disabled", "offline" (files in the run's folder, for `wandb sync`) or "online".
    project, entity, group, tags: as in `wandb.init`.
    """

    mode: str = "disabled"
    project: str = "nanodisp"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise ValueError(f"wandb.mode={self.mode} is unknown; choose one of {', '.join(WANDB_MODES)}")


@dataclass
class Config:
    """A run.

    objective: "next_token" for a causal model; "masked_lm" for one with model.causal=false (BERT's: some tokens are
        hidden, and predicted from all others). null is the one that fits the model.
    init_from: start from the weights of a run (its folder, or one of its checkpoints) or of a Hugging Face GPT-2, LLaMA
        or Qwen3 (hf:<folder or id>). `model` must have its shape; only block_size may be smaller, and without learned
        positions also larger. null initialises randomly.
    seed: of initial weights, data order, dropout and the sampled tokens of the dispersion loss.
    device: "auto", "cpu" or "cuda".
    resume: "auto" resumes a run of the same name, "never" makes that an error.
    out_dir: where run folders go.
    run_name: the name of the run's folder; null makes it from the configuration.
    tensorboard: also write figures for TensorBoard, into the run's folder.
    dry_run: report the run's size and approximate duration without training (prepares the data if needed).
    command: what started the run, for the report; set by `launch.py`.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dispersion: DispersionConfig = field(default_factory=DispersionConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    objective: str | None = None
    init_from: str | None = None
    seed: int = 1337
    device: str = "auto"
    resume: str = "auto"
    out_dir: str = "out"
    dry_run: bool = False
    run_name: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**63 - 1")
        if self.resume not in RESUME:
            raise ValueError(f"resume={self.resume} is unknown; choose one of {', '.join(RESUME)}")
        if self.objective not in (None, *OBJECTIVES):
            raise ValueError(f"objective={self.objective} is unknown; choose one of {', '.join(OBJECTIVES)}")
        fitting = OBJECTIVES[not self.model.causal]
        if self.objective not in (None, fitting):
            raise ValueError(
                f"objective={self.objective} needs model.causal={str(not self.model.causal).lower()}"
                f"{', as in model=nano_encoder' * self.model.causal}; this model's is {fitting}"
            )
        self.objective = fitting
        if (self.train.eval_task is not None or self.train.eval_tasks) and not self.model.causal:
            raise ValueError(
                "train.eval_task and eval_tasks need a model that predicts the next token: leave them out with "
                "model.causal=false, whose masked loss and mean cosine are recorded"
            )
        select_layers(self.dispersion.layers, self.model.n_layer)
        if self.dispersion.lambda_disp > 0 and self.model.block_size < 2:
            raise ValueError(
                f"model.block_size={self.model.block_size} must be at least 2: dispersion needs pairs of tokens"
            )
        if self.run_name is not None and not RUN_NAME.fullmatch(self.run_name):
            raise ValueError(
                f"run_name={self.run_name!r} must be letters, digits and . , = + - _ and begin with a letter or digit"
            )


SECTIONS: dict[str, Any] = {
    "model": GPTConfig,
    "data": DataConfig,
    "dispersion": DispersionConfig,
    "intervention": InterventionConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "wandb": WandbConfig,
}

# Keys that may change without making it another run, or that follow from others.
NOT_IDENTITY = {
    "": ("device", "resume", "out_dir", "run_name", "dry_run", "tensorboard", "command", "objective"),
    "data": ("folder",),
    "dispersion": ("backend",),
    "train": [
        "compile",
        "micro_batch_size",
        "parallel",
        "activation_checkpointing",
        "timeout_minutes",
        "max_bad_steps",
        "sample_tokens",
        "log_interval",
        "eval_interval",
        "condensation_interval",
        "snapshot_interval",
        "eval_task",
        "eval_tasks",
        "eval_task_data",
        "eval_task_limit",
        "checkpoint_interval",
        "keep_last",
        "keep_every",
        "replicate_checkpoints",
    ],
    "wandb": [each.name for each in dataclasses.fields(WandbConfig)],
}
# Keys that version 0.1.0 did not have, whose default is what it did: at the default they are left out of the identity.
ADDED = {f"model.{key}": getattr(GPTConfig(), key) for key in SWITCHES} | {
    "data.encoding": "utf-8",
    "dispersion.clamp": CLAMP,
}
BUDGET = ("train.steps", "train.tokens", "train.tokens_per_param")  # may grow when a run is resumed


def given(value: Any) -> bool:
    return value is not None


def all_but(section: str, schema: Any, key: str) -> tuple[str, ...]:
    return tuple(f"{section}.{each.name}" for each in dataclasses.fields(schema) if each.name != key)


UNUSED = [
    *OF_DATA_SETS,
    Unused(
        all_but("dispersion", DispersionConfig, "lambda_disp"),
        "dispersion.lambda_disp",
        one_of(0, None),
        f"{LEAVE}, or give a lambda above 0",
    ),
    Unused(("dispersion.tau",), "dispersion.variant", no(*WITH_TAU, None), f"the formula has no tau; {LEAVE}"),
    Unused(("dispersion.clamp",), "dispersion.variant", no(*CLAMPED, None), f"the formula has no angles; {LEAVE}"),
    Unused(("dispersion.warmup_fraction",), "dispersion.schedule", no("warmup"), "add dispersion.schedule=warmup"),
    Unused(("model.rope_theta",), "model.position", no("rotary", None), "add model.position=rotary"),
    Unused(("train.sample_tokens",), "model.causal", one_of(False), f"a bidirectional model samples no text; {LEAVE}"),
    Unused(("optim.muon_lr", "optim.muon_momentum"), "optim.name", no("muon"), "add optim=muon"),
    Unused(("optim.warmup_steps",), "optim.warmup_fraction", given, "optim.warmup_fraction=null removes that one"),
    Unused(("optim.decay_fraction", "optim.min_lr_fraction"), "optim.schedule", one_of("constant"), LEAVE),
    Unused(("train.steps",), "train.tokens", given, "train.tokens=null removes that budget"),
    Unused(("train.steps",), "train.tokens_per_param", given, "train.tokens_per_param=null removes that budget"),
    Unused(
        ("train.eval_task_data", "train.eval_task_limit"),
        "train.eval_tasks",
        one_of([], None),
        "add train.eval_tasks=[…]",
    ),
    Unused(all_but("wandb", WandbConfig, "mode"), "wandb.mode", one_of("disabled"), "add wandb.mode=online or offline"),
]


def unused(flat: dict[str, Any]) -> dict[str, Unused]:
    """The keys without effect in a configuration of keys with dots, each with the first reason."""
    return {key: rule for rule in reversed(UNUSED) if rule.when(flat.get(rule.decider)) for key in rule.keys}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 6}, "seed": 1} -> {"model.n_layer": 6, "seed": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}


def decides(key: str) -> bool:
    """Whether a key like "optim.lr" decides a run's result; a key without effect may do so as well."""
    section, _, name = key.rpartition(".")
    return name not in NOT_IDENTITY.get(section, ())


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide a run's result, {"section.key": value}, from a `Config` as plain containers.

    Keys without effect are left out, so that one run has one name.
    """
    flat = flatten(config)
    if flat.get("dispersion.schedule") == "linear":  # its name in older checkpoints
        flat["dispersion.schedule"] = "warmup"
    n_head, n_embd = flat.get("model.n_head"), flat.get("model.n_embd")
    if n_head and flat.get("model.n_kv_head") == n_head:  # what null means
        flat["model.n_kv_head"] = None
    if n_head and n_embd == n_head * (flat.get("model.head_dim") or 0):
        flat["model.head_dim"] = None
    left_out = unused(flat).keys() | {key for key, default in ADDED.items() if flat.get(key) == default}
    if {"dispersion.layers", "model.n_layer"} <= flat.keys():
        flat["dispersion.layers"] = name_layers(flat["dispersion.layers"], flat["model.n_layer"])
    return {key: value for key, value in flat.items() if decides(key) and key not in left_out}


def name_of(config: Config, model: str) -> str:
    """The run's name: readable, and made unique by a hash of its identity.

    `model` is the name of the model's config. Nulls are not hashed, so that a new optional key does not rename old
    runs.
    """
    hashed = {key: value for key, value in identity(dataclasses.asdict(config)).items() if value is not None}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:6]
    d = config.dispersion
    dispersion = f"{d.variant}{d.lambda_disp:g}" if d.lambda_disp > 0 else "off"
    return f"{model}-{config.data.name}-{dispersion}-s{config.seed}-{digest}"
