"""Time and memory of the output head with its cross-entropy: in chunks, against plain PyTorch and PyTorch 2.13's own.

    python -m bench.head                        # GPT-2's head on 16 x 1024 tokens, under bfloat16 autocast
    python -m bench.head --tokens 2048 --dtype float32

Forward and backward, in alternation. Peak memory is measured as the growth of a separate process for each.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from nanodisp.models.head import linear_cross_entropy


def plain(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias.to(x.dtype)).float(), targets)


def pytorchs(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, linear_bias=bias.to(x.dtype), options=options)


LOSSES: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": linear_cross_entropy}
if hasattr(F, "linear_cross_entropy"):  # of PyTorch 2.13
    LOSSES["torch"] = pytorchs


def step_of(name: str, n_tokens: int, dtype: str) -> Any:
    torch.manual_seed(0)
    x, weight = torch.randn(n_tokens, 768, requires_grad=True), (0.02 * torch.randn(50304, 768)).requires_grad_()
    bias = torch.zeros(50304)
    bias[50257:] = -math.inf
    targets = torch.randint(50257, (n_tokens,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = LOSSES[name](x, weight, bias, targets)
        torch.autograd.grad(loss, (x, weight))

    return step


def peak_mib(name: str, n_tokens: int, dtype: str) -> float:
    step_of(name, 64, dtype)()  # memory for loading and warm-up is not counted
    step = step_of(name, n_tokens, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--tokens", type=measure.positive, default=16 * 1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=measure.positive, default=3)
    arguments = parser.parse_args()
    report: dict[str, Any] = {**vars(arguments), "device": measure.device_name(), "heads": {}}

    peaks = {}
    for name in LOSSES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(peak_mib, (name, arguments.tokens, arguments.dtype))
    steps = {name: step_of(name, arguments.tokens, arguments.dtype) for name in LOSSES}
    times = measure.alternate(steps, measure.wall_clock, arguments.rounds, warmup=1)
    print(f"{report['device']}: {arguments.tokens} tokens, {arguments.dtype}")
    for name in LOSSES:
        report["heads"][name] = {**measure.summary(times[name]), "peak_mib": peaks[name]}
        print(f"{name:8}{statistics.median(times[name]):10.0f} ms{peaks[name]:10.0f} MiB at the peak")
    ratio = 1 + measure.overhead(times["chunked"], times["plain"])
    print(f"memory {peaks['chunked'] / peaks['plain']:.0%} and time {ratio:.0%} of plain")
    measure.write(f"head-{arguments.tokens}-{arguments.dtype}", report)


if __name__ == "__main__":
    main()
