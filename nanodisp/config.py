"""The whole configuration: the parts' dataclasses put together, and their way through Hydra.

Values live in `conf/`, types and checks in the dataclasses. An unknown key, a wrong type or
an impossible value ends the program with one line before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanodisp import arguments
from nanodisp.dispersion import DispersionConfig, select_layers
from nanodisp.distributed import PARALLEL
from nanodisp.errors import UserError
from nanodisp.gpt import GPTConfig
from nanodisp.intervention import InterventionConfig
from nanodisp.metrics import WandbConfig
from nanodisp.optim import OptimConfig
from nanodisp.prepare import DataConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE = ("auto", True, False)
RESUME = ("auto", "never")


@dataclass
class TrainConfig:
    """The course of a run.

    steps: updates; or, given in place of it,
    tokens: tokens of training in all, or
    tokens_per_param: tokens as a multiple of the model's parameters.
    batch_size: sequences of the global batch, over all ranks and micro-batches.
    micro_batch_size: most sequences of one forward pass on a rank; null takes all at once.
    dtype: "bfloat16" or "float16" run matrix products in it (autocast; weights stay float32,
        float16 scales the loss); "auto" is bfloat16 on a GPU or CPU that has it, else float32.
    compile: torch.compile the model and the loss; needs a compiler on the machine. "auto" does it where the run is so
        long that it pays.
    parallel: how torchrun's ranks share the work: "ddp" keeps the whole model on each, "fsdp" a share
        of its weights, gradients and optimizer state. One process alone is the same under both.
    activation_checkpointing: go through each block once more in backward in place of keeping what is inside it:
        less memory, for one more forward pass.
    timeout_minutes: how long ranks wait for one that hangs, or for rank 0 to prepare the data, before they fail.
    log_interval, eval_interval, checkpoint_interval: in steps.
    condensation_interval: how often, in steps, the mean cosine of every layer is measured on four validation
        windows, between validations; null for never.
    eval_windows: validation windows, spread evenly over the split; null takes all.
    eval_task: a file of multiple-choice questions (data/hellaswag/prepare.py makes one), answered at every
        validation; null for none.
    keep_last: how many checkpoints stay, beside the one with the lowest validation loss.
    keep_every: those of every so many steps stay too; null for none.
    max_bad_steps: an update whose gradient is not finite is left out; so many in a row end the run (on a GPU when
        the next figures are logged: looking at each step would keep it waiting).
    sample_tokens: length of the sample at the end; 0 for none.
    """

    steps: int | None = None
    tokens: int | None = None
    tokens_per_param: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    dtype: str = "auto"
    compile: bool | str = "auto"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    timeout_minutes: float = 30.0
    log_interval: int = 20
    eval_interval: int = 200
    condensation_interval: int | None = 50
    checkpoint_interval: int = 500
    eval_windows: int | None = 128
    eval_task: str | None = None
    keep_last: int = 2
    keep_every: int | None = None
    max_bad_steps: int = 10
    sample_tokens: int = 256

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens_per_param is not None:
            raise ValueError("train.tokens and train.tokens_per_param are both given: keep one as the budget")
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
        for name in (
            "steps",
            "tokens",
            "tokens_per_param",
            "micro_batch_size",
            "eval_windows",
            "condensation_interval",
            "keep_every",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name}={getattr(self, name)} must be positive, or null")


def count_steps(config: TrainConfig, n_parameters: int, tokens_per_step: int) -> int:
    """The budget in steps; a budget in tokens is met, so the last step may go beyond it."""
    if config.tokens is not None:
        return math.ceil(config.tokens / tokens_per_step)
    if config.tokens_per_param is not None:
        return math.ceil(config.tokens_per_param * n_parameters / tokens_per_step)
    assert config.steps is not None
    return config.steps


@dataclass
class Config:
    """A run.

    run_name: null makes it from the configuration.
    init_from: begin with the weights of a run (its folder, or one of its checkpoints) or of a Hugging Face GPT-2
        (hf:<folder or id>), whose shape must be that of `model`; the context may be shorter. null begins anew.
    resume: "auto" goes on with a run of the same name, "never" refuses its folder.
    tensorboard: write the figures for TensorBoard too, into the run's folder.
    dry_run: tell the run's size and about how long it will take, and train nothing (data is prepared if need be).
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dispersion: DispersionConfig = field(default_factory=DispersionConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    init_from: str | None = None
    seed: int = 1337
    device: str = "auto"
    resume: str = "auto"
    out_dir: str = "out"
    dry_run: bool = False
    run_name: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2**63 - 1")
        if self.resume not in RESUME:
            raise ValueError(f"resume={self.resume} is unknown; choose one of {', '.join(RESUME)}")
        select_layers(self.dispersion.layers, self.model.n_layer)
        if self.dispersion.lambda_disp > 0 and self.model.block_size < 2:
            raise ValueError(
                f"model.block_size={self.model.block_size}: dispersion needs pairs of tokens, so 2 at least"
            )
        if self.run_name is not None and not re.fullmatch(r"\w[\w.,=+-]*", self.run_name):
            raise ValueError(
                f"run_name={self.run_name!r} may hold letters, digits and . , = + - _ and begins with one of the first"
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

# What may change between two calls without making it another run.
NOT_IDENTITY = {
    "": ("device", "resume", "out_dir", "run_name", "dry_run", "tensorboard"),
    "data": ("folder",),
    "dispersion": ("backend",),
    "train": (
        *("compile", "micro_batch_size", "log_interval", "eval_interval", "checkpoint_interval"),
        *("condensation_interval", "keep_last", "keep_every", "max_bad_steps", "sample_tokens"),
        *("parallel", "activation_checkpointing", "timeout_minutes", "eval_task"),
    ),
}
BUDGET = ("train.steps", "train.tokens", "train.tokens_per_param")  # may grow when a run goes on


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the result of a run: {"section.key": value}, of a `Config` as plain containers."""
    flat = {
        f"{section}.{key}" if isinstance(part, dict) else section: value
        for section, part in config.items()
        for key, value in (part.items() if isinstance(part, dict) else [("", part)])
    }
    left_out = {f"{section}.{key}" if section else key for section, keys in NOT_IDENTITY.items() for key in keys}
    return {key: value for key, value in flat.items() if key not in left_out and not key.startswith("wandb.")}


def name_of(config: Config, model: str) -> str:
    """The run's name: readable, and told apart from other runs by a hash of what decides its result.

    `model` is the name of the model's config. What is null, not given, has no part in it, so that a new key
    of that kind leaves the names of older runs as they are.
    """
    decides = {key: value for key, value in identity(dataclasses.asdict(config)).items() if value is not None}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:6]
    d = config.dispersion
    dispersion = f"{d.variant}{d.lambda_disp:g}" if d.lambda_disp > 0 else "off"
    return f"{model}-{config.data.name}-{dispersion}-s{config.seed}-{digest}"


def main(task: Callable[[Config], None]) -> None:
    """Run `task` with each configuration that Hydra composes from `conf/` and the command line.

    A user's mistake becomes one line on stderr and exit code 2; a bug of ours shows a traceback. In a sweep
    neither keeps the other jobs from running, and all that failed is told once more at the end.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to the lines below, not to Hydra's printer
    ConfigStore.instance().store(name="schema", node=Config)
    failures: list[str] = []
    main_process = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def entry(composed: DictConfig) -> None:
        try:
            config = check(composed)
            if config.run_name is None:
                config.run_name = name_of(config, HydraConfig.get().runtime.choices["model"])
            task(config)
        except Exception as error:
            hydra_config, mistake = HydraConfig.get(), isinstance(error, UserError)
            in_sweep, ranks = hydra_config.mode == RunMode.MULTIRUN, int(os.environ.get("WORLD_SIZE", 1))
            if not mistake and not in_sweep:
                raise
            line = str(error) if mistake else f"{type(error).__name__}: {error}"
            failures.append(f"{' '.join(hydra_config.overrides.task)}: {line}" if in_sweep else line)
            if not mistake:
                traceback.print_exc()
            if ranks > 1:  # the others may not know: torchrun must end them
                sys.exit(arguments.fail(UserError(failures[-1])))
            if os.getpid() != main_process:  # another launcher's worker: Hydra tells the main process of the first one
                arguments.fail(UserError(failures[-1]))
                raise UserError(failures[-1]) from error

    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(explain(error))
    except UserError as error:
        failures.append(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a checkpoint that is being written is not waited for
    for failure in failures:
        arguments.fail(UserError(failure))
    if failures:
        sys.exit(2)


def check(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, every check of theirs passed; else UserError."""
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    for name, schema in {"": Config, **SECTIONS}.items():  # OmegaConf lets +key=value through
        known = [f.name for f in dataclasses.fields(schema)]
        given: Any = composed[name] if name else composed
        if unknown := [f"{name}.{key}".lstrip(".") for key in given if key not in known]:
            raise UserError(f"unknown key {unknown[0]}; known are {', '.join(known)}")
    return config


def explain(error: BaseException) -> str:
    """One line from Hydra's or OmegaConf's several, with the keys there are if one is unknown."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    line = " ".join(" ".join(str(cause).split()) for cause in causes)
    for noise in (
        r"To append to your config use \S+ ?",
        r"Config search path: .*",
        r"\b(full_key|\w+_type)[:=] ?\S+ ?",
    ):
        line = re.sub(noise, "", line)
    if unknown := re.search(r"Key '\w+' (?:is )?not in '?(\w+)", line):
        schema = next((schema for schema in SECTIONS.values() if schema.__name__ == unknown[1]), Config)
        line = line.rstrip() + f"; known are {', '.join(f.name for f in dataclasses.fields(schema))}"
    return line.strip()
