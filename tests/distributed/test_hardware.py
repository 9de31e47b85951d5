"""What a machine has decides the dtype, and a run keeps the one that it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf

from nanodisp.distributed import hardware, start
from nanodisp.plan import choose_dtype

Run = Callable[..., Path]
CPU = torch.device("cpu")


def has(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512_bf16: bool, faster: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(hardware, "bfloat16_is_faster", lambda: faster)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "faster", "dtype"),
    [
        (True, True, False, torch.bfloat16),
        (False, True, True, torch.bfloat16),
        (False, True, False, torch.float32),
        (False, False, True, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it_faster(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, faster: bool, dtype: torch.dtype
) -> None:
    has(monkeypatch, amx=amx, avx512_bf16=avx512_bf16, faster=faster)
    assert hardware.matmul_dtype("auto", CPU) == dtype
    assert hardware.matmul_dtype("float32", CPU) == torch.float32
    assert hardware.matmul_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_measurement_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    hardware.bfloat16_is_faster.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_keeps_its_dtype_where_the_machine_would_choose_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.dtype=auto", "train.checkpoint_interval=2")
    has(monkeypatch, amx=True, avx512_bf16=True, faster=True)
    folder = run("train.steps=2", *settings)
    has(monkeypatch, amx=False, avx512_bf16=False, faster=False)
    run("train.steps=4", *settings)
    assert OmegaConf.load(folder / "config.yaml").train.dtype == "bfloat16"
    assert OmegaConf.load(run("train.steps=2", *settings, name="new") / "config.yaml").train.dtype == "float32"


def test_a_dtype_that_does_not_exist_is_not_taken_from_a_runs_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {dtype: float99}")
    config = compose(f"out_dir={tmp_path}", "run_name=run", "device=cpu")
    assert choose_dtype(config, start("cpu")) in (torch.float32, torch.bfloat16)
