"""The kernels on machines unlike this one: compiled for GPUs that are not present, and without Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def run_python(*arguments: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, *arguments], env=clean | environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


GPUS = {  # compute capability -> the instruction of its tensor cores, and its shared memory
    80: ("mma.sync", 163 * 1024),
    90: ("wgmma.mma_async", 227 * 1024),
    100: ("tcgen05.mma", 227 * 1024),
    120: ("mma.sync", 99 * 1024),
}


def test_the_kernels_compile_for_every_gpu(tmp_path: Path) -> None:
    program = Path(__file__).with_name("aot_compile.py")
    output = run_python(str(program), *map(str, GPUS), TRITON_CACHE_DIR=str(tmp_path))
    reports = [json.loads(line) for line in output.splitlines()]
    assert [report["capability"] for report in reports] == [gpu for gpu in GPUS for _ in range(12)]
    for report in reports:
        tensor_core_instruction, shared_memory = GPUS[report["capability"]]
        assert report["stack"] == report["local"] == 0, f"spilled registers: {report}"
        assert report["shared"] <= shared_memory, report
        if report["kernel"].startswith(("pairs", "gradient")):
            assert report["matmuls"] == [tensor_core_instruction], report


def test_without_triton_the_package_works_and_the_triton_backend_says_so() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from nanodisp import DispersionLoss
print(DispersionLoss()(torch.arange(12.0).reshape(1, 4, 3)).isfinite().item())
try:
    DispersionLoss(backend="triton")
except ValueError as error:
    print(error)
"""
    finite, message = run_python("-c", program).splitlines()
    assert finite == "True"
    assert "backend=triton is not available: triton is not installed" in message
