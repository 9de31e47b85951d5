"""What waiting threads cost: several small training runs side by side under several OpenMP settings.

    python -m bench.threads [--seconds 5] [--rounds 5] [--runs 1 2 4]

OpenMP's threads spin while they wait for each other. On a machine that other processes use as well, a thread spins for
one that has no core, and everything slows down. Each kind trains a small GPT on random tokens in 1, 2 or 4 processes at
once; kinds alternate. Figures are tokens per second of all processes together, relative to one default process alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanodisp.process import SPIN_COUNT

KINDS: dict[str, dict[str, str]] = {
    "default": {},  # OpenMP's own
    "nanodisp": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 3_000, 10_000, 30_000)},
}
SIZES = {"nano": (6, 4, 128, 256, 8), "nanogpt_cpu": (4, 4, 128, 64, 12)}  # layers, heads, width, context, sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of training in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4], help="processes side by side")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # a process of a round: the folder where they meet
    arguments = parser.parse_args()
    if arguments.work is not None:
        print(work(arguments.work, arguments.seconds, arguments.size))
        return

    from bench import measure

    rates: dict[str, list[float]] = {f"{n} x {kind}": [] for n in arguments.runs for kind in arguments.kinds}
    for _ in range(arguments.rounds):
        for name, found in rates.items():
            n, _, kind = name.partition(" x ")
            found.append(together(int(n), KINDS[kind], arguments.seconds, arguments.size))
    alone = rates[f"1 x {'default' if 'default' in arguments.kinds else arguments.kinds[0]}"]
    report: dict[str, Any] = {"device": measure.device_name(), "size": arguments.size, "kinds": {}}
    print(
        f"{report['device']}, {os.cpu_count()} cores, {arguments.size}: {statistics.median(alone):,.0f} tokens/s alone"
    )
    for name, found in rates.items():
        ratio = statistics.median(rate / base for rate, base in zip(found, alone, strict=True))
        report["kinds"][name] = {"tokens_per_second": statistics.median(found), "of_one_alone": ratio}
        print(f"{name:16} {statistics.median(found):9,.0f} tokens/s together  {ratio:5.2f} of one alone")
    measure.write(f"threads-{arguments.size}", report)


def together(n: int, environment: dict[str, str], seconds: float, size: str) -> float:
    """Tokens per second of `n` processes that train at the same time."""
    variables = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    variables |= environment
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.threads", "--work", folder, "--seconds", str(seconds), "--size", size]
        workers = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(n)]
        while len(list(Path(folder).glob("ready-*"))) < n:
            time.sleep(0.05)
        (Path(folder) / "go").touch()
        return sum(float(worker.communicate()[0]) for worker in workers)


def work(folder: Path, seconds: float, size: str) -> float:
    """Train for some seconds, once all processes are ready; tokens per second."""
    import torch  # here: the process that starts the others does without

    from nanodisp.models.gpt import GPT, GPTConfig

    n_layer, n_head, n_embd, block_size, batch_size = SIZES[size]
    model = GPT(GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size=257))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        x = torch.randint(257, (batch_size, block_size))
        model(x, x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    (folder / f"ready-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps * batch_size * block_size / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
