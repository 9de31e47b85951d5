"""Compiled runs: their curve, where compiled code is kept, and that a second start loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch._functorch.config
import torch._inductor.config
from conftest import ROOT, losses

import train
from nanodisp.distributed import hardware
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training.compiled import keep_compiled, version_of

Run = Callable[..., Path]
KEPT_IN = """
import os
import torch._inductor.config  # sets a default
from nanodisp.training.compiled import keep_compiled
for theirs in (None, "/theirs"):
    if theirs:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = theirs
    keep_compiled()
    print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
def test_compiled_code_is_kept_in_the_users_cache_folder_unless_another_is_named(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", KEPT_IN], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [f"{tmp_path}/nanodisp/torch", "/theirs"]


@pytest.mark.parametrize("changed", ["models/head.py", "dispersion/loss.py", "dispersion/kernels/loops.py"])
def test_another_source_has_graphs_of_its_own(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=False),
        torch._inductor.config.patch(unsafe_marked_cacheable_functions={}),
    ):
        keep_compiled()
        hashed = torch._inductor.config.save_config_portable()  # what PyTorch makes its key of
    shutil.copytree(ROOT / "nanodisp", tmp_path / "nanodisp")
    before = version_of(tmp_path / "nanodisp")
    assert set(hashed["unsafe_marked_cacheable_functions"].values()) == {before}
    with (tmp_path / "nanodisp" / changed).open("a") as file:
        file.write("#")
    assert version_of(tmp_path / "nanodisp") != before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_has_the_same_curve_compiles_in_its_first_steps_only_and_in_no_second_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from torch._dynamo.utils import counters

    version = uuid.uuid4().hex  # graphs of a version of their own: none is kept yet, while kernels may be
    monkeypatch.setattr("nanodisp.training.compiled.version_of", lambda _: version)
    settings = ("train.steps=6", "train.log_interval=1", "train.eval_interval=2", "train.eval_windows=6")  # 4, then 2
    settings += ("model.n_layer=1", "train.sample_tokens=0")
    plain = run(*settings, name="plain")
    counters.clear()
    compiled_by_step = []
    update = train.optim.update

    def counting(*arguments: Any) -> torch.Tensor:
        compiled_by_step.append(counters["stats"]["unique_graphs"])
        return update(*arguments)

    monkeypatch.setattr(train.optim, "update", counting)
    compiled = run(*settings, "train.compile=true", name="compiled")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert not counters["graph_break"]
    assert compiled_by_step == [3] * 6, "the step, and the validation of a full and of a partial batch"
    assert counters["aot_autograd"]["autograd_cache_miss"] == 3
    counters.clear()
    again = run(*settings, "train.compile=true", name="again")
    assert counters["aot_autograd"]["autograd_cache_hit"] == 3
    assert losses(again) == losses(compiled)


@pytest.mark.parametrize(("steps", "expected"), [(800, False), (400_000, True)])
def test_compile_is_chosen_when_it_pays(steps: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "which", lambda _: "/usr/bin/g++")
    with torch.device("meta"):
        flops_per_token = GPT(GPTConfig(6, 4, 128, 256, vocab_size=257)).flops_per_token()
    assert hardware.compile_pays(torch.device("cpu"), steps * 2048 * flops_per_token) is expected
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    assert not hardware.compile_pays(torch.device("cpu"), 1e30)
