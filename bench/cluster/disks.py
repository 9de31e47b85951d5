"""A run on a mounted disk, as a bucket or a network file system is, that becomes read-only at the wrong moment.

    python -m bench.cluster.disks            # part of `make hosts-test`; times=3 for fewer

The folder of the checkpoints is a mount of its own (tmpfs, in a mount namespace of this test). At a random step it is
made read-only: the run must end with one line and exit code 2, its checkpoints intact. Made writable again, the same
command must end with the weights and the losses of an undisturbed run. So must a run that never could begin.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cluster import sandbox
from bench.cluster.sandbox import TINY, Outcomes, errors_in, until
from bench.runs import ENVIRONMENT, ROOT, checkpoints_of, curve, weights
from nanodisp import cli
from nanodisp.runs import checkpoint


@dataclass
class DisksConfig:
    """What is tried, how often.

    times: of each disturbance.
    seed: of its moments.
    """

    times: int = 5
    seed: int = 0


def command(out: Path, name: str) -> list[str]:
    return [sys.executable, "train.py", *TINY, "train.steps=150", f"out_dir={out}", f"run_name={name}"]


def run(out: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, name), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def remount(folder: Path, how: str) -> bool:
    """Whether it worked: the kernel refuses to make it read-only in the middle of a save."""
    done = subprocess.run(["mount", "-o", f"remount,{how}", folder], stderr=subprocess.DEVNULL)
    return done.returncode == 0


def read_only(out: Path, name: str, whole: Path, rng: random.Random | None) -> tuple[bool, str]:
    """One run on such a disk; without `rng` it is read-only from the beginning."""
    folder = out / name / "checkpoints"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "checkpoints", folder], check=True)
    if rng is None:
        remount(folder, "ro")
    process = subprocess.Popen(
        command(out, name), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if rng is not None:
        step = rng.randrange(2, 60)
        until(lambda: checkpoint.newest_step(out / name) >= step, 120, "step")
        until(lambda: remount(folder, "ro") or process.poll() is not None, 60, "read-only", every=0.0)
    said = process.communicate(timeout=300)[1]
    lines = errors_in(said)
    for each in checkpoints_of(out / name):
        checkpoint.load(each)  # raises where one is not intact
    ended = process.returncode == 2 and len(lines) == 1
    remount(folder, "rw")
    again = run(out, name)
    same = again.returncode == 0 and weights(out / name) == weights(whole) and curve(out / name) == curve(whole)
    if not (ended and same):
        print(process.returncode, said[-2000:], again.stderr[-2000:])
    subprocess.run(["umount", folder], check=True)
    return ended and same, lines[0].replace(str(out), "…") if lines else ""


def main(argv: Sequence[str]) -> None:
    config = cli.parse(DisksConfig, argv)
    began, rng, outcomes = time.monotonic(), random.Random(config.seed), Outcomes("disks")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        if run(out, "whole").returncode != 0:
            raise SystemExit("an undisturbed run failed")
        for fault, moments in (("becomes read-only at a random step", rng), ("is read-only at the start", None)):
            ended = [read_only(out, f"{fault.split()[0]}-{i}", out / "whole", moments) for i in range(config.times)]
            line = ended[-1][1]
            outcomes.note(
                f"the checkpoints' disk {fault}",
                [good for good, _ in ended],
                f"exit code 2, `{line}`; writable again: the same command resumed, bit-identical",
            )
        outcomes.finish(began)


if __name__ == "__main__":
    if not cli.asks_for_help(sys.argv[1:]):
        sandbox.enter("bench.cluster.disks")
    cli.run(main, DisksConfig)
