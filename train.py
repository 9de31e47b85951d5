"""Pre-train a GPT with a dispersion loss.

    python train.py                                                      # the default run
    python train.py model=gpt2 data=fineweb10B dispersion.lambda_disp=0.3
    python train.py -m model=nano,micro dispersion.lambda_disp=0,0.1     # a sweep
    torchrun --standalone --nproc_per_node=2 train.py                    # several GPUs

If interrupted, the same command resumes from the last checkpoint, on a CPU bit for bit: everything random in step s is
drawn from (seed, s, rank), so a checkpoint needs no random state.
"""

from __future__ import annotations

from nanodisp.process import garbage_collected_by_hand  # first: for what is loaded after it

# isort: split
import datetime
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodisp import launch
from nanodisp.config import Config
from nanodisp.data.batches import Batches, prefetch
from nanodisp.data.corpus import Corpus, open_for
from nanodisp.data.questions import read_questions
from nanodisp.dispersion.placement import lambda_at
from nanodisp.distributed import World, group_of_ranks, hardware, layout, start
from nanodisp.errors import UserError
from nanodisp.evaluate.during_training import Benchmarks, check_benchmarks
from nanodisp.hf.open import initial_weights, open_teacher
from nanodisp.models.gpt import GPT
from nanodisp.plan import Plan, check_device, resolve
from nanodisp.runs.folder import Run, TrainState, steps_done
from nanodisp.training import interventions, optim
from nanodisp.training.objective import Objective, add_up
from nanodisp.training.validation import Validation

FORGETTING = (0, 1)  # the key of its seeds: two numbers, since a rank's has one


def train(config: Config) -> float | None:
    """One run, from data to a sample; of a dry run, the seconds that it would take."""
    # --- ranks, data, and the plan: every choice that the configuration leaves open, made once
    # `start`, not `distributed.start`: for jobs in parallel, cloudpickle would look for torch.distributed.config
    world = start(config.device, config.train.timeout_minutes)
    world.share("train.batch_size", config.train.batch_size)  # a mistake is reported before the data is prepared
    check_device(config, world.device)
    check_benchmarks(config.train)
    corpus = open_for(config.data, world)
    plan = resolve(config, corpus, world)
    config, device = plan.config, plan.device
    batches = Batches(
        corpus.train,
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        vocab_size=plan.vocab_size,
        masked=not config.model.causal,
    )
    task = config.train.eval_task
    validation = Validation(
        corpus,
        world,
        block_size=config.model.block_size,
        n_windows=config.train.eval_windows,
        rows=plan.rows,
        autocast=plan.autocast,
        compiled=plan.compiled,
        questions=read_questions(Path(task), plan.vocab_size) if task is not None else (),
        benchmarks=Benchmarks(config, world, plan.autocast) if config.train.eval_tasks else None,
    )

    # --- model, loss, optimizers
    hardware.prepare(device, plan.dtype)
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    interventions.apply(model, config.intervention)
    teacher = open_teacher(config, device)
    objective = Objective(
        model, config.dispersion, config.intervention, seed=config.seed, total_steps=plan.total_steps, teacher=teacher
    )
    objective.place(
        world,
        parallel=config.train.parallel,
        compiled=plan.compiled,
        recomputed=config.train.activation_checkpointing,
    )
    optimizers = optim.build_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.dtype == torch.float16)
    if config.dry_run:
        return estimate(objective, scaler, batches, plan, corpus, world)

    # --- the run so far: from a checkpoint, or new
    with garbage_collected_by_hand(), Run(plan, corpus, world) as run:
        resumed = run.resume(model, optimizers, scaler)
        if resumed is None and config.init_from is not None:
            model.load_state_dict(layout.scatter(initial_weights(config), model))
        state = run.begin(resumed)
        if resumed is None:
            validate(validation, model, run, state)

        lap_seconds, lap_steps = 0.0, 0  # since the last record of training figures
        began = time.perf_counter()
        for x, y in prefetch(batches, range(state.step, plan.total_steps), device, world.rank, world.size):
            # --- one step
            step = state.step
            interventions.before_step(model, optimizers, config.intervention, step, plan.seed_for(step, *FORGETTING))
            optim.set_lr(optimizers, config.optim, step, plan.total_steps)
            terms = forward_backward(objective, scaler, plan, world, step, x, y)
            grad_norm = optim.clip_gradients(model, optimizers, scaler, config.optim.grad_clip)
            state.count(optim.update(optimizers, scaler, grad_norm))
            logs = plan.logs_at(state.step)
            if (logs or device.type == "cpu") and state.bad_in_a_row >= config.train.max_bad_steps:  # a GPU would wait
                raise diverged(model, x, run, state)
            for optimizer in optimizers:
                optimizer.zero_grad()

            # --- figures, validation, checkpoint
            means = mean_over_ranks(terms, world) if logs else {}
            if device.type == "cuda" and (logs or plan.pauses_at(state.step)):
                torch.cuda.synchronize()
            lap_seconds, lap_steps = lap_seconds + time.perf_counter() - began, lap_steps + 1
            if logs:
                tokens_per_second = lap_steps * plan.tokens_per_step / lap_seconds
                lap_seconds, lap_steps = 0.0, 0
                figures: dict[str, Any] = {
                    "lambda_disp": lambda_at(config.dispersion, step, plan.total_steps),
                    "lr": optimizers[0].param_groups[0]["lr"],
                    "grad_norm": grad_norm.item(),
                    "bad_steps": int(state.bad_steps),
                    "tokens_per_second": tokens_per_second,
                    "mfu": plan.mfu(tokens_per_second / world.size),
                }
                run.record("train", state, means | figures)
            validate(validation, model, run, state)
            stopping = run.is_asked_to_stop() and not plan.is_done(state.step)
            if stopping or plan.saves_at(state.step):
                run.save(state, model, optimizers, scaler)
            run.metrics.advance(state.step)
            began = time.perf_counter()  # waiting for data is time of training; what came just before is not
            if stopping:
                run.leave(state)
        run.conclude(model)
    return None


def forward_backward(
    objective: Objective,
    scaler: torch.amp.GradScaler,
    plan: Plan,
    world: World,
    step: int,
    x: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """Accumulate the gradients of a step in micro-batches; return the mean of each loss term over this rank's rows."""
    objective.begin(step)
    torch.manual_seed(plan.seed_for(step, world.rank))  # of dropout and noise
    terms: dict[str, Tensor] = {}
    for i, (x_i, y_i) in enumerate(zip(x.chunk(plan.n_micro), y.chunk(plan.n_micro), strict=True)):
        with layout.sync_if(objective.terms, last=i == plan.n_micro - 1):
            with plan.autocast():
                loss, parts = objective(x_i, y_i)
            scaler.scale(loss / plan.n_micro).backward()
        add_up(terms, parts, plan.n_micro)
    return terms


def validate(validation: Validation, model: GPT, run: Run, state: TrainState) -> None:
    """Record whatever is due after `state.step` updates: held-out loss, benchmarks, the layers' figures, a snapshot."""
    if run.plan.validates_at(state.step):
        held_out = validation(model)
        state.val_loss = held_out[model.config.loss_name]
        run.record("val", state, held_out)
        gc.collect()
        if validation.questions or validation.benchmarks:
            run.record("task", state, validation.answer(model))
    if run.plan.measures_layers_at(state.step):
        run.record("condensation", state, validation.layer_figures(model))
    if run.plan.snapshots_at(state.step):
        run.save_snapshot(state, *validation.snapshot(model))


def diverged(model: GPT, x: Tensor, run: Run, state: TrainState) -> UserError:
    """The error that ends a run whose gradient is not finite `train.max_bad_steps` times in a row."""
    return UserError(
        f"the gradient is not finite at step {state.step}, {int(state.bad_in_a_row)} times in a row "
        f"(train.max_bad_steps), first in {optim.first_not_finite(model, x)}; {run.saver.last()}; "
        "a lower optim.lr or optim.grad_clip may help"
    )


def mean_over_ranks(terms: dict[str, Tensor], world: World) -> dict[str, float]:
    means = world.sum(torch.stack(list(terms.values()))) / world.size
    return dict(zip(terms, means.tolist(), strict=True))


def estimate(
    objective: Objective, scaler: torch.amp.GradScaler, batches: Batches, plan: Plan, corpus: Corpus, world: World
) -> float:
    """Print a run's size and approximate duration; return its seconds. Raises UserError where the run would.

    It times the second of two steps (without an update) and multiplies by the steps that are left.
    """
    if plan.config.init_from is not None:
        initial_weights(plan.config)  # raises where a run would
    done = 0
    with world.together():
        if world.is_main:
            done = steps_done(plan, corpus)
    done = int(world.sum(torch.tensor(done, device=world.device)))
    seconds = 0.0
    if not plan.is_done(done):
        x, y = next(prefetch(batches, range(1), plan.device, world.rank, world.size))
        for _ in range(2):
            began = time.perf_counter()
            terms = forward_backward(objective, scaler, plan, world, 0, x, y)
            terms[plan.config.model.loss_name].item()  # waits for the device
        seconds = (plan.total_steps - done) * (time.perf_counter() - began)
    if world.is_main:
        tokens = plan.total_steps * plan.tokens_per_step
        size = f"{plan.n_parameters:,} parameters, {plan.total_steps:,} steps, {tokens:,} tokens"
        duration = f"about {datetime.timedelta(seconds=round(seconds))} without evaluation"
        left = f"{duration} from step {done}" if done else duration
        print(f"{plan.config.run_name}: {size}, {left if seconds else 'done already'}", flush=True)
    return seconds


if __name__ == "__main__":
    with group_of_ranks():
        launch.main(train)
