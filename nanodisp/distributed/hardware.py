"""What this machine has: number formats, FLOP/s, a compiler, memory."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil

import torch


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
    """A dtype by name; "auto" is bfloat16 where the hardware multiplies bfloat16 matrices, else float32.

    NVIDIA GPUs do from Ampere on, CPUs with AVX512-BF16 (which includes those with AMX).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


COMPILE_FROM = {"cuda": 2e16, "cpu": 1e15}  # FLOPs of a few minutes' work, ten times the time of compiling


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
