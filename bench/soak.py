"""Tests what a run survives: `make soak`.

    python -m bench.soak                # everything
    python -m bench.soak kills=5        # fewer kills: also ranks=, mutations=

- kills: runs of `nano`, killed up to 5 times with SIGKILL at random moments, every third time while a
  checkpoint is being written, and started again until they are complete. Their final weights and losses must equal
  those of an uninterrupted run.
- ranks: one run on 2, 1, 4 and 2 ranks in turn, half of it with FSDP, compared with the loss curve of one rank; and a
  run of four ranks under `torchrun --max-restarts` of which one is killed three times, compared with an uninterrupted
  one.
- mutations: checkpoints, shards, manifests and configurations with bytes changed, cut off or doubled, each read as
  training reads it: the result must be an error with a message, or the original content.

Figures go to bench/results/soak-<machine>.json. Everything random is drawn from one seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bench import measure
from bench.runs import ENVIRONMENT, ROOT, SHORT, STEADY, curve, weights
from nanodisp import cli, launch
from nanodisp.config import Config
from nanodisp.data import shards
from nanodisp.errors import UserError
from nanodisp.overrides import explain
from nanodisp.runs import checkpoint
from tests.forked import Forked

MOST_KILLS = 5  # of one run
ONE = threading.Lock()  # a start of multiprocessing asks after all processes: two threads may not read one exit code


@dataclass
class SoakConfig:
    """How much of each.

    kills, ranks, mutations: see above; 0 skips a part.
    seed: of the moments of the kills, and of the mutations.
    """

    kills: int = 50
    ranks: int = 1
    mutations: int = 10_000
    seed: int = 0


def start(folder: Path, name: str, *overrides: str, ranks: int = 1, restarts: int = 0) -> subprocess.Popen[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *([*torchrun, f"--max-restarts={restarts}"] if ranks > 1 else []), "train.py"]
    command += [*SHORT, f"out_dir={folder}", f"run_name={name}", *overrides]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)


def run(folder: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    if start(folder, name, *overrides, ranks=ranks).wait() != 0:
        raise SystemExit(f"an uninterrupted run failed; see {folder / name}.log")
    return folder / name


class Trial:
    """A run of one rank that may be killed: fresh, or forked from a process with torch loaded, which starts at once.

    A fresh Python takes 3 seconds to start, which was most of a soak's time.
    """

    def __init__(self, folder: Path, name: str, *overrides: str, fresh: bool) -> None:
        self.fresh = start(folder, name, *overrides) if fresh else None
        settings = (*SHORT, f"out_dir={folder}", f"run_name={name}", *overrides)
        with ONE:
            self.forked = None if fresh else Forked(ROOT / "train.py", *settings)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        with ONE:
            return self.fresh.poll() if self.fresh else self.forked.process.exitcode if self.forked else None

    def kill(self) -> None:
        if self.fresh:
            self.fresh.kill()
            self.fresh.wait()
        if self.forked:
            with ONE:
                self.forked.process.kill()
                self.forked.process.join()


def be_killed(folder: Path, name: str, rng: random.Random, first_fresh: bool) -> tuple[int, int, bool]:
    """Kill a run at random moments and start it again until it is complete.

    Returns how often it was killed, how often while it was saving, and whether it ended with exit code 0.
    """
    checkpoints = folder / name / "checkpoints"
    kills, caught_saving = 0, 0
    while True:
        trial = Trial(folder, name, "train.log_interval=1", fresh=first_fresh and kills == 0)
        aim_at_save = rng.random() < 1 / 3
        while trial.poll() is None and not (folder / name / "metrics.jsonl").exists():
            time.sleep(0.01)
        patience = 60 if aim_at_save else rng.uniform(0, 4)
        deadline = time.monotonic() + (patience if kills < MOST_KILLS else 600)
        while trial.poll() is None and time.monotonic() < deadline:
            if aim_at_save and kills < MOST_KILLS and any(checkpoints.glob(".step_*.tmp")):
                break
            time.sleep(0.001)
        if trial.poll() is not None:
            return kills, caught_saving, trial.poll() == 0
        caught_saving += any(checkpoints.glob(".step_*.tmp"))
        trial.kill()
        kills += 1


def soak_kills(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """As many runs at once as there are cores."""
    whole = run(folder, "whole", "train.log_interval=1")
    right, right_curve = weights(whole), curve(whole)

    def survive(number: int) -> tuple[int, int, bool]:
        name = f"killed-{number}"
        kills, saving, finished = be_killed(folder, name, random.Random(f"{seed}/{number}"), number % 5 == 0)
        same = finished and weights(folder / name) == right and curve(folder / name) == right_curve
        shutil.rmtree(folder / name)
        return kills, saving, same

    kills, caught_saving, identical = 0, 0, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (times, saving, same) in enumerate(pool.map(survive, range(n)), start=1):
            kills, caught_saving, identical = kills + times, caught_saving + saving, identical + same
            print(f"killed runs with the weights and the losses of the unkilled: {identical} of {done}", end="\r")
    print(f"\n{kills} kills, {caught_saving} while saving")
    return {"runs": n, "identical": identical, "kills": kills, "kills_while_saving": caught_saving}


def soak_ranks(folder: Path) -> dict[str, Any]:
    for steps, ranks, parallel in ((6, 2, "ddp"), (12, 1, "ddp"), (18, 4, "fsdp"), (24, 2, "fsdp")):
        settings = (f"train.steps={steps}", f"train.parallel={parallel}", *STEADY)
        run(folder, "moved", *settings, "train.log_interval=1", ranks=ranks)
    steady = curve(run(folder, "steady", "train.log_interval=1", *STEADY))
    error = float(np.max(np.abs(np.subtract(curve(folder / "moved"), steady)) / steady))
    print(f"2, 1, 4, 2 ranks, DDP and FSDP: the curve of one rank to {error:.1e}")

    right = curve(run(folder, "unkilled", "train.log_interval=1", ranks=4))
    process = start(folder, "restarted", "train.log_interval=1", ranks=4, restarts=5)
    kills = 0
    while process.poll() is None and kills < 3:
        time.sleep(0.2)
        if checkpoint.newest_step(folder / "restarted") >= 4 * (kills + 1):
            victims = subprocess.run(["pgrep", "-f", "run_name=restarted"], capture_output=True, text=True).stdout
            workers = [int(pid) for pid in victims.split() if int(pid) != process.pid]
            if workers:
                os.kill(max(workers), signal.SIGKILL)
                kills += 1
    finished = process.wait() == 0
    restarted = (
        float(np.max(np.abs(np.subtract(curve(folder / "restarted"), right)) / right)) if finished else float("nan")
    )
    print(f"four ranks, one killed {kills} times: finished {finished}, the curve of four unkilled to {restarted:.1e}")
    return {"moved_error": error, "rank_kills": kills, "finished": finished, "restarted_error": restarted}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled or replaced by others."""
    changed = bytearray(content)
    at = rng.randrange(len(changed)) if rng.random() < 0.5 else min(rng.randrange(64), len(changed) - 1)
    match rng.randrange(5):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        case 3:
            changed[at : at + 8] = rng.randbytes(8)
        case 4:
            del changed[at : at + rng.randrange(1, 40)]
    return bytes(changed)


def soak_mutations(folder: Path, n: int, rng: random.Random) -> dict[str, Any]:
    """Outcomes by kind of file. An exception other than UserError ends the soak with a traceback."""
    torch.manual_seed(0)
    tensors = {"wte.weight": torch.randn(7, 5), "ln_f.weight": torch.randn(5)}
    saved = checkpoint.save(folder / "run", tensors, tensors, {"step": 3, "seconds": 1.0, "config": {"seed": 1}})
    tokens = np.arange(3000, dtype=np.uint16) % 257
    prepared = folder / "data"
    prepared.mkdir()
    entries = []
    for split in ("train", "val"):
        shards.write_shard(prepared / f"{split}_000000.bin", tokens)
        entries.append(shards.describe_shard(prepared / f"{split}_000000.bin", split))
    shards.Manifest("byte", 257, "soak", {}, entries).save(prepared)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(Config())))
    np.save(prepared / "other_val.npy", tokens)

    def read_checkpoint() -> bool:
        loaded = checkpoint.load(saved)
        same = [torch.equal(part[name], tensors[name]) for part in (loaded.model, loaded.optimizer) for name in tensors]
        return all(same) and (loaded.step, loaded.state["seconds"], loaded.state["config"]) == (3, 1.0, {"seed": 1})

    def read_shards() -> bool:
        split = shards.open_split(prepared, "train")
        split.check_range(257)
        shards.verify(prepared)
        return bool((split.read(0, len(tokens)) == tokens).all())

    def read_npy() -> bool:
        read = shards.read_shard(prepared / "other_val.npy")  # no checksum: changed tokens go unnoticed
        return read.ndim == 1 and len(read) <= 4 * len(tokens)

    def read_config() -> bool:
        try:
            read = OmegaConf.merge(OmegaConf.structured(Config()), OmegaConf.load(folder / "config.yaml"))
            launch.check(cast(DictConfig, read))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:  # as Hydra's composition gives them
            raise UserError(explain(error)) from error
        return True

    files: list[tuple[Path, Callable[[], bool]]] = [
        (saved / "model.safetensors", read_checkpoint),
        (saved / "optimizer.safetensors", read_checkpoint),
        (saved / "state.json", read_checkpoint),
        (prepared / "train_000000.bin", read_shards),
        (prepared / "manifest.json", read_shards),
        (prepared / "other_val.npy", read_npy),
        (folder / "config.yaml", read_config),
    ]
    outcomes: dict[str, Counter[str]] = {path.name: Counter() for path, _ in files}
    slowest = 0.0
    for number in range(n):
        path, read = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        began = time.perf_counter()
        try:
            outcome = "as written" if read() else "SILENTLY WRONG"
        except UserError as error:
            outcome = "rejected" if str(error).strip() else "REJECTED WITHOUT A REASON"
        slowest = max(slowest, time.perf_counter() - began)
        outcomes[path.name][outcome] += 1
        path.write_bytes(content)
    for name, counts in outcomes.items():
        print(f"{name:22} " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    print(f"{n} mutations, the slowest read {slowest:.2f} s")
    return {"n": n, "outcomes": {name: dict(counts) for name, counts in outcomes.items()}, "slowest_seconds": slowest}


def main(argv: Sequence[str]) -> None:
    soak = cli.parse(SoakConfig, argv)
    rng = random.Random(soak.seed)
    report: dict[str, Any] = {"device": measure.device_name()}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "mutations": lambda: soak_mutations(folder, soak.mutations, rng),
            "ranks": lambda: soak_ranks(folder),
            "kills": lambda: soak_kills(folder, soak.kills, soak.seed),
        }
        for part, soak_part in parts.items():
            if getattr(soak, part):
                part_began = time.perf_counter()
                report[part] = {**soak_part(), "seconds": time.perf_counter() - part_began}
                print(f"{part}: {report[part]['seconds']:.0f} s")
    report["seconds"] = time.perf_counter() - began
    print(f"{report['seconds']:.0f} s in all")
    missed = soak.kills and report["kills"]["identical"] < soak.kills
    if soak.ranks:
        errors = [report["ranks"][key] for key in ("moved_error", "restarted_error")]
        missed = missed or not report["ranks"]["finished"] or not max(errors) <= 1e-5
    if soak.mutations:
        outcomes = report["mutations"]["outcomes"].values()
        missed = missed or any(name not in ("rejected", "as written") for counts in outcomes for name in counts)
    measure.write("soak", report)
    if missed:
        raise SystemExit("something did not survive: see above")


if __name__ == "__main__":
    cli.run(main, SoakConfig)
