"""The queue of the study: the jobs of docs/study/plan.md, in order of priority.

    python -m bench.study run --corpus <folder of the English corpus>   # one worker, one thread; again to resume
    python -m bench.study run --corpus <folder> --only a-150k rivals    # the jobs whose names begin so
    python -m bench.study run --corpus <folder> --gpu --minutes 9       # the larger sizes, on one GPU, in short pieces
    python -m bench.study evaluate --benchmarks <folder>                # finished runs: benchmarks, loss by token
    python -m bench.study list                                          # every job that is known now, and its state
    python -m bench.study records                                       # finished runs -> docs/study/records/*.jsonl

Each job of `bench.study_plan` is one `python train.py` under out/study/; with --benchmarks, the last checkpoint of a
run of some designs (`EVALUATED`) is then evaluated by `nanodisp.evaluate`. Runs that stand in docs/study/records/ are
finished, even if their folders are on another machine. A second worker on the same machine runs other jobs: one whose
folder is in use fails at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bench import study_tokens
from bench.measure import device_name
from bench.study_plan import Losses, Size, gpu_jobs, jobs
from nanodisp.runs.evaluation import EVALUATION, read_evaluation
from nanodisp.runs.metrics import METRICS, read_records

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "study" / "records"
TASKS, EMBEDDING_TASKS = "blimp,lambada,wikitext", "retrieval,similarity,probes"
EVALUATED = ("a", "c", "e", "strong", "tuned")  # designs whose runs are evaluated when they end
EXITED_EARLY = 75  # train.py was asked to stop and has saved


# --- running ---------------------------------------------------------------------------------


def final_loss(folder: Path) -> float | None:
    """The validation loss of a finished run, infinite where it diverged; None for a run that is not finished."""
    error = folder / "error.txt"
    if error.is_file() and "not finite" in error.read_text():
        return math.inf
    if not (folder / "config.yaml").is_file():
        return None
    config = OmegaConf.load(folder / "config.yaml")
    total = math.ceil(config.train.tokens / (config.train.batch_size * config.model.block_size))
    last = [r for r in read_records(folder / METRICS) if r["split"] == "val" and r["step"] >= total]
    saved = (folder / "checkpoints" / f"step_{total:08d}").is_dir()
    return (math.inf if last[-1]["loss"] is None else last[-1]["loss"]) if last and saved else None


def known_losses(out: Path) -> Losses:
    """Of the runs that are recorded, and of those in `out`."""
    losses: Losses = {}
    for file in sorted(RECORDS.glob("*.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            losses[record["name"]] = math.inf if record["loss"] is None else record["loss"]
    for folder in sorted(out.glob("*/")):
        if (loss := final_loss(folder)) is not None:
            losses[folder.name] = loss
    return losses


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
    if study_tokens.read(folder).keys() != set(study_tokens.KINDS):
        code = call(("-m", "bench.study_tokens", str(folder)), log) or code
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
        if code == EXITED_EARLY:
            return
        if code != 0:
            failed.add(todo.name)
        print(f"    exit code {code}, loss {final_loss(folder)}", flush=True)
        if code == 0 and benchmarks is not None and todo.name.partition("-")[0] in EVALUATED:
            evaluate(folder, benchmarks)


# --- records ---------------------------------------------------------------------------------


def compact(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Some keys of a metrics record, with floats rounded."""

    def shorten(value: Any) -> Any:
        if isinstance(value, list):
            return [shorten(item) for item in value]
        return round(value, 6 if abs(value) > 1 else 5) if isinstance(value, float) else value

    return {key: shorten(record[key]) for key in keys if record.get(key) is not None}


def record_of(folder: Path) -> dict[str, Any]:
    """Everything about a finished run that the report needs, without paths."""
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for key in ("wandb", "out_dir", "run_name", "device", "resume", "dry_run", "tensorboard", "command"):
        config.pop(key, None)
    for key in ("path", "folder"):
        config["data"].pop(key, None)
    config["data"]["tokenizer"] = Path(config["data"]["tokenizer"]).name
    for section, key in ((config, "init_from"), (config["intervention"], "teacher")):
        section[key] = section[key] and Path(section[key]).name
    metrics = read_records(folder / METRICS)
    validations = [r for r in metrics if r["split"] == "val"]
    model = config["model"]
    size = Size(model["n_layer"], model["n_embd"], model["n_head"], block_size=model["block_size"])
    about = json.loads((folder / "machine.json").read_text())
    evaluated = read_evaluation(folder / EVALUATION)
    train = ("step", "loss", "dispersion", "grad_norm", "tokens_per_second")
    return {
        **{"name": folder.name, "design": folder.name.partition("-")[0], "loss": validations[-1]["loss"]},
        **{"non_embedding": size.non_embedding, "parameters": size.total(model["vocab_size"])},
        **{"seconds": validations[-1]["seconds"], **about},
        "val": [compact(r, ("step", "loss", "bpb", "mean_cosine")) for r in validations],
        "train": [compact(r, train) for r in metrics if r["split"] == "train"],
        "condensation": [compact(r, ("step", "mean_cosine")) for r in metrics if r["split"] == "condensation"],
        **study_tokens.read(folder),
        "tasks": {task: tasks_entry(entry) for task, entry in evaluated.get("tasks", {}).items()},
        "config": config,
    }


def tasks_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A benchmark in a record: its number of examples, and each metric's value."""
    return {"examples": entry["examples"], **{name: figure["value"] for name, figure in entry["metrics"].items()}}


def write_records(out: Path) -> None:
    """Add the finished runs of `out` to the records, one file for each design; failed ones with null as their loss."""
    by_design: dict[str, dict[str, str]] = {}
    for file in RECORDS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            by_design.setdefault(file.stem, {})[json.loads(line)["name"]] = line
    for folder in sorted(out.glob("*/")):
        if (loss := final_loss(folder)) is not None:
            record = record_of(folder) | ({"loss": None} if loss == math.inf else {})
            by_design.setdefault(record["design"], {})[folder.name] = json.dumps(record, separators=(",", ":"))
    RECORDS.mkdir(parents=True, exist_ok=True)
    for design, lines in sorted(by_design.items()):
        (RECORDS / f"{design}.jsonl").write_text("".join(lines[name] + "\n" for name in sorted(lines)))
        print(f"{design}: {len(lines)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "evaluate", "list", "records"))
    parser.add_argument("--corpus", type=Path, help="the folder of the English corpus, for run")
    parser.add_argument("--benchmarks", type=Path, help="a folder of benchmarks, for run and evaluate")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study", help="the runs, for list and records")
    parser.add_argument("--gpu", action="store_true", help="the sizes for one GPU, for run and list")
    parser.add_argument("--minutes", type=float, default=math.inf, help="run: save and stop after so long")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="run, evaluate: runs of this name, or those whose names begin so",
    )
    arguments = parser.parse_args()
    if arguments.action == "run":
        if arguments.corpus is None:
            parser.error("run needs --corpus, the folder of the English corpus")
        benchmarks = arguments.benchmarks and arguments.benchmarks.resolve()
        work(arguments.out, arguments.corpus.resolve(), benchmarks, arguments.gpu, arguments.minutes, arguments.only)
    elif arguments.action == "evaluate":
        if arguments.benchmarks is None:
            parser.error("evaluate needs --benchmarks, a folder of benchmarks")
        finished = [each for each in sorted(arguments.out.glob("*/")) if final_loss(each) not in (None, math.inf)]
        wanted = chosen({each.name for each in finished}, arguments.only)
        for folder in (each for each in finished if each.name in wanted):
            evaluate(folder, arguments.benchmarks.resolve())
    elif arguments.action == "records":
        write_records(arguments.out)
    else:
        losses = known_losses(arguments.out)
        for name in dict.fromkeys(j.name for j in (gpu_jobs(losses) if arguments.gpu else jobs(losses))):
            print(f"{name:40} {losses.get(name, 'to do')}")


if __name__ == "__main__":
    main()
