"""What the benchmarks share: timing in alternation, the machine's name, and where figures go.

A benchmark here compares; machines are noisy, so what is compared alternates, and what is told is the
median of the rounds with their interquartile range.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"

Step = Callable[[], Any]


def wall_clock(step: Step) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def undisturbed(step: Step) -> float:
    """The wall clock, read again (5 times at most) where other programs held the cores for over 2 % of it."""
    for _ in range(5):
        before = waited_for_a_core()
        milliseconds = wall_clock(step)
        if waited_for_a_core() - before < 0.02 * milliseconds:
            break
    return milliseconds


def waited_for_a_core() -> float:
    """Milliseconds that the threads of this process were ready and not running (Linux; 0 elsewhere)."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e6


def alternate(
    steps: Mapping[str, Step], timer: Callable[[Step], float], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each step, `rounds` of them, one of each in every round; `warmup` calls go before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warmup):
            timer(step)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timer(step))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and interquartile range of milliseconds."""
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else (0.0, 0.0, 0.0)
    return {"median_ms": statistics.median(times), "iqr_ms": third - first}


def overhead(times: list[float], base: list[float]) -> float:
    """How much slower, as the median of the rounds' own ratios: what disturbs a round disturbs both."""
    return statistics.median(time / of_base for time, of_base in zip(times, base, strict=True)) - 1


def show(figures: dict[str, float]) -> str:
    return f"{figures['median_ms']:9.3f} ±{figures['iqr_ms'] / 2:5.2f} "


def matmul_rate(device: str, dtype: torch.dtype, size: int, timer: Callable[[Step], float], rounds: int) -> float:
    """FLOP/s of the library's own matmul of size^3, on random numbers."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    times = alternate({"matmul": lambda: torch.mm(a, b, out=out)}, timer, rounds)["matmul"]
    return 2 * size**3 / statistics.median(times) * 1e3


def time_by_operator(step: Step, device: str = "cpu") -> dict[str, float]:
    """Each operator's share of the time that all operators take in a call, without those they call; largest first."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        step()
    times = {
        row.key: getattr(row, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total")
        for row in profiler.key_averages()
    }
    total = sum(times.values())
    return {key: time / total for key, time in sorted(times.items(), key=lambda pair: -pair[1])}


def device_name(device: str = "cpu") -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.*)", file.read_text()) if file.exists() else []
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def write(name: str, report: dict[str, Any]) -> None:
    """Leave the figures in bench/results/ (or in the folder that $OUT names), beside the name of report["device"]."""
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', report['device'].lower()).strip('-')}.json"
    report = {**report, "torch": torch.__version__, "python": platform.python_version()}
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {path}")


def parser_of(module_docstring: str | None) -> argparse.ArgumentParser:
    """A command line whose --help is the head of the benchmark's file."""
    return argparse.ArgumentParser(description=module_docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


class Cuda:
    """How to time and to weigh on a GPU."""

    def timer(self, step: Step) -> float:
        """Milliseconds of a call, of five in a row: the queue hides what Python takes, as in training."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 5

    def peak_bytes(self, step: Step) -> int:
        """The most that the step holds at once beyond what was there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, step: Step) -> Step:
        """The step's kernels without Python between them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()

        def replay() -> Tensor:
            graph.replay()
            return kept

        return replay
