"""Times reading batches from shards, against copying as many bytes in memory.

    python -m bench.loader

The shards are two files of random tokens. A batch is idx and targets, 16 bytes per token. Batches are read in
the order of training, so the occasional work of a step (the order of the next windows) is included. The two
alternate, in one thread.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from bench.measure import Step
from nanodisp.data.batches import Batches
from nanodisp.data.shards import Tokens, open_split, write_shard

SHAPES = {"nanogpt_cpu": (12, 64), "nano": (8, 256), "micro": (32, 256), "gpt2": (16, 1024), "gpt2, 0.5M": (512, 1024)}
AT_LEAST = 1 << 20  # tokens per measurement


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--megatokens", type=int, default=40, help="of the shards")
    parser.add_argument("--rounds", type=measure.positive, default=15)
    arguments = parser.parse_args()
    report: dict[str, Any] = {**vars(arguments), "device": measure.device_name(), "shapes": {}}
    print(report["device"])
    with tempfile.TemporaryDirectory() as folder:
        tokens = random_shards(Path(folder), arguments.megatokens * 10**6)
        for name, (batch_size, block_size) in SHAPES.items():
            n_batches = -(-AT_LEAST // (batch_size * block_size))
            steps = steps_of(tokens, batch_size, block_size, n_batches)
            times = measure.alternate(steps, measure.wall_clock, arguments.rounds)
            n_tokens = n_batches * batch_size * block_size
            figures = {kind: measure.summary(milliseconds) for kind, milliseconds in times.items()}
            rates = {kind: n_tokens / of["median_ms"] * 1e3 for kind, of in figures.items()}
            report["shapes"][name] = {"batch_size": batch_size, "block_size": block_size, "tokens_per_second": rates}
            each = figures["batches"]["median_ms"] / n_batches
            print(f"{name:12}{batch_size:4} x {block_size:<5}{each:8.3f} ms a batch", end="")
            print("".join(f"  {kind} {rate / 1e6:7.1f} M tokens/s" for kind, rate in rates.items()))
    measure.write("loader", report)


def random_shards(folder: Path, n_tokens: int) -> Tokens:
    """A training split with GPT-2's vocabulary, in two files."""
    tokens = np.random.default_rng(0).integers(50257, size=n_tokens, dtype=np.uint16)
    for number, part in enumerate(np.array_split(tokens, 2)):
        write_shard(folder / f"train_{number}.bin", part)
    return open_split(folder, "train")


def steps_of(tokens: Tokens, batch_size: int, block_size: int, n_batches: int) -> dict[str, Step]:
    batches = Batches(tokens, block_size=block_size, batch_size=batch_size, seed=0, vocab_size=50257)
    steps = itertools.count()
    source = np.zeros((2, batch_size, block_size), np.int64)

    def read() -> None:
        for step in itertools.islice(steps, n_batches):
            batches.batch(step)

    def copy() -> None:
        for _ in range(n_batches):
            source.copy()

    return {"batches": read, "copy": copy}


if __name__ == "__main__":
    main()
