"""Complete training steps of GPT-2 124M on one GPU: dispersion off, over 256 and over all tokens; and nanoGPT's.

    python -m bench.gpu smoke                        # two minutes: is everything right, and where does the time go?
    python -m bench.gpu step-16 step-32 --baseline <folder of a nanoGPT checkout>
    python -m bench.gpu largest                      # the largest batch of each kind, by doubling
    python -m bench.gpu smoke step-16 --dry-run      # the same code on a CPU, tiny; writes nothing

Each row is written to bench/results/ (or the folder $OUT) as soon as it is measured, and a row whose file exists there
is skipped. No row is started after --seconds. The kinds of a step alternate in one process; figures are medians over
the rounds, overhead is the median of each round's ratio to its step without dispersion. MFU is given twice: of the data
sheet's rate, as train.py records it, and of the matmul rate measured here.

Needs only torch, triton, numpy, and nanodisp's model, loss and optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import kernels, measure
from bench.train_step import DISPERSED, RECIPES, Recipe, training_step
from nanodisp.dispersion import DispersionLoss
from nanodisp.distributed import hardware
from nanodisp.models.gpt import GPT, GPTConfig

NANOGPT = "nanoGPT"


@dataclass
class Setting:
    """Where and what to measure."""

    device: torch.device
    recipe: Recipe
    dtype: torch.dtype
    baseline: Path | None
    rounds: int

    def step(self, kind: str, rows: int) -> measure.Step:
        compiled = self.device.type == "cuda"
        return training_step(kind, rows, self.recipe, self.device, self.dtype, compiled, self.baseline)

    @property
    def kinds(self) -> list[str]:
        return [*DISPERSED, *([NANOGPT] if self.baseline else [])]

    def time(self, step: measure.Step) -> float:
        """Milliseconds of a call."""
        return (measure.Cuda().timer if self.device.type == "cuda" else measure.wall_clock)(step)

    def peak_mib(self, step: measure.Step) -> float | None:
        return measure.Cuda().peak_bytes(step) / 2**20 if self.device.type == "cuda" else None


def smoke(setting: Setting) -> dict[str, Any]:
    """Gradients against float64, a CUDA graph, five timings of compiled steps, memory, time by kernel."""
    figures: dict[str, Any] = {"gradient_error": {}}
    noise = torch.randn(2, 512, 768, generator=torch.Generator().manual_seed(0))
    condensed = (noise + 3 * noise[:, :1]).to(setting.device)
    for variant in kernels.FAMILY:
        for dtype in (torch.float32, torch.bfloat16):
            z = condensed.to(dtype, copy=True).requires_grad_()
            gradient = torch.autograd.grad(DispersionLoss(variant)(z), z)[0]
            name = f"{variant} {str(dtype).removeprefix('torch.')}"
            figures["gradient_error"][name] = kernels.gradient_error(gradient, variant, z)
            print(f"  {name:30} gradient's error {figures['gradient_error'][name]:.1e}")
    if setting.device.type == "cuda":
        figures["graph_equals_eager"] = graph_equals_eager(setting.device)
        print(f"  a CUDA graph gives the eager gradient: {figures['graph_equals_eager']}")

    rows = 4 if setting.device.type == "cuda" else 1
    began = time.perf_counter()
    step = setting.step("256 tokens", rows)
    step()
    figures["seconds_to_first_step"] = time.perf_counter() - began
    figures["step_ms"] = [setting.time(step) for _ in range(5)]
    figures["peak_mib"] = setting.peak_mib(step)
    figures["shares"] = dict(
        list(measure.time_by_operator(lambda: [step() for _ in range(10)], setting.device.type).items())[:25]
    )
    print(f"  first step after {figures['seconds_to_first_step']:.1f} s, then {figures['step_ms'][-1]:.1f} ms")
    for name, share in figures["shares"].items():
        print(f"  {share:6.1%} {name[:100]}")
    return figures


def graph_equals_eager(device: torch.device) -> bool:
    z = torch.randn(2, 512, 768, device=device, requires_grad=True)
    loss = DispersionLoss()

    def step() -> torch.Tensor:
        return torch.autograd.grad(loss(z), z)[0]

    eager = step()
    return torch.equal(measure.Cuda().graph(step)(), eager)


def steps_of(rows: int) -> Callable[[Setting], dict[str, Any]]:
    def compare(setting: Setting) -> dict[str, Any]:
        """All kinds with `rows` sequences, in alternation."""
        tokens, flops = rows * setting.recipe.model.block_size, flops_per_token(setting.recipe.model)
        size = 8192 if setting.device.type == "cuda" else 256
        matmul = measure.matmul_rate(setting.device.type, setting.dtype, size, setting.time, rounds=15)
        sheet = hardware.peak_flops(setting.device, setting.dtype)
        steps = {}
        for kind in setting.kinds:
            began = time.perf_counter()
            steps[kind] = setting.step(kind, rows)
            steps[kind]()
            print(f"  {kind}: first step after {time.perf_counter() - began:.1f} s", flush=True)
        times = measure.alternate(steps, setting.time, setting.rounds, warmup=2)
        figures: dict[str, Any] = {"matmul_flops": matmul, "data_sheet_flops": sheet, "kinds": {}}
        for kind, step in steps.items():
            it: dict[str, Any] = {**measure.summary(times[kind]), "peak_mib": setting.peak_mib(step)}
            rate = tokens / it["median_ms"] * 1e3
            it |= {"tokens_per_second": rate, "overhead": measure.overhead(times[kind], times["off"])}
            if kind != NANOGPT:
                it |= {"mfu": rate * flops / sheet if sheet else None, "share_of_matmul": rate * flops / matmul}
            figures["kinds"][kind] = it
            mfu = f"{it['mfu']:7.1%}" if it.get("mfu") else ""
            print(f"  {kind:12}{measure.show(it)}{rate:12,.0f} tokens/s{it['overhead']:+8.1%}{mfu}")
        return figures

    return compare


def largest(setting: Setting) -> dict[str, Any]:
    """The largest of 2, 4, 8, ... sequences with which two steps of a kind fit into memory."""
    found = {}
    for kind in setting.kinds:
        rows = 1
        while rows < 1024 and fits(setting, kind, 2 * rows):
            rows *= 2
        found[kind] = rows
        print(f"  {kind:12}{rows} sequences")
    return found


def fits(setting: Setting, kind: str, rows: int) -> bool:
    try:
        step = setting.step(kind, rows)
        step(), step()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return True


def flops_per_token(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).flops_per_token()


ROWS = {"smoke": smoke, "step-16": steps_of(16), "step-32": steps_of(32), "largest": largest}


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--baseline", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--seconds", type=measure.positive, default=500, help="no row is started after them")
    parser.add_argument("--rounds", type=measure.positive, default=15)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    arguments = parser.parse_args()
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("PyTorch finds no GPU; use --dry-run")
    if arguments.baseline and not (arguments.baseline / "model.py").is_file():
        parser.error(f"--baseline {arguments.baseline} holds no model.py: give the folder of a nanoGPT checkout")

    setting = Setting(torch.device("cuda"), RECIPES["gpt2"], torch.bfloat16, arguments.baseline, arguments.rounds)
    if arguments.dry_run:
        tiny = replace(setting.recipe, model=GPTConfig(2, 2, 32, 64, vocab_size=257), nanogpt_vocab_size=257)
        setting = replace(setting, device=torch.device("cpu"), recipe=tiny, dtype=torch.float32, rounds=1)
    torch.set_float32_matmul_precision("high")
    name, began = measure.device_name(setting.device.type), time.perf_counter()
    print(f"{name}, PyTorch {torch.__version__}")
    for row in dict.fromkeys(arguments.rows):
        if not arguments.dry_run and (done := measure.path_of(f"gpu-{row}", name)).exists():
            print(f"{row}: measured already, {done}")
        elif time.perf_counter() - began > arguments.seconds:
            print(f"{row}: not started, {arguments.seconds} s are over; the same command goes on with it")
        else:
            print(row, flush=True)
            figures = ROWS[row](setting)
            if not arguments.dry_run:
                measure.write(f"gpu-{row}", {"device": name, "row": row, **figures})


if __name__ == "__main__":
    main()
