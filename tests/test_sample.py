"""Generating text from a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import sample
from nanodisp.distributed import hardware
from nanodisp.errors import UserError


@pytest.fixture
def trained(run: Callable[..., Path]) -> Path:
    return run("train.steps=3", "train.sample_tokens=0")


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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checkpoint=nowhere", "holds no checkpoint"),
        ("top_kk=3", "top_kk=3"),
        ("top_k=0", "top_k=0 must be at least 1"),
        ("top_p=2", "top_p=2.0"),
        ("num_samples=0", "num_samples=0 must be at least 1"),
        ("dtype=float16", "dtype=float16 is unknown; choose one of auto, float32, bfloat16"),
        ("temperature=cold", "cold"),
    ],
)
def test_mistakes_are_reported_in_one_line(trained: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        sample.main([f"checkpoint={trained}", argument])
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_required() -> None:
    with pytest.raises(UserError, match="checkpoint"):
        sample.main([])
