"""One long run of the default model: does it grow, and does it survive?

    python -m bench.endurance              # 3 hours
    python -m bench.endurance hours=0.1    # shorter; needs more than the warm-up

In the first third it is killed with SIGKILL at random moments and started again by the same command. Then one process
runs to the end, where it gets SIGTERM and must save and exit with code 75. All the time its memory (RSS, of which the
anonymous part is allocated and the rest are mapped files), file handles, threads and the size of its checkpoints are
read every few seconds. After a warm-up of that process the memory must grow by less than 1 MB an hour, the handles by
no more than the two of a save, and checkpoints never exceed what `train.keep_last` allows: those, the best one, the one
being written and the one just replaced. It saves and evaluates every few steps, as these are what moves memory: the C
library's heap grows by tens of MB, in jumps, within the first few dozen of them.

Figures go to bench/results/endurance-<machine>.json.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from bench.runs import ENVIRONMENT, ROOT, checkpoints_of, curve
from nanodisp import cli

KEEP_LAST = 2
MOST_GROWTH = 1.0  # MB an hour


@dataclass
class EnduranceConfig:
    """How long, and where.

    hours: in all.
    kill_minutes: mean time between two kills, in the first third.
    warmup_minutes: of the last process, before its memory counts.
    every_seconds: between two readings.
    folder: of the run; null for a temporary one.
    seed: of the moments of the kills.
    """

    hours: float = 3.0
    kill_minutes: float = 4.0
    warmup_minutes: float = 30.0
    every_seconds: float = 5.0
    folder: str | None = None
    seed: int = 0


def start(folder: Path) -> subprocess.Popen[bytes]:
    intervals = ("train.checkpoint_interval=10", "train.eval_interval=20", "train.log_interval=10")
    others = (f"train.keep_last={KEEP_LAST}", "optim.schedule=constant", "train.compile=false", "device=cpu")
    where = ("train.steps=1000000", f"out_dir={folder}", "run_name=long")
    command = [sys.executable, "train.py", *intervals, *others, *where]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)


def reading(pid: int, run: Path) -> dict[str, float]:
    """Memory in MB, handles, threads, and the checkpoints' MB and number, of a process that may be ending."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    megabytes = {name: int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}
    size = 0
    for parent, _, files in os.walk(run / "checkpoints"):
        for name in files:
            try:
                size += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # replaced meanwhile
                continue
    return {
        "rss": megabytes["VmRSS"],
        "anonymous": megabytes["RssAnon"],
        "handles": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(status["Threads"]),
        "disk": size / 2**20,
        "checkpoints": len(checkpoints_of(run)),
    }


def watch(process: subprocess.Popen[bytes], run: Path, seconds: float, every: float) -> list[dict[str, float]]:
    """Readings of a process until it ends or `seconds` have passed."""
    readings: list[dict[str, float]] = []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds and process.poll() is None:
        try:
            readings.append({"seconds": passed, **reading(process.pid, run)})
        except (FileNotFoundError, KeyError, ProcessLookupError):
            break
        time.sleep(min(every, max(0.0, seconds - passed)))
    return readings


def slope(readings: list[dict[str, float]], key: str) -> float:
    """Least-squares growth an hour."""
    hours = np.array([each["seconds"] for each in readings]) / 3600
    return float(np.polyfit(hours, [each[key] for each in readings], 1)[0])


def endure(endurance: EnduranceConfig, folder: Path) -> dict[str, Any]:
    run, rng = folder / "long", random.Random(endurance.seed)
    began, seconds = time.monotonic(), endurance.hours * 3600
    readings: list[dict[str, float]] = []
    kills = 0
    process = start(folder)
    try:
        while (left := seconds / 3 - (time.monotonic() - began)) > 0:
            lives = min(left, 60 * endurance.kill_minutes * rng.uniform(0.2, 1.8))
            readings += watch(process, run, lives, endurance.every_seconds)
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself with {process.returncode}; see {folder / 'log.txt'}")
            process.kill()
            process.wait()
            kills += 1
            process = start(folder)
        last = watch(process, run, seconds - (time.monotonic() - began), endurance.every_seconds)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    steady = [each for each in last if each["seconds"] > 60 * endurance.warmup_minutes]
    if len(steady) < 10:
        raise SystemExit("too short: hours must leave time after the kills and the warm-up")
    one = max(sum(f.stat().st_size for f in each.iterdir()) for each in checkpoints_of(run)) / 2**20
    losses = curve(run)
    return {
        "hours": (time.monotonic() - began) / 3600,
        "steady_hours": (steady[-1]["seconds"] - steady[0]["seconds"]) / 3600,
        "kills": kills,
        "exit_code": code,
        "records": len(losses),
        "loss": [losses[0], losses[-1]],
        "growth_mb_per_hour": {key: slope(steady, key) for key in ("rss", "anonymous")},
        "rss_mb": [min(each["rss"] for each in steady), max(each["rss"] for each in steady)],
        "handles": [min(each["handles"] for each in steady), max(each["handles"] for each in steady)],
        "threads": [min(each["threads"] for each in steady), max(each["threads"] for each in steady)],
        "checkpoint_mb": one,
        "most_disk_in_checkpoints": max(each["disk"] for each in readings + last) / one,
        "most_checkpoints": max(each["checkpoints"] for each in readings + last),
        "series": [{key: round(value, 2) for key, value in each.items()} for each in steady[:: len(steady) // 60 + 1]],
    }


def main(argv: Sequence[str]) -> None:
    endurance = cli.parse(EnduranceConfig, argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(endurance.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report = {"device": measure.device_name(), **endure(endurance, folder)}
    for key, value in report.items():
        if key != "series":
            print(f"{key}: {value}")
    measure.write("endurance", report)
    wrong = [
        *(["memory grows"] * (report["growth_mb_per_hour"]["rss"] >= MOST_GROWTH)),
        *(["file handles grow"] * (report["handles"][0] + 2 < report["handles"][1])),
        *(["checkpoints are not deleted"] * (report["most_disk_in_checkpoints"] > KEEP_LAST + 3)),
        *(["it did not exit with 75"] * (report["exit_code"] != 75)),
    ]
    if wrong:
        raise SystemExit(", ".join(wrong))


if __name__ == "__main__":
    cli.run(main, EnduranceConfig)
