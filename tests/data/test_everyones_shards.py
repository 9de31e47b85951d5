"""Training on the shards of other projects, byte for byte as those projects write them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import records
from omegaconf import OmegaConf

from nanodisp.data.corpus import open_corpus
from nanodisp.errors import UserError

Run = Callable[..., Path]
STEPS = ("train.steps=4", "train.eval_windows=2", "train.log_interval=1", "train.batch_size=2")


def zipf(n: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Tokens with frequent low ids; the first is the highest id."""
    ranks = np.random.default_rng(seed).zipf(1.3, n)
    return [vocab_size - 1, *(ranks % vocab_size).tolist()]


def with_header(path: Path, tokens: list[int], magic: int, version: int, code: str) -> None:
    """llm.c's `write_datafile`, and modded-nanogpt's: 256 int32, then the tokens."""
    header = struct.pack("<3i", magic, version, len(tokens)) + bytes(4 * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{code}", *tokens))


def npy(path: Path, tokens: list[int]) -> None:
    """Version 1.0 of numpy's format: the header is padded so that the tokens begin at a multiple of 64."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(tokens)},), }}"
    header = header.ljust(-(-(10 + len(header) + 1) // 64) * 64 - 11) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    path.write_bytes(start + struct.pack(f"<{len(tokens)}H", *tokens))


def llmc_gpt2(folder: Path) -> None:
    with_header(folder / "tiny_shakespeare_val.bin", zipf(100, 50_257, 1), 20240520, 1, "H")
    with_header(folder / "tiny_shakespeare_train.bin", zipf(400, 50_257, 2), 20240520, 1, "H")
    (folder / "tiny_shakespeare.txt").write_text("First Citizen:\n")  # its script leaves this file beside them


def llmc_llama3(folder: Path) -> None:
    with_header(folder / "edu_fineweb_val_000000.bin", zipf(100, 128_002, 1), 20240801, 7, "I")
    for number in (1, 2):
        with_header(folder / f"edu_fineweb_train_{number:06d}.bin", zipf(200, 128_002, number), 20240801, 7, "I")


def modded_nanogpt(folder: Path) -> None:
    with_header(folder / "fineweb_val_000000.bin", zipf(100, 50_257, 1), 20240520, 1, "H")
    for number in (1, 2):
        with_header(folder / f"fineweb_train_{number:06d}.bin", zipf(200, 50_257, number), 20240520, 1, "H")


def nanogpt(folder: Path) -> None:
    for split, n, seed in (("train", 400, 1), ("val", 100, 2)):
        (folder / f"{split}.bin").write_bytes(struct.pack(f"<{n + 1}H", *zipf(n, 50_257, seed)))


def nanogpt_char(folder: Path) -> None:
    (folder / "train.bin").write_bytes(struct.pack("<401H", *zipf(400, 65, 1)))
    (folder / "val.bin").write_bytes(struct.pack("<101H", *zipf(100, 60, 2)))  # not every character is in both
    # a pickle that would create the folder `sprung`: c<module>\n<name>\n(S'<argument>'\ntR.
    (folder / "meta.pkl").write_bytes(f"cos\nmkdir\n(S'{folder / 'sprung'}'\ntR.".encode())


def build_nanogpt(folder: Path) -> None:
    npy(folder / "edufineweb_val_000000.npy", zipf(100, 50_257, 1))
    for number in (1, 2):
        npy(folder / f"edufineweb_train_{number:06d}.npy", zipf(200, 50_257, number))


@pytest.mark.parametrize(
    ("writer", "settings", "vocab_size", "trains_on"),
    [
        (llmc_gpt2, (), 50_257, zipf(400, 50_257, 2)),
        (llmc_llama3, ("data.tokenizer=none",), 128_002, zipf(200, 128_002, 1) + zipf(200, 128_002, 2)),
        (llmc_llama3, ("model.vocab_size=128256",), 128_256, zipf(200, 128_002, 1) + zipf(200, 128_002, 2)),
        (modded_nanogpt, ("model.vocab_size=50304",), 50_304, zipf(200, 50_257, 1) + zipf(200, 50_257, 2)),
        (nanogpt, (), 50_257, zipf(400, 50_257, 1)),
        (nanogpt_char, (), 65, zipf(400, 65, 1)),
        (nanogpt_char, ("model.vocab_size=96",), 96, zipf(400, 65, 1)),
        (nanogpt_char, ("data.tokenizer=byte",), 257, zipf(400, 65, 1)),
        (build_nanogpt, (), 50_257, zipf(200, 50_257, 1) + zipf(200, 50_257, 2)),
    ],
)
def test_training_reads_them_unchanged(
    run: Run,
    tmp_path: Path,
    writer: Callable[[Path], None],
    settings: tuple[str, ...],
    vocab_size: int,
    trains_on: list[int],
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    writer(shards)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    folder = run(*STEPS, "train.sample_tokens=0", f"data.path={shards}", *settings)
    assert OmegaConf.load(folder / "config.yaml").model.vocab_size == vocab_size
    val = [record["loss"] for record in records(folder, "val")]
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3, 4]
    assert val[1] < val[0]
    train = open_corpus(shards, "gpt2").train
    assert train.read(0, len(train)).tolist() == trains_on
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before, "no pickle among them was opened"


def test_a_run_on_characters_has_no_sample_and_is_resumed_like_any_other(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    nanogpt_char(shards)
    folder = run(*STEPS, f"data.path={shards}")
    assert "(no sample: tokenizer=none cannot encode text" in capsys.readouterr().out
    assert OmegaConf.load(folder / "config.yaml").data.tokenizer == "none"
    run(*STEPS, f"data.path={shards}")
    assert "the run is complete at step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("writer", "settings", "message"),
    [
        (llmc_llama3, (), r"holds token 128001, but the vocabulary ends at 50256; .*data.tokenizer, model.vocab_size"),
        (llmc_llama3, ("data.tokenizer=llama-3",), "tokenizer=llama-3 is unknown; choose"),
        (llmc_llama3, ("data.tokenizer=gone.tiktoken",), r"tokenizer file gone.tiktoken cannot be read"),
        (nanogpt_char, ("model.vocab_size=64",), r"train.bin holds token 64, but the vocabulary ends at 63"),
    ],
)
def test_an_unknown_or_too_small_vocabulary_is_reported(
    run: Run, tmp_path: Path, writer: Callable[[Path], None], settings: tuple[str, ...], message: str
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    writer(shards)
    with pytest.raises(UserError, match=message) as error:
        run(*STEPS, f"data.path={shards}", *settings)
    assert "\n" not in str(error.value)


def test_the_last_split_in_a_name_decides(tmp_path: Path) -> None:
    for name, token in (("constrained_val_000000.bin", 1), ("constrained_train_000001.bin", 2)):
        with_header(tmp_path / name, [token], 20240520, 1, "H")
    corpus = open_corpus(tmp_path, "gpt2")
    assert (corpus.val.read(0, 1).tolist(), corpus.train.read(0, 1).tolist()) == ([1], [2])
    assert (len(corpus.val), len(corpus.train)) == (1, 1)


def test_the_evaluation_files_of_llmc_are_not_read_as_tokens(tmp_path: Path) -> None:
    with_header(tmp_path / "hellaswag_val.bin", [65_535, 12], 20240522, 1, "H")
    with_header(tmp_path / "hellaswag_train.bin", [1], 20240520, 1, "H")
    with pytest.raises(UserError, match=r"holds questions for train\.eval_task, not tokens: move it to another folder"):
        open_corpus(tmp_path, "gpt2")
