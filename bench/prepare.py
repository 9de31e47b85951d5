"""Times preparing text as shards on all cores, against tiktoken's own parallel encoding of the same text.

    python -m bench.prepare --tokenizer gpt2.tiktoken --text data/corpus.txt

The text is repeated up to `--megabytes`. Preparation includes everything: reading and hashing the file, tokens,
shards, checksums, the manifest. tiktoken gets the same pieces, already in memory, and returns lists of integers
(`encode_ordinary_batch`, one thread per core). The two alternate.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from bench import measure
from nanodisp.data.documents import cut
from nanodisp.data.prepare import DataConfig, prepare_files
from nanodisp.data.tokenizer import TiktokenTokenizer, load_tokenizer


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--tokenizer", required=True, help="gpt2 or the path of a .tiktoken file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text")
    parser.add_argument("--megabytes", type=float, default=48)
    parser.add_argument("--rounds", type=measure.positive, default=5)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    if not isinstance(tokenizer, TiktokenTokenizer):
        parser.error(f"--tokenizer {arguments.tokenizer} is not a tiktoken vocabulary")
    encoding, cores = tokenizer.encoding, os.cpu_count() or 1

    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in arguments.text)
    text *= max(1, round(arguments.megabytes * 1e6 / len(text.encode())))
    megabytes = len(text.encode()) / 1e6
    pieces = [part for part, _ in cut(text)]
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), itertools.count()
        (folder / "text.txt").write_text(text, encoding="utf-8")

        def prepare() -> None:
            into = folder / str(next(numbers))
            config = DataConfig(name="text", tokenizer=arguments.tokenizer, folder=str(into))
            with contextlib.redirect_stderr(io.StringIO()):
                prepare_files(config, [folder / "text.txt"], folder, "text")

        steps = {
            "nanodisp": prepare,
            "tiktoken": lambda: encoding.encode_ordinary_batch(pieces, num_threads=cores),
        }
        times = measure.alternate(steps, measure.wall_clock, arguments.rounds, warmup=1)

    given = {**vars(arguments), "tokenizer": Path(arguments.tokenizer).name}
    report: dict[str, Any] = {**given, "device": f"{measure.device_name()}, {cores} cores", "kinds": {}}
    print(f"{report['device']}: {megabytes:.0f} MB")
    for kind, milliseconds in times.items():
        figures = measure.summary(milliseconds)
        report["kinds"][kind] = {**figures, "megabytes_per_second": megabytes / figures["median_ms"] * 1e3}
        print(f"{kind:10}{measure.show(figures)}ms{report['kinds'][kind]['megabytes_per_second']:8.1f} MB/s")
    report["share"] = 1 / (1 + measure.overhead(times["nanodisp"], times["tiktoken"]))
    print(f"nanodisp's rate is {report['share']:.0%} of tiktoken's")
    measure.write("prepare", report)


if __name__ == "__main__":
    main()
