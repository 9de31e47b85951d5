"""Times whole training steps: dispersion off, over 256 tokens and over all tokens of every layer.

    python -m bench.train_step --model micro --batch-size 4
    python -m bench.train_step --model gpt2 --batch-size 2
    python -m bench.train_step --device cuda --model gpt2 --batch-size 16 --dtype bfloat16 --compile

A step is forward, backward, clipping and AdamW on random tokens. The kinds of step alternate; of the
rounds the median, and as overhead the median of the rounds' own ratios to the step without dispersion.
"indexed" is 256 tokens too, but taken from whole hidden states by plain indexing, layer by layer: what
`GPT.forward(take=…)` and one launch for all layers save.

Needs torch, numpy, triton (on a GPU) and nanodisp's model, loss and optimizers, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.kernels import RESULTS, Cuda, interquartile, read_if_there, wall_clock
from nanodisp.dispersion import DispersionLoss, sample_positions
from nanodisp.gpt import GPT, GPTConfig
from nanodisp.optim import OptimConfig, build_optimizers

CONF = Path(__file__).parent.parent / "conf" / "model"
KINDS = ("off", "256 tokens", "all tokens", "indexed")
LAMBDA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="benchmark of a training step with and without dispersion")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=sorted(path.stem for path in CONF.glob("*.yaml")), default="micro")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    config = model_config(arguments.model, arguments.vocab_size)
    timer: Callable[[Callable[[], Any]], float] = Cuda().timer if arguments.device == "cuda" else wall_clock
    kinds = KINDS[:-1] if arguments.compile else KINDS  # a compiler would have to be waited for once more
    steps = {kind: training_step(kind, config, arguments) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in kinds:
        timer(steps[kind])
    for _ in range(arguments.rounds):
        for kind in kinds:
            times[kind].append(timer(steps[kind]))

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    report: dict[str, Any] = {**vars(arguments), "device": name, "torch": torch.__version__, "steps": {}}
    tokens = arguments.batch_size * config.block_size
    print(f"{name}: {arguments.model}, {arguments.batch_size} x {config.block_size} tokens, {arguments.dtype}")
    for kind in kinds:
        median = statistics.median(times[kind])
        over = [time / off for time, off in zip(times[kind], times["off"], strict=True)]
        overhead = statistics.median(over) - 1
        report["steps"][kind] = {"median_ms": median, "iqr_ms": interquartile(times[kind]), "overhead": overhead}
        rate = tokens / median * 1e3
        print(
            f"{kind:12}{median:10.2f} ms ±{interquartile(times[kind]) / 2:6.2f}{rate:12,.0f} tokens/s{overhead:+8.1%}"
        )
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    path = folder / f"train-step-{arguments.model}-{arguments.dtype}-{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def model_config(name: str, vocab_size: int) -> GPTConfig:
    """The numbers of conf/model/<name>.yaml, read without Hydra."""
    pairs = re.findall(r"^(\w+): (\d+)$", (CONF / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    return GPTConfig(**{key: int(value) for key, value in pairs}, vocab_size=vocab_size)


def cpu_name() -> str:
    model = next(iter(re.findall(r"model name\s*:\s*(.*)", read_if_there("/proc/cpuinfo"))), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


class Objective(nn.Module):
    """Cross-entropy and dispersion of one kind of step, as train.py has them."""

    def __init__(self, kind: str, config: GPTConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.model, self.disperse = kind, GPT(config), DispersionLoss()
        self.layers = list(range(1, config.n_layer + 1))

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return self.model(x, x).loss
        if self.kind == "indexed":
            out = self.model(x, x, return_hidden=True)
            losses = [
                self.disperse(out.hidden[layer][:, row]) for layer, row in zip(self.layers, positions, strict=True)
            ]
            return out.loss + LAMBDA * torch.stack(losses).mean()
        out = self.model(x, x, take=(self.layers, positions))
        return out.loss + LAMBDA * self.disperse(out.hidden.flatten(0, 1))


def training_step(kind: str, config: GPTConfig, arguments: argparse.Namespace) -> Callable[[], None]:
    device = torch.device(arguments.device)
    objective = Objective(kind, config).to(device)
    if arguments.compile:
        objective.compile(dynamic=False)
    optimizers = build_optimizers(objective.model, OptimConfig(lr=6e-4))
    x = torch.randint(arguments.vocab_size, (arguments.batch_size, config.block_size)).to(device)
    n_tokens = None if kind == "all tokens" else 256
    step = 0

    def run() -> None:
        nonlocal step
        positions = None
        if kind != "off":
            positions = sample_positions(0, step, objective.layers, config.block_size, n_tokens)
            positions = positions.to(device, non_blocking=True)
        step += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            loss = objective(x, positions)
        loss.backward()
        nn.utils.clip_grad_norm_(objective.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main()
