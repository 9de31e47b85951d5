"""The plan of a run: its configuration with every open choice made once, and the numbers that follow from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import socket
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp.config import CONFIG, DTYPES, Config, count_steps, flatten
from nanodisp.data.corpus import Corpus, count_vocabulary
from nanodisp.dispersion import kernels
from nanodisp.distributed import hardware
from nanodisp.distributed.world import World
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training.optim import with_rates

# Keys whose values are a host's own where no disk is shared, or that rank 0 alone heeds.
OF_A_HOST = ("out_dir", "run_name", "command", "device", "tensorboard", "data.path", "data.folder", "data.tokenizer")
PATHS = ("init_from", "intervention.teacher", "train.eval_task", "train.eval_task_data")  # given on all ranks or none


@dataclass(frozen=True)
class Plan:
    """What a run does, decided before its first step.

    config: the configuration with vocabulary size, learning rate, tokenizer, dtype and compile resolved, as config.yaml
        and checkpoints keep it.
    device, dtype: where training runs, and the dtype of its matrix products.
    n_parameters: of the model, without the vocabulary's padding.
    flops_per_token: of a training step, forward and backward.
    tokens_per_step: of the global batch.
    total_steps: of the run.
    n_micro: micro-batches of a step, on each rank.
    rows: sequences of a micro-batch.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    n_parameters: int
    flops_per_token: int
    tokens_per_step: int
    total_steps: int
    n_micro: int
    rows: int

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def vocab_size(self) -> int:
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    @property
    def compiled(self) -> bool:
        """Whether model, loss and validation go through torch.compile."""
        return self.config.train.compile is True

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation of one rank at its own rate; None where the device's peak is unknown."""
        peak = hardware.peak_flops(self.device, self.dtype)
        return tokens_per_second * self.flops_per_token / peak if peak else None

    def seed_for(self, step: int, *key: int) -> int:
        """A seed derived from the run's seed, the step and `key` (a rank, …)."""
        sequence = np.random.SeedSequence((self.config.seed, step, *key))
        return int(sequence.generate_state(1, np.uint64)[0])

    def is_done(self, step: int) -> bool:
        return step >= self.total_steps

    def logs_at(self, step: int) -> bool:
        """Whether training figures are recorded after `step` updates."""
        return self.is_done(step) or step == 1 or step % self.config.train.log_interval == 0

    def validates_at(self, step: int) -> bool:
        return self.is_done(step) or step % self.config.train.eval_interval == 0

    def measures_layers_at(self, step: int) -> bool:
        """Whether the layers' figures on a few windows are recorded after `step` updates."""
        interval = self.config.train.condensation_interval
        return interval is not None and (self.is_done(step) or step % interval == 0)

    def snapshots_at(self, step: int) -> bool:
        """Whether a snapshot is taken after `step` updates.

        Also at powers of two below the interval: embeddings condense within the first few per cent of a run.
        """
        interval = self.config.train.snapshot_interval
        if interval is None:
            return False
        return self.is_done(step) or step % interval == 0 or (step < interval and step & (step - 1) == 0)

    def saves_at(self, step: int) -> bool:
        return self.is_done(step) or step % self.config.train.checkpoint_interval == 0

    def pauses_at(self, step: int) -> bool:
        """Whether after `step` updates training waits for something that is not counted as its time."""
        due = (self.validates_at, self.measures_layers_at, self.snapshots_at, self.saves_at)
        return any(is_due(step) for is_due in due)


def check_device(config: Config, device: torch.device) -> None:
    """Raises UserError for a dispersion.backend that cannot be used on this device."""
    d = config.dispersion
    if d.lambda_disp > 0 and d.backend not in ("auto", "reference"):
        try:
            kernels.require(d.backend, d.variant, d.tau, d.clamp, torch.empty(1, 2, 1, device=device))
        except ValueError as error:
            raise UserError(f"dispersion.{error}") from error


def resolve(config: Config, corpus: Corpus, world: World) -> Plan:
    """Decide what `config` leaves open, for this corpus, these ranks and this machine.

    Raises UserError for ranks that differ in their keys, a token outside the vocabulary, a batch that the ranks cannot
    share equally, or a key that asks for what never happens in so many steps.
    """
    check_same_on_all(config, world)
    vocab_size = config.model.vocab_size or count_vocabulary(corpus)
    corpus.train.check_range(vocab_size)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    n_parameters, flops_per_token = size_of(model)
    tokens_per_step = config.train.batch_size * model.block_size
    total_steps = count_steps(config.train, n_parameters, tokens_per_step)
    check_happens(config, total_steps)
    dtype = choose_dtype(config, world)
    compiled = config.train.compile
    if compiled == "auto":
        compiled = hardware.compile_pays(world.device, total_steps * tokens_per_step * flops_per_token / world.size)
    resolved = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, tokenizer=corpus.tokenizer),
        optim=with_rates(config.optim, model.n_embd),
        train=dataclasses.replace(config.train, dtype=str(dtype).removeprefix("torch."), compile=compiled),
    )
    rows_of_rank = world.share("train.batch_size", config.train.batch_size)
    n_micro = count_micro_batches(rows_of_rank, config.train.micro_batch_size)
    return Plan(
        config=resolved,
        device=world.device,
        dtype=dtype,
        n_parameters=n_parameters,
        flops_per_token=flops_per_token,
        tokens_per_step=tokens_per_step,
        total_steps=total_steps,
        n_micro=n_micro,
        rows=rows_of_rank // n_micro,
    )


def check_same_on_all(config: Config, world: World) -> None:
    """UserError on all ranks when one has other keys than rank 0: they would wait for each other in vain."""
    flat = flatten(dataclasses.asdict(config))
    own = {key: value for key, value in flat.items() if key not in OF_A_HOST and not key.startswith("wandb.")}
    own |= {key: "a path" for key in PATHS if own[key] is not None}
    own = {key: json.dumps(value) for key, value in own.items()}
    first = json.loads(world.send(json.dumps(own).encode(), source=0))
    differing = [key for key in {**first, **own} if first.get(key) != own.get(key)]
    odd = torch.zeros(world.size, device=world.device)
    odd[world.rank] = len(differing) > 0
    ranks = world.sum(odd).nonzero().flatten().tolist()
    with world.together():
        if ranks[:1] == [world.rank]:  # the first of them speaks
            several, names = len(ranks) > 1, ", ".join(map(str, ranks))
            raise UserError(
                f"rank{'s' * several} {names} differ{'s' * (not several)} from rank 0: on {socket.gethostname()} "
                + ", ".join(f"{key}={own.get(key)} (rank 0: {first.get(key)})" for key in differing)
                + "; give all ranks the same command (only paths may differ)"
            )


def check_happens(config: Config, total_steps: int) -> None:
    """UserError for embeddings that are never reset, and multiples of `keep_every` of which no checkpoint is saved."""
    forget, keep = config.intervention.forget_interval, config.train.keep_every
    if forget is not None and forget >= total_steps:
        raise UserError(
            f"intervention.forget_interval={forget} never resets the embeddings in a run of {total_steps} steps: "
            "give a shorter interval, or null"
        )
    interval = config.train.checkpoint_interval
    if keep is not None and keep <= total_steps < math.lcm(keep, interval) and total_steps % keep != 0:
        raise UserError(
            f"train.keep_every={keep} keeps nothing: of a run of {total_steps} steps, checkpoints are saved every "
            f"{interval} steps (train.checkpoint_interval), and none of these is a multiple of {keep}"
        )


def choose_dtype(config: Config, world: World) -> torch.dtype:
    """The dtype of matrix products, the same on all ranks: "auto" is what a run of this name began with, if any.

    Else rank 0 decides, see `hardware.matmul_dtype`: a run keeps its dtype on a machine that would choose another.
    """
    name, file = config.train.dtype, Path(config.out_dir) / str(config.run_name) / CONFIG
    if name != "auto":
        return hardware.matmul_dtype(name, world.device)
    if world.is_main:
        with contextlib.suppress(OSError, YAMLError, OmegaConfBaseException, AttributeError, ValueError):
            began = OmegaConf.load(file).train.dtype
            name = began if began in DTYPES else name
    candidates = [torch.float32, torch.bfloat16, torch.float16]
    chosen = candidates.index(hardware.matmul_dtype(name, world.device)) if world.is_main else 0
    return candidates[int(world.sum(torch.tensor(chosen, device=world.device)))]


def size_of(config: GPTConfig) -> tuple[int, int]:
    """Parameters and FLOPs per token of a model, without making its weights."""
    with torch.device("meta"):
        model = GPT(config)
    return model.num_parameters(), model.flops_per_token()


def count_micro_batches(rows: int, largest: int | None) -> int:
    """The fewest equal parts of `rows` sequences that hold at most `largest` each."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (largest is None or rows // n <= largest))
