"""Generating text from a checkpoint."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, records
from tiny_models import export, write_checkpointed_run, write_ranks_file

import sample
from nanodisp.distributed import hardware
from nanodisp.errors import UserError
from nanodisp.runs import checkpoint


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    sample.main(arguments)
    return capsys.readouterr().out


@pytest.mark.slow
def test_standard_output_is_the_prompt_and_its_continuation(trained: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), f"checkpoint={trained}", "prompt=def x: ", "max_new_tokens=20"],
        capture_output=True,
        check=True,
    )
    out = result.stdout.decode()
    assert out.startswith("def x: ")
    assert out.endswith("\n")
    assert len(out) > len("def x: \n")


def test_the_seed_decides_the_text_unless_it_is_greedy(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = (f"checkpoint={trained}", "prompt=ab", "max_new_tokens=30")
    assert text(capsys, *base, "seed=1") == text(capsys, *base, "seed=1")
    assert text(capsys, *base, "seed=1") != text(capsys, *base, "seed=2")
    greedy = [text(capsys, *base, "temperature=0", f"seed={seed}", "top_k=null") for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_samples_generated_together_equal_those_of_each_seed_alone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (f"checkpoint={trained}", "prompt=ab", "max_new_tokens=30")
    alone = [text(capsys, *base, f"seed={seed}") for seed in (5, 6, 7)]
    for batch_size in (1, 2, 8):
        assert text(capsys, *base, "seed=5", "num_samples=3", f"batch_size={batch_size}") == "---\n".join(alone)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = (f"checkpoint={trained}", "prompt=ab", "max_new_tokens=30", "temperature=0")
    assert text(capsys, *base, "compile=true") == text(capsys, *base)


def test_weights_are_float32_by_default(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype_of(*arguments: str) -> torch.dtype:
        seen = []
        monkeypatch.setattr(sample, "generate", lambda model, *_, **__: seen.append(model.wte.weight.dtype) or iter(()))
        text(capsys, f"checkpoint={trained}", "device=cpu", *arguments)
        return seen[0]

    assert dtype_of() == dtype_of("dtype=float32") == torch.float32
    assert dtype_of("dtype=bfloat16") == torch.bfloat16
    assert dtype_of("dtype=auto") == hardware.matmul_dtype("auto", torch.device("cpu"))


def test_any_prompt_is_accepted_even_an_empty_one(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = (f"checkpoint={trained}", "max_new_tokens=0")
    assert text(capsys, *base, "prompt=a = {b: 1}  ") == "a = {b: 1}  \n"
    assert text(capsys, *base, "prompt=é😀") == "é😀\n"
    assert text(capsys, f"checkpoint={trained}", "max_new_tokens=5") != "\n"
    assert text(capsys, *base, f"prompt={'ab' * 30}") == "ab" * 30 + "\n"
    sample.main([*base, f"prompt={'ab' * 30}"])
    assert "the prompt has 60 tokens: the model reads the last 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("top_kk=3", "top_kk=3"),
        ("top_k=0", "top_k=0 must be at least 1"),
        ("top_p=2", "top_p=2.0"),
        ("num_samples=0", "num_samples=0 must be at least 1"),
        ("dtype=float16", "dtype=float16 is unknown; choose one of auto, float32, bfloat16"),
        ("temperature=cold", "cold"),
        ("prompt_file=nowhere", "prompt_file=nowhere cannot be read: No such file"),
        ("tokenizer=gpt", "tokenizer=gpt is unknown"),
    ],
)
def test_mistakes_are_reported_in_one_line(trained: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        sample.main([f"checkpoint={trained}", argument])
    assert "\n" not in str(error.value)


def test_the_checkpoint_of_a_step_or_of_the_lowest_loss_is_sampled(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    interval = ("train.checkpoint_interval=1", "train.eval_interval=2", "train.keep_last=9")
    folder = run("train.steps=4", "train.sample_tokens=0", "optim.lr=0.1", *interval)
    losses = {record["step"]: record["loss"] for record in records(folder, "val")}
    best = min((2, 4), key=losses.__getitem__)
    base = ("prompt=ab", "max_new_tokens=30", "temperature=0")
    texts = {step: text(capsys, f"checkpoint={folder}@{step}", *base) for step in (1, 2, 4, "best")}
    assert texts["best"] == texts[best] != texts[1]
    assert texts[4] == text(capsys, f"checkpoint={folder}", *base)


def test_a_prompt_comes_from_a_file_or_standard_input(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (f"checkpoint={trained}", "max_new_tokens=9")
    expected = text(capsys, *base, "prompt=é = 1\r\n  ")
    (tmp_path / "prompt").write_bytes("é = 1\r\n  ".encode())
    assert text(capsys, *base, f"prompt_file={tmp_path / 'prompt'}") == expected
    (tmp_path / "prompt.gz").write_bytes(gzip.compress("é = 1\r\n  ".encode("utf-8-sig")))
    assert text(capsys, *base, f"prompt_file={tmp_path / 'prompt.gz'}") == expected
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("é = 1\r\n  ".encode())))
    assert text(capsys, *base, "prompt=-") == expected
    with pytest.raises(UserError, match="give one of them"):
        sample.main([*base, "prompt=a", "prompt_file=b"])
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"prompt is not UTF-8 \(byte 3\)"):
        sample.main([*base, f"prompt_file={tmp_path / 'prompt'}"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"caf\xe9")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 \(byte 3\)"):
        sample.main([*base, "prompt=-"])


def test_a_hugging_face_gpt2_is_sampled_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    source = write_checkpointed_run(tmp_path / "run", str(write_ranks_file(tmp_path / "tiny.tiktoken")))
    folder = export(source, tmp_path / "exported")
    base = ("prompt=the bab", "max_new_tokens=20")
    assert text(capsys, f"checkpoint=hf:{folder}", *base) == text(capsys, f"checkpoint={source}", *base)
    assert text(capsys, f"checkpoint={folder}", *base) == text(capsys, f"checkpoint={source}", *base)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"exported has no tokenizer\.json: give tokenizer="):
        sample.main([f"checkpoint=hf:{folder}", *base])
    given = f"tokenizer={tmp_path / 'tiny.tiktoken'}"
    assert text(capsys, f"checkpoint=hf:{folder}", *base, given) == text(capsys, f"checkpoint={source}", *base)


def test_a_missing_tokenizer_can_be_given_if_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = write_ranks_file(tmp_path / "tiny.tiktoken")
    folder = write_checkpointed_run(tmp_path / "run", str(ranks))
    base = (f"checkpoint={folder}", "prompt=the bab", "max_new_tokens=20")
    expected = text(capsys, *base)
    moved = ranks.rename(tmp_path / "moved.tiktoken")
    with pytest.raises(UserError, match=r"tiny\.tiktoken cannot be read.*; tokenizer=… replaces the run's own"):
        sample.main(base)
    assert text(capsys, *base, f"tokenizer={moved}") == expected
    small = write_checkpointed_run(tmp_path / "byte", "byte")
    with pytest.raises(UserError, match=r"moved\.tiktoken has a vocabulary of 270 tokens, the model of 257"):
        sample.main([f"checkpoint={small}", f"tokenizer={moved}"])


def test_a_checkpoint_is_required() -> None:
    with pytest.raises(UserError, match="checkpoint"):
        sample.main([])
    with pytest.raises(UserError, match="nowhere holds no checkpoint"):
        sample.main(["checkpoint=nowhere"])


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_file_of_a_checkpoint_is_answered_with_its_folder(trained: Path, prefix: str) -> None:
    folder = checkpoint.find(trained)
    with pytest.raises(UserError, match=rf"model\.safetensors is a file: give the folder that it is in, {folder}$"):
        sample.main([f"checkpoint={prefix}{folder / 'model.safetensors'}"])
