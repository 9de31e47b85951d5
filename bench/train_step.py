"""Time of complete training steps: dispersion off, over 256 tokens and over all tokens of every layer; and nanoGPT's.

    python -m bench.train_step                                # all recipes
    python -m bench.train_step --recipe gpt2 --baseline <folder of a nanoGPT checkout>

`python -m bench.gpu` does this on a GPU. A step is forward, backward, clipping and AdamW on random tokens. Each kind of
step uses what `train.dtype=auto` and `train.compile=auto` choose on this machine, or --dtype and --compile. nanoGPT's
model and step come from its own files, as its train.py runs them on a CPU, and also under bfloat16 and torch.compile.
The kinds alternate; times are medians over the rounds, overhead is the median of each round's ratio to its step without
dispersion. MFU is relative to the matmul rate measured here in the same dtype. Memory is the peak of a kind's process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure
from bench.measure import Step
from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import sample_positions
from nanodisp.distributed import hardware
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training import optim
from nanodisp.training.optim import OptimConfig

LAMBDA = 0.1
DISPERSED = {"off": 0, "256 tokens": 256, "all tokens": None}
MATMUL_SIZE = 2048
BASELINES = ("nanoGPT", "nanoGPT bf16", "nanoGPT bf16 compiled")


@dataclass
class Recipe:
    """A model, its batch size in sequences, the steps of a complete run, and the number of timed rounds."""

    model: GPTConfig
    batch_size: int
    steps: int
    rounds: int
    nanogpt_vocab_size: int  # of the same recipe in nanoGPT


RECIPES = {
    # nanoGPT's published CPU recipe: a vocabulary of 65 characters there, of 256 bytes and end-of-text here
    "nanogpt_cpu": Recipe(GPTConfig(4, 4, 128, 64, vocab_size=257, bias=False), 12, 2_000, 200, 65),
    "micro": Recipe(GPTConfig(6, 6, 384, 256, vocab_size=257), 4, 10_000, 40, 257),
    "gpt2": Recipe(GPTConfig(12, 12, 768, 1024, vocab_size=50257), 2, 100_000, 7, 50304),
}


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--compile", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--batch-size", type=measure.positive, help="sequences")
    parser.add_argument("--rounds", type=measure.positive)
    parser.add_argument("--baseline", type=Path, help="folder of a nanoGPT checkout")
    arguments = parser.parse_args()
    if arguments.baseline and not (arguments.baseline / "model.py").is_file():
        parser.error(f"--baseline {arguments.baseline} holds no model.py: give the folder of a nanoGPT checkout")
    for name in [arguments.recipe] if arguments.recipe else RECIPES:
        bench(name, arguments)


def bench(name: str, arguments: argparse.Namespace) -> None:
    recipe, device = RECIPES[name], torch.device("cpu")
    dtype = hardware.matmul_dtype(arguments.dtype, device)
    with torch.device("meta"):
        model = GPT(recipe.model)
    flops = recipe.steps * recipe.batch_size * recipe.model.block_size * model.flops_per_token()
    compiled = hardware.compile_pays(device, flops) if arguments.compile == "auto" else arguments.compile == "true"
    how = (recipe, device, dtype, compiled, arguments.baseline)
    kinds = [*DISPERSED, *(BASELINES if arguments.baseline else ())]
    with worker() as pool:
        peak = pool.submit(matmul_rate, dtype).result()
    rows = arguments.batch_size or recipe.batch_size
    found = time_together(kinds, rows, arguments.rounds or recipe.rounds, how)

    report: dict[str, Any] = {**vars(arguments), "device": measure.device_name()}
    report |= {"recipe": name, "dtype": str(dtype), "compiled": compiled, "matmul_flops": peak, "steps": {}}
    precision = f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
    print(
        f"{report['device']}: {name}, {model.num_parameters() / 1e6:.1f}M parameters, {precision}; "
        f"matmul of {MATMUL_SIZE}^3 {peak / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':24}{'batch':>12}{'step, ms':>18}{'tokens/s':>12}{'MFU':>8}{'overhead':>10}{'peak MiB':>10}")
    for kind, it in found.items():
        figures: dict[str, Any] = {**measure.summary(it.times), "rows": rows, "peak_mib": it.peak_mib}
        figures["tokens_per_second"] = rows * recipe.model.block_size / figures["median_ms"] * 1e3
        figures["overhead"] = measure.overhead(it.times, found["off"].times)
        ours = kind in DISPERSED
        figures["mfu"] = figures["tokens_per_second"] * model.flops_per_token() / peak if ours else None
        report["steps"][kind] = figures
        print(
            f"{kind:24}{rows:>5} x {recipe.model.block_size:4}{measure.show(figures):>18}"
            f"{figures['tokens_per_second']:12,.0f}{format(figures['mfu'], '8.1%') if ours else ' ' * 8}"
            f"{figures['overhead']:+10.1%}{it.peak_mib:10,.0f}"
        )
    for kind in kinds[len(DISPERSED) :]:
        ratio = 1 + report["steps"][kind]["overhead"]
        print(f"dispersion off against {kind}: {ratio:.2f} times as fast")
    report["operators"] = dict(list(found["256 tokens"].operators.items())[:10])
    print("time of a step with dispersion over 256 tokens, by operator:")
    for operator, share in report["operators"].items():
        print(f"  {share:6.1%} {operator}")
    measure.write(f"train-step-{name}-{precision.replace(', ', '-')}", report)


@dataclass
class Timed:
    """One kind of step: milliseconds, memory, time by operator."""

    times: list[float]
    peak_mib: float
    operators: dict[str, float]


def time_together(kinds: list[str], rows: int, rounds: int, how: tuple[Any, ...]) -> dict[str, Timed]:
    """Time steps in alternation, each in its own process because they configure memory allocation differently."""
    with contextlib.ExitStack() as stack:
        workers = {kind: stack.enter_context(worker()) for kind in kinds}
        for kind, pool in workers.items():
            pool.submit(prepare, kind, rows, *how).result()
        steps: dict[str, Step] = {kind: partial(remote, pool, time_of_step) for kind, pool in workers.items()}
        times = measure.alternate(steps, lambda step: step(), rounds, warmup=3)
        peaks = {kind: remote(pool, peak_mib) for kind, pool in workers.items()}
        operators = {kind: remote(workers[kind], time_by_operator) for kind in kinds if kind == "256 tokens"}
    return {kind: Timed(times[kind], peaks[kind], operators.get(kind, {})) for kind in kinds}


# --- in the workers ----------------------------------------------------------------------------

STEPS: list[Step] = []  # this worker's step


def worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def remote(pool: ProcessPoolExecutor, function: Callable[[], Any]) -> Any:
    return pool.submit(function).result()


def prepare(*how: Any) -> None:
    STEPS.append(training_step(*how))


def time_of_step() -> float:
    return measure.wall_clock(STEPS[0])


def time_by_operator() -> dict[str, float]:
    return measure.time_by_operator(STEPS[0])


def peak_mib() -> float:
    """The process's peak, weights and optimizer included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_rate(dtype: torch.dtype) -> float:
    return measure.matmul_rate("cpu", dtype, MATMUL_SIZE, measure.wall_clock, rounds=15)


class Objective(nn.Module):
    """Cross-entropy and dispersion, as in train.py."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.disperse = GPT(config), DispersionLoss()
        self.layers = list(range(1, config.n_layer + 1))

    def forward(self, x: Tensor, y: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return self.model(x, y).loss
        out = self.model(x, y, take=(self.layers, positions))
        return out.loss + LAMBDA * self.disperse(out.hidden.flatten(0, 1))


def training_step(
    kind: str,
    rows: int,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    baseline: Path | None,
) -> Step:
    if kind in BASELINES:
        assert baseline is not None
        return nanogpt_step(kind, recipe, rows, device, baseline)
    hardware.prepare(device, dtype)
    objective = Objective(recipe.model).to(device)
    config = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    optimizers = optim.build_optimizers(objective.model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    if compiled:
        objective.compile(dynamic=False)
    assert recipe.model.vocab_size is not None
    x, y = torch.randint(recipe.model.vocab_size, (2, rows, recipe.model.block_size), device=device)
    step = 0

    def run() -> None:
        nonlocal step
        positions = None
        if kind != "off":
            positions = sample_positions(0, step, objective.layers, recipe.model.block_size, DISPERSED[kind])
            positions = positions.to(device, non_blocking=True)
        optim.set_lr(optimizers, config, step, recipe.steps)
        step += 1
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(x, y, positions)
        loss.backward()
        grad_norm = optim.clip_gradients(objective.model, optimizers, scaler, config.grad_clip)
        optim.update(optimizers, scaler, grad_norm)
        for optimizer in optimizers:
            optimizer.zero_grad()

    return run


def nanogpt_step(kind: str, recipe: Recipe, rows: int, device: torch.device, folder: Path) -> Step:
    """One step of nanoGPT's train.py with its model and optimizer; in float32 on a CPU unless `kind` says otherwise."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    c = recipe.model
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(
                **{"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.block_size},
                **{"vocab_size": recipe.nanogpt_vocab_size, "bias": c.bias, "dropout": 0.0},
            )
        ).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    half = device.type == "cuda" or "bf16" in kind
    if device.type == "cuda" or "compiled" in kind:
        model.compile()
    x, y = torch.randint(recipe.nanogpt_vocab_size, (2, rows, c.block_size), device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


if __name__ == "__main__":
    main()
