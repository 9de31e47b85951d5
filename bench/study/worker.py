"""The queue of the study: one job after another, each one `python train.py` under out/study/."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import device_name
from bench.study import tokens
from bench.study.plan import gpu_jobs, jobs
from bench.study.records import ROOT, final_loss, known_losses
from nanodisp.process import NOT_DONE
from nanodisp.runs.evaluation import EVALUATION, read_evaluation

TASKS, EMBEDDING_TASKS = "blimp,lambada,wikitext", "retrieval,similarity,probes"
EVALUATED = ("a", "c", "e", "strong", "tuned")  # designs whose runs are evaluated when they end


def call(command: Sequence[str], log: Path, deadline: float = math.inf) -> int:
    """The exit code of a Python command with one thread, whose output is added to a file.

    At `deadline`, in seconds of `time.monotonic`, it is asked to stop; train.py then saves and exits with 75.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            return process.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()


def chosen(names: set[str], only: Sequence[str]) -> set[str]:
    """The names that are among `only`, or begin with one of these that is no whole name itself: s1 is not s10."""
    starts = tuple(each for each in only if each not in names)
    return {name for name in names if name in only or name.startswith(starts)}


def evaluate(folder: Path, benchmarks: Path) -> None:
    """Of a run's last checkpoint, into its folder: benchmarks, loss by token; not again what is there."""
    log, program = folder / "log.txt", ("-m", "nanodisp.evaluate", f"checkpoint={folder}", "batch_size=32")
    code = call((*program, f"tasks={TASKS}", f"task_data={benchmarks}"), log)
    if not any(name.startswith("retrieval") for name in read_evaluation(folder / EVALUATION).get("tasks", {})):
        code = call((*program, f"tasks={EMBEDDING_TASKS}", f"data={benchmarks}"), log) or code
    if tokens.read(folder).keys() != set(tokens.KINDS):
        code = call(("-m", "bench.study.tokens", str(folder)), log) or code
    print(f"    {folder.name}: evaluated, exit code {code}", flush=True)


def work(
    out: Path,
    corpus: Path,
    benchmarks: Path | None,
    gpu: bool = False,
    minutes: float = math.inf,
    only: Sequence[str] = ("",),
) -> None:
    """Run job after job until none is left or the time is over; a job that fails is left for the next call.

    `only` the jobs that are `chosen` by these names.
    """
    os.nice(0 if gpu else 19)
    deadline = time.monotonic() + 60 * minutes
    failed: set[str] = set()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = device_name("cuda" if gpu else "cpu").partition(",")[0]
    about = {"machine": machine, "torch": torch.__version__, "code": revision}
    while True:
        losses = known_losses(out)
        every = list(gpu_jobs(losses) if gpu else jobs(losses, str(corpus)))
        wanted = chosen({j.name for j in every}, only)
        left = (j for j in every if j.name in wanted and j.name not in losses and j.name not in failed)
        todo = next((j for j in left if j.needs is None or (out / j.needs / "checkpoints").is_dir()), None)
        if todo is None:
            print(f"nothing left to run; failed: {', '.join(sorted(failed)) or 'none'}", flush=True)
            return
        folder = out / todo.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "machine.json").write_text(json.dumps(about))
        path = [] if any("data=pystdlib" in override for override in todo.overrides) else [f"data.path={corpus}"]
        print(f"--- {todo.name}", flush=True)
        command = ("train.py", *todo.overrides, *path, f"run_name={todo.name}")
        code = call(command, folder / "log.txt", deadline)
        if code == NOT_DONE:
            return
        if code != 0:
            failed.add(todo.name)
        print(f"    exit code {code}, loss {final_loss(folder)}", flush=True)
        if code == 0 and benchmarks is not None and todo.name.partition("-")[0] in EVALUATED:
            evaluate(folder, benchmarks)
