"""Shared by the benchmarks: alternating timing, the machine's name, and files with results.

Benchmarks compare implementations on noisy machines, so the implementations alternate and the median of the
rounds is reported with the interquartile range.
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
    """Wall-clock milliseconds, measured again (at most 5 times) if other programs held the cores for over 2%."""
    for _ in range(5):
        before = waited_for_a_core()
        milliseconds = wall_clock(step)
        if waited_for_a_core() - before < 0.02 * milliseconds:
            break
    return milliseconds


def waited_for_a_core() -> float:
    """Milliseconds that this process's threads were ready but not running (Linux; 0 elsewhere)."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e6


def alternate(
    steps: Mapping[str, Step], timer: Callable[[Step], float], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each step in each of `rounds` rounds, one call per step and round, after `warmup` calls."""
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
    """Relative slowdown: the median of the ratios of each round, because a disturbance of a round affects both."""
    return statistics.median(time / base_time for time, base_time in zip(times, base, strict=True)) - 1


def show(figures: dict[str, float]) -> str:
    return f"{figures['median_ms']:9.3f} ±{figures['iqr_ms'] / 2:5.2f} "


def matmul_rate(device: str, dtype: torch.dtype, size: int, timer: Callable[[Step], float], rounds: int) -> float:
    """FLOP/s of PyTorch's matmul of two random [size, size] matrices."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    times = alternate({"matmul": lambda: torch.mm(a, b, out=out)}, timer, rounds)["matmul"]
    return 2 * size**3 / statistics.median(times) * 1e3


def time_by_operator(step: Step, device: str = "cpu") -> dict[str, float]:
    """Each operator's share of the total time of a call, without nested operators; largest first."""
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


def path_of(name: str, device: str) -> Path:
    """The file in bench/results/ (or the folder $OUT) for a report about this device."""
    folder = Path(os.environ.get("OUT") or RESULTS)
    return folder / f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write(name: str, report: dict[str, Any], say: bool = True) -> None:
    """Write the report to `path_of(name, report["device"])`, and say so."""
    path = path_of(name, report["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**report, "torch": torch.__version__, "python": platform.python_version()}
    path.write_text(json.dumps(report, indent=1, default=name_of) + "\n")
    if say:
        print(f"written to {path}")


def name_of(value: object) -> str:
    """What a report says of a value that JSON does not know: of a path only its name."""
    return value.name if isinstance(value, Path) else str(value)


def parser_of(module_docstring: str | None) -> argparse.ArgumentParser:
    """A command line whose --help is the benchmark's docstring."""
    return argparse.ArgumentParser(description=module_docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


class Cuda:
    """Time and memory on a GPU."""

    def timer(self, step: Step) -> float:
        """Milliseconds per call, averaged over five in a row: the queue hides Python's time, as in training."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 5

    def peak_bytes(self, step: Step) -> int:
        """Peak memory of the step beyond what was allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, step: Step) -> Step:
        """The step captured as a CUDA graph, without Python between its kernels."""
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
