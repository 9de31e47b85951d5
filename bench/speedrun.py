"""Time to nanoGPT's final loss on its own CPU recipe: experiment=speedrun against nanoGPT's train.py, in alternation.

    python -m bench.speedrun --baseline <folder of a nanoGPT checkout> --text <tiny shakespeare>

Both train on the first nine tenths of the text and are validated on the rest. The clock runs from the start of the
process (`python train.py …`, imports included) to the line with its last validation loss. Preparing the data is not
timed: characters for nanoGPT; for nanodisp a vocabulary, trained on the training text alone, and its tokens. nanoGPT's
loss is an estimate on 20 random batches, as its README's command asks for; nanodisp's is over all of the validation
text, in nats per byte. The text is ASCII, so a character is a byte.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import measure

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.886  # nats per byte: what nanoGPT's recipe ends with
VOCAB_SIZE = 2048
NANOGPT = (  # its README's command for a CPU
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000"),
    *("--lr_decay_iters=2000", "--dropout=0.0"),
)
LAST = {
    "nanoGPT": re.compile(r"step 2000: .*val loss (?P<loss>[\d.]+)"),
    "nanodisp": re.compile(r"step (?P<step>\d+)/(?P=step) +val +loss .*bpb (?P<bpb>[\d.]+)"),
}


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--baseline", type=Path, required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--text", type=Path, required=True, help="tiny shakespeare, one file")
    parser.add_argument("--rounds", type=measure.positive, default=3)
    arguments = parser.parse_args()
    if not (arguments.baseline / "train.py").is_file():
        parser.error(f"--baseline {arguments.baseline} holds no train.py: give the folder of a nanoGPT checkout")
    if not arguments.text.is_file():
        parser.error(f"--text {arguments.text} is not a file")
    times: dict[str, list[float]] = {kind: [] for kind in LAST}
    losses: dict[str, list[float]] = {kind: [] for kind in LAST}
    with tempfile.TemporaryDirectory() as name:
        nanogpt, folder = Path(name) / "nanogpt", Path(name)
        prepare_nanogpt(nanogpt, arguments.baseline, arguments.text)
        ours = ("experiment=speedrun", *prepare_nanodisp(folder, arguments.text), f"out_dir={folder / 'out'}")
        for seed in range(1, arguments.rounds + 1):
            for kind, command, where in (("nanoGPT", NANOGPT, nanogpt), ("nanodisp", (*ours, f"seed={seed}"), ROOT)):
                seconds, loss = time_to_loss(kind, command, where)
                print(f"round {seed}  {kind:10}{seconds:8.1f} s  {loss:.4f} nats per byte", flush=True)
                times[kind].append(seconds)
                losses[kind].append(loss)

    ratio = statistics.median(b / a for a, b in zip(times["nanoGPT"], times["nanodisp"], strict=True))
    report: dict[str, Any] = {**vars(arguments), "device": measure.device_name(), "times": times, "losses": losses}
    report |= {"ratio": ratio, "load_average": os.getloadavg()}
    print(f"{report['device']}, medians of {arguments.rounds} rounds:")
    for kind in LAST:
        print(f"{kind:10}{statistics.median(times[kind]):8.1f} s  {statistics.median(losses[kind]):.4f} nats per byte")
    reached = "all at most" if max(losses["nanodisp"]) <= TARGET else "not all at most"
    print(f"nanodisp needs {ratio:.3f} of nanoGPT's time; its losses are {reached} {TARGET}")
    measure.write("speedrun", report)


def prepare_nanogpt(folder: Path, checkout: Path, text: Path) -> None:
    """Copy the checkout and prepare its character-level data there."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl"))
    data = folder / "data" / "shakespeare_char"
    shutil.copyfile(text, data / "input.txt")
    python(str(data / "prepare.py"), where=folder)


def prepare_nanodisp(folder: Path, text: Path) -> tuple[str, ...]:
    """Prepare bytes, the vocabulary of their training split, and its tokens; returns the keys of train.py."""
    copy, ranks = folder / "shakespeare.txt", folder / f"shakespeare{VOCAB_SIZE}.tiktoken"
    shutil.copyfile(text, copy)
    prepare = ("data/text/prepare.py", f"path={copy}", f"folder={folder}")
    shards = python(*prepare, "tokenizer=byte").splitlines()[0]
    python("-m", "nanodisp.data.tokenizer", "train", f"text={shards}", f"vocab_size={VOCAB_SIZE}", f"to={ranks}")
    python(*prepare, f"tokenizer={ranks}")
    return f"data.path={copy}", f"data.folder={folder}", f"data.tokenizer={ranks}"


def python(*arguments: str, where: Path = ROOT) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=where, check=True, stdout=subprocess.PIPE, text=True).stdout


def time_to_loss(kind: str, arguments: tuple[str, ...], where: Path) -> tuple[float, float]:
    """Seconds from the start of `python train.py` to the line with its last validation loss, and that in nats."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command, seconds, loss, output = [sys.executable, "train.py", *arguments], 0.0, math.nan, []
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if math.isnan(loss) and (found := LAST[kind].search(line)):
                figures = found.groupdict()
                seconds = time.perf_counter() - began
                loss = float(figures["loss"]) if "loss" in figures else float(figures["bpb"]) * math.log(2)
    if process.returncode != 0 or math.isnan(loss):
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(output[-20:])}")
    return seconds, loss


if __name__ == "__main__":
    main()
