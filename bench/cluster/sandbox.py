"""What the tests of clusters share: namespaces that vanish with the test, bounded waiting, and a table of outcomes.

A test starts itself again as the first process of its own PID, mount and, if asked for, network namespace
(`enter`). When that process ends, however it ends, the kernel kills every process in it and removes its mounts and
networks: nothing can stay behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench import measure
from bench.runs import SHORT

INSIDE = "NANODISP_SANDBOX"
TINY = (
    *SHORT,
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "dispersion.max_tokens=8"),
    *("train.log_interval=1", "train.compile=false", "train.eval_interval=1000000"),
)


def skip(reason: str) -> NoReturn:
    print(f"skipped: {reason}")
    sys.exit(0)


def enter(module: str, *flags: str) -> None:
    """Start this command again inside new namespaces, and end with its exit code; returns only in there."""
    if INSIDE in os.environ:
        return
    if os.geteuid() != 0:
        skip(f"{module} makes namespaces and mounts, which needs root: run it with sudo, or in a container of your own")
    if shutil.which("unshare") is None:
        skip(f"{module} needs unshare, of util-linux")
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *flags]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode != 0:
        skip(f"{module} may not make namespaces here ({' '.join(unshare)} fails)")
    environment = {**os.environ, INSIDE: "1"}
    sys.exit(subprocess.run([*unshare, sys.executable, "-m", module, *sys.argv[1:]], env=environment).returncode)


def until(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.2) -> Any:
    """The first true result of `condition`, asked for at most `seconds`; ends the test otherwise."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(every)
    return result


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def errors_in(log: str) -> list[str]:
    """The lines by which nanodisp ended, each once."""
    return list(dict.fromkeys(line for line in log.splitlines() if line.startswith("error: ")))


@dataclass
class Tried:
    """What is tried, how often.

    only: cases whose name contains one of these, separated by commas; null for all.
    times: of each disturbance.
    seed: of its moments.
    """

    only: str | None = None
    times: int = 2
    seed: int = 0


class Outcomes:
    """How each case ended; printed as they come, and written to bench/results/ at the end."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, []  # type: ignore[var-annotated]

    def note(self, fault: str, good: Sequence[bool], ended: str) -> None:
        """A fault that was tried len(good) times, in which of them it ended as it should, and how."""
        self.rows.append({"fault": fault, "tries": len(good), "as_expected": sum(good), "ended": ended})
        print(f"{sum(good)} of {len(good)}  {fault}: {ended}", flush=True)

    def finish(self, began: float) -> None:
        seconds = time.monotonic() - began
        measure.write(self.name, {"device": measure.device_name(), "cases": self.rows, "seconds": seconds})
        print(f"{seconds:.0f} s in all")
        if any(row["as_expected"] < row["tries"] for row in self.rows):
            raise SystemExit("something did not end as it should: see above")
