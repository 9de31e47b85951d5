"""What this machine has: number formats, FLOP/s, a compiler, memory, and a way to its GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import time
from functools import lru_cache

import torch
from torch import Tensor


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Process-wide settings for training in `dtype` on `device`."""
    if device.type == "cpu":
        keep_memory()
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")  # "high" allows TF32


def keep_memory() -> None:
    """Let the C library keep the memory of freed CPU tensors for those of the next step.

    By default it returns large blocks to the system at once, so that every large tensor is mapped page by page and
    zeroed again. Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never


def matmul_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is bfloat16 where the hardware multiplies bfloat16 matrices faster, else float32.

    NVIDIA GPUs do from Ampere on, CPUs with AMX. CPUs with AVX512-BF16 alone differ by a factor of two either way, so
    there it is measured.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.cpu._is_amx_tile_supported():
        fast = True
    else:
        fast = torch.cpu._is_avx512_bf16_supported() and bfloat16_is_faster()
    return torch.bfloat16 if fast else torch.float32


@lru_cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU's matrix products of a small model take at most 0.9 of the time in bfloat16.

    Casts of the operands included; measured for about 50 ms, once per process: best times, in alternation.
    """
    x, weight = torch.ones(1024, 256), torch.ones(256, 512)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    deadline = time.perf_counter() + 0.05
    rounds = 0
    while rounds < 4 or time.perf_counter() < deadline:
        for dtype in best:
            began = time.perf_counter()
            x.to(dtype) @ weight.to(dtype)
            if rounds > 0:  # the first one prepares
                best[dtype] = min(best[dtype], time.perf_counter() - began)
        rounds += 1
    return best[torch.bfloat16] <= 0.9 * best[torch.float32]


COMPILE_FROM = {"cuda": 2e16, "cpu": 1e15}  # FLOPs: ten times the time of compiling


def compile_pays(device: torch.device, flops: float) -> bool:
    """Whether torch.compile works here and saves more time than it takes, in a run of `flops` FLOPs per rank."""
    compilers = ("cc", "gcc", "clang") if device.type == "cuda" else ("g++",)  # triton compiles its launcher
    found = any(map(shutil.which, compilers)) and (device.type == "cpu" or importlib.util.find_spec("triton"))
    return bool(found) and flops >= COMPILE_FROM[device.type]


# Dense 16-bit matrix products, FLOP/s from the vendor's data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's published rate of 16-bit matrix products; None where it is unknown or `dtype` is float32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU in memory from which a GPU copies without the CPU's help; for a CPU, the tensor."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, without waiting for it; on a CPU the tensor itself."""
    return pinned(tensor, device).to(device, non_blocking=True)
