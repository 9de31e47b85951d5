"""The queue of the study: the jobs of docs/study/plan.md, in order of priority.

    python -m bench.study run --corpus <folder of the English corpus>   # one worker, one thread; again to resume
    python -m bench.study run --corpus <folder> --only a-150k rivals    # the jobs whose names begin so
    python -m bench.study run --corpus <folder> --gpu --minutes 9       # the larger sizes, on one GPU, in short pieces
    python -m bench.study evaluate --benchmarks <folder>                # finished runs: benchmarks, loss by token
    python -m bench.study list                                          # every job that is known now, and its state
    python -m bench.study records                                       # finished runs -> docs/study/records/*.jsonl

Each job of `plan.py` is one `python train.py` under out/study/; with --benchmarks, the last checkpoint of a
run of some designs (`EVALUATED`) is then evaluated by `nanodisp.evaluate`. Runs that stand in docs/study/records/ are
finished, even if their folders are on another machine. A second worker on the same machine runs other jobs: one whose
folder is in use fails at once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from bench.study.plan import gpu_jobs, jobs
from bench.study.records import ROOT, final_loss, known_losses, write_records
from bench.study.worker import chosen, evaluate, work


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
