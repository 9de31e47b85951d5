"""Pre-train a GPT with a dispersion loss.

    python train.py                                                      # the default run
    python train.py model=gpt2 data=fineweb10B dispersion.lambda_disp=0.3
    python train.py -m model=nano,micro dispersion.lambda_disp=0,0.1     # a sweep
    torchrun --standalone --nproc_per_node=2 train.py                    # several GPUs

The same command again goes on where the run stopped. Everything random in step s is drawn
from (seed, s), so a run that was interrupted is the run that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanodisp import checkpoint, config, distributed, hf, optim
from nanodisp.condensation import mean_cosine, mean_cosine_by_layer
from nanodisp.config import Config, count_steps
from nanodisp.dispersion import DispersionLoss, lambda_at, sample_positions, select_layers
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.gpt import GPT, SoftTargets
from nanodisp.intervention import add_noise, forget, load_teacher, soft_targets
from nanodisp.loader import (
    Corpus,
    Loader,
    count_vocabulary,
    count_windows,
    open_corpus,
    prefetch,
    read_windows,
    spread_windows,
)
from nanodisp.metrics import Metrics
from nanodisp.multiple_choice import accuracy, read_questions
from nanodisp.prepare import prepare
from nanodisp.runs import conclude, restore, write_config
from nanodisp.signals import EXIT_CODE, StopSignals

CONDENSATION_WINDOWS = 4  # validation windows of a "condensation" record


class Objective(nn.Module):
    """The terms that are minimised, as one module: what torch.compile and DDP wrap.

    x, y int64 [B, T], positions int64 [len(layers), N] or None for no dispersion, a teacher's predictions or None
    -> cross-entropy, dispersion (mean over sequences and layers; 0 for none), divergence from the teacher's
    predictions (0 for none), scalars.
    """

    def __init__(self, model: GPT, dispersion: DispersionLoss, layers: list[int]) -> None:
        super().__init__()
        self.model, self.dispersion, self.layers = model, dispersion, layers

    def forward(
        self, x: Tensor, y: Tensor, positions: Tensor | None, taught: SoftTargets | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        take = (self.layers, positions) if positions is not None else None
        out = self.model(x, y, take=take, soft_targets=taught)
        dispersion, divergence = torch.zeros_like(out.loss), torch.zeros_like(out.loss)
        if positions is not None:
            dispersion = self.dispersion(out.hidden.flatten(0, 1))  # [layers, B, N, C] -> [layers * B, N, C]
        if taught is not None:
            divergence = out.divergence
        return out.loss, dispersion, divergence


def train(config: Config) -> None:
    """One run, from data to a sample."""
    world = distributed.start(config.device, config.train.timeout_minutes)
    device, batch_size = world.device, config.train.batch_size
    if device.type == "cpu":
        distributed.keep_memory()
    if batch_size % world.size != 0:
        raise UserError(f"train.batch_size={batch_size} is not divisible by the number of ranks, {world.size}")

    # --- data: rank 0 prepares it if need be, the others find it done
    if not world.is_main:
        world.barrier()
    corpus = open_corpus(prepare(config.data), config.data.tokenizer)
    if world.is_main:
        world.barrier()
    config.data.tokenizer = corpus.tokenizer
    config.model.vocab_size = config.model.vocab_size or count_vocabulary(corpus)
    config.optim.lr = config.optim.lr or optim.lr_for_width(config.model.n_embd)
    corpus.train.check_range(config.model.vocab_size)
    block_size, tokens_per_step = config.model.block_size, batch_size * config.model.block_size
    n_micro = count_micro_batches(batch_size // world.size, config.train.micro_batch_size)
    data = Loader(
        corpus.train, block_size=block_size, batch_size=batch_size, seed=config.seed, vocab_size=config.model.vocab_size
    )
    held_out = spread_windows(count_windows(corpus.val, block_size), config.train.eval_windows)
    followed = spread_windows(len(held_out), CONDENSATION_WINDOWS)  # of those, the few that are looked at often
    questions = read_questions(Path(config.train.eval_task), config.model.vocab_size) if config.train.eval_task else []

    # --- model, loss, optimizers
    dtype = distributed.matmul_dtype(config.train.dtype, device)
    config.train.dtype = str(dtype).removeprefix("torch.")
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")  # "high" allows TF32
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    if config.intervention.noise_alpha is not None:
        add_noise(model, config.intervention.noise_alpha)
    teacher = None  # beside the objective: it is neither trained, nor sharded, nor saved
    if config.intervention.teacher is not None:
        teacher = load_teacher(config.intervention.teacher, config.model, config.data.tokenizer).to(device)
    layers = select_layers(config.dispersion.layers, config.model.n_layer)
    dispersion_loss = DispersionLoss(config.dispersion.variant, config.dispersion.tau, config.dispersion.backend)
    objective: Any = Objective(model, dispersion_loss, layers)
    total_steps = count_steps(config.train, model.num_parameters(), tokens_per_step)
    if config.train.compile == "auto":
        flops = total_steps * tokens_per_step * model.flops_per_token()
        config.train.compile = distributed.compile_pays(device, flops / world.size)
    look: Callable[..., Tensor] = loss_and_cosines
    if config.train.compile:
        torch.compiler.reset()  # an earlier run of a sweep compiled other shapes
        objective.compile(dynamic=False)
        look = torch.compile(look, dynamic=False)
        if teacher is not None:
            teacher.compile(dynamic=False)
    if config.train.activation_checkpointing:
        for block in model.h:
            distributed.recompute(block, bool(config.train.compile))
    if world.size > 1 and config.train.parallel == "fsdp":
        distributed.shard(model, model.h, world)
    elif world.size > 1:
        objective = DistributedDataParallel(objective)
    optimizers = optim.build_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def accumulate(step: int, x: Tensor, y: Tensor) -> Tensor:
        """Forward and backward, in micro-batches; returns the terms (see `Objective`) of this rank's rows, [3]."""
        lambda_disp, positions = lambda_at(config.dispersion, step, total_steps), None
        hard, soft = config.intervention.loss_weights()
        if config.dispersion.lambda_disp > 0:
            positions = sample_positions(config.seed, step, layers, block_size, config.dispersion.max_tokens)
            positions = positions.to(device, non_blocking=True)
        torch.manual_seed(seed_for(config.seed, step, world.rank))  # dropout's and noise's
        terms = torch.zeros(3, device=device)
        for i, (x_i, y_i) in enumerate(zip(x.chunk(n_micro), y.chunk(n_micro), strict=True)):
            silent = world.size > 1 and i < n_micro - 1  # ranks share their gradients with the last micro-batch
            with distributed.no_sync(objective) if silent else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    taught = soft_targets(teacher, x_i, config.intervention) if teacher is not None else None
                    ce, dispersion, divergence = objective(x_i, y_i, positions, taught)
                loss = hard * ce + lambda_disp * dispersion + soft * divergence
                scaler.scale(loss / n_micro).backward()
            terms += torch.stack([ce.detach(), dispersion.detach(), divergence.detach()]) / n_micro
        return terms

    if config.dry_run:
        if config.init_from is not None:
            hf.initial_weights(config.init_from, config.model, config.data.tokenizer)  # whether there are such
        x, y = next(prefetch(data, range(1), device, world.rank, world.size))
        for _ in range(2):  # the first one warms up
            step_began = time.perf_counter()
            accumulate(0, x, y)[0].item()  # waits for the device
        duration = datetime.timedelta(seconds=round(total_steps * (time.perf_counter() - step_began)))
        if world.is_main:
            tokens = total_steps * tokens_per_step
            size = f"{model.num_parameters():,} parameters, {total_steps:,} steps, {tokens:,} tokens"
            print(f"{config.run_name}: {size}, about {duration} without evaluation")
        return

    # --- the run so far
    folder = Path(config.out_dir) / str(config.run_name)
    step, run_began = 0, time.perf_counter()
    bad_steps, bad_in_a_row = torch.zeros(2, dtype=torch.int64, device=device)  # updates that were left out
    saver = checkpoint.Saver(folder / "checkpoints", config.train.keep_last, config.train.keep_every)

    def tally() -> dict[str, float]:
        return {"tokens": step * tokens_per_step, "seconds": round(time.perf_counter() - run_began, 3)}

    def validate() -> float:
        rows = batch_size // world.size // n_micro
        figures = evaluate(model, look, corpus, held_out, rows, world, dtype)
        metrics.record({"step": step, "split": "val", **figures, **tally()})
        if questions:
            metrics.record({"step": step, "split": "task", **accuracy(model, questions, world, dtype), **tally()})
        return figures["loss"]

    def follow() -> None:
        """Condensation alone, on a few windows: so cheap that its course can be followed closely."""
        x, _ = read_windows(corpus.val, held_out[followed], block_size, model.vocab_size)
        model.eval()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            cosines = mean_cosine_by_layer(model, x.to(device))  # on every rank: FSDP needs them all
        model.train()
        metrics.record({"step": step, "split": "condensation", "mean_cosine": cosines, **tally()})

    def save(val_loss: float | None) -> None:
        # weights first: state_dict shards again what an evaluation has put together, as the optimizers know it
        weights = distributed.gather(model.state_dict(), world)
        tensors = distributed.gather(optim.state_tensors(model, optimizers), world)
        if world.is_main:
            state = {
                **{"step": step, **tally(), "val_loss": val_loss},
                **{"bad_steps": int(bad_steps), "bad_in_a_row": int(bad_in_a_row)},
                **{"scaler": scaler.state_dict(), "config": dataclasses.asdict(config), "corpus": corpus.folder.name},
            }
            metrics.flush()
            saver.save(weights, tensors, state)

    with StopSignals() as stop, Metrics(folder if world.is_main else None) as metrics, saver, world:
        saved = restore(folder, config, corpus, world, model, optimizers, scaler)
        if saved:
            step = saved["step"]
            bad_steps, bad_in_a_row = torch.tensor([saved["bad_steps"], saved["bad_in_a_row"]], device=device)
            run_began -= saved["seconds"]
        if world.is_main and step < total_steps:
            write_config(folder, config, corpus)
        metrics.begin(
            config=dataclasses.asdict(config),
            wandb_config=config.wandb,
            tensorboard=config.tensorboard,
            step=step if saved else -1,
            total_steps=total_steps,
        )
        metrics.say(
            f"{folder}: {model.num_parameters():,} parameters, {total_steps} steps of {tokens_per_step:,} tokens, "
            f"{world.size} x {device.type} in {str(dtype).removeprefix('torch.')}"
        )
        if saved:
            metrics.say(f"the run is complete at step {step}" if step >= total_steps else f"going on from step {step}")
        else:
            validate()
            if config.train.condensation_interval is not None:
                follow()

        batches = prefetch(data, range(step, total_steps), device, world.rank, world.size)
        lap_seconds, lap_steps = 0.0, 0  # since the last line of training figures
        while step < total_steps:
            step_began = time.perf_counter()
            if config.intervention.forgets_at(step):  # what was saved and validated remembers
                forget(model, optimizers, seed_for(config.seed, step, 0, 1))  # no rank's dropout has this seed
            x, y = next(batches)
            terms = accumulate(step, x, y)

            # --- clip, update
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = optim.clip_gradients(model, config.optim.grad_clip)
            optim.set_lr(optimizers, optim.lr_scale(config.optim, step, total_steps))
            bad = ~grad_norm.isfinite()  # a tensor, the same on all ranks: no step waits for the device to tell
            optim.update(optimizers, scaler, leave_out=bad)
            if scaler.is_enabled() and scaler.get_scale() > 1:
                bad = torch.zeros_like(bad)  # float16's overflow is normal: the scaler scales less from now on
            bad_steps += bad
            bad_in_a_row = (bad_in_a_row + 1) * bad
            scaler.update()
            step += 1

            # --- figures, validation, checkpoint
            done = step == total_steps
            log = done or step == 1 or step % config.train.log_interval == 0
            evaluation = done or step % config.train.eval_interval == 0
            following = config.train.condensation_interval
            if (log or device.type == "cpu") and bad_in_a_row >= config.train.max_bad_steps:  # a GPU would have to wait
                raise UserError(
                    f"the gradient is not finite at step {step}, {int(bad_in_a_row)} times in a row "
                    f"(train.max_bad_steps), first in {optim.first_not_finite(model, x)}; {saver.last()}; "
                    "a lower optim.lr or optim.grad_clip may help"
                )
            for optimizer in optimizers:
                optimizer.zero_grad()
            if log:
                ce_mean, dispersion_mean, divergence_mean = (world.sum(terms) / world.size).tolist()
            if device.type == "cuda" and (log or evaluation):
                torch.cuda.synchronize()
            lap_seconds, lap_steps = lap_seconds + time.perf_counter() - step_began, lap_steps + 1
            if log:
                tokens_per_second = lap_steps * tokens_per_step / lap_seconds
                lap_seconds, lap_steps = 0.0, 0
                peak = distributed.peak_flops(device, dtype)
                metrics.record(
                    {
                        "step": step,
                        "split": "train",
                        "loss": ce_mean,
                        "dispersion": dispersion_mean if config.dispersion.lambda_disp > 0 else None,
                        **({"distillation": divergence_mean} if teacher is not None else {}),
                        "lambda_disp": lambda_at(config.dispersion, step - 1, total_steps),
                        "lr": optimizers[0].param_groups[0]["lr"],
                        "grad_norm": grad_norm.item(),
                        "bad_steps": int(bad_steps),
                        "tokens_per_second": tokens_per_second,
                        "mfu": tokens_per_second * model.flops_per_token() / (peak * world.size) if peak else None,
                        **tally(),
                    }
                )
            val_loss = validate() if evaluation else None
            if following is not None and (done or step % following == 0):
                follow()
            stopping = world.any(stop.received is not None) and not done
            if done or stopping or step % config.train.checkpoint_interval == 0:
                save(val_loss)
            metrics.advance(step)
            if stopping:
                saver.wait()
                world.barrier()  # until rank 0 has written: torchrun ends them all when one leaves
                metrics.say(f"{stop.received or 'another rank stops'}: saved at step {step}; the same command goes on")
                raise SystemExit(EXIT_CODE)

        saver.wait()
        if config.train.sample_tokens > 0:
            distributed.unshard(model)  # rank 0 writes the sample alone
        conclude(folder, model, corpus, config, metrics)
        if world.any(stop.received is not None):  # too late for this run: a sweep ends here
            raise SystemExit(EXIT_CODE)


def loss_and_cosines(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, then the mean cosine of every hidden state: [L + 2]."""
    out = model(x, y, return_hidden=True)
    assert out.hidden is not None
    return torch.stack([out.loss, *map(mean_cosine, out.hidden)])


@torch.no_grad()
def evaluate(
    model: GPT,
    look: Callable[..., Tensor],
    corpus: Corpus,
    windows: np.ndarray,
    rows: int,
    world: World,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `look` sees on validation windows, `rows` at a time, shared among ranks: loss, bits per byte, cosines."""
    model.eval()
    n_hidden = model.config.n_layer + 1
    sums = torch.zeros(1 + n_hidden, dtype=torch.float64, device=world.device)  # loss, then every layer's cosine
    mine = windows[world.rank :: world.size]
    for start in range(0, math.ceil(len(windows) / world.size), rows):
        chunk = mine[start : start + rows]  # empty on some ranks at the end, but FSDP needs them all at every call
        x, y = read_windows(corpus.val, chunk if len(chunk) else windows[:1], model.config.block_size, model.vocab_size)
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            figures = look(model, x.to(world.device), y.to(world.device))
        sums += len(chunk) * figures.double()
    model.train()
    loss, *cosines = (world.sum(sums) / len(windows)).tolist()
    bpb = loss / math.log(2) / corpus.bytes_per_token if corpus.bytes_per_token else None
    return {"loss": loss, "bpb": bpb, "mean_cosine": cosines}


def count_micro_batches(rows: int, largest: int | None) -> int:
    """The fewest equal parts of `rows` sequences that hold `largest` each at most."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (largest is None or rows // n <= largest))


def seed_for(*key: int) -> int:
    """One seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    try:
        config.main(train)
    finally:
        distributed.stop()
