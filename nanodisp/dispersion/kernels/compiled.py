"""The loops of `loops.py`, each compiled to one pass over memory from `loops.cpp`.

g++ compiles it when the first loss is computed, within seconds; the result is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..formulas import NORM_EPS
from .loops import band, polynomial
from .pairwise import FAMILY, slope_at_edge

SOURCE = Path(__file__).with_name("loops.cpp")
TILE = 64  # side of a tile of pairs; divides STRIP
ARCHITECTURE = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}  # as PyTorch uses this CPU
# Sums may be reordered, but NaNs and infinities stay. (-ffast-math would also change the whole process's arithmetic.)
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += ["-fassociative-math", "-freciprocal-math", f"-DSIDE={TILE}"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None, after one warning, where they cannot be had."""
    try:
        return ctypes.CDLL(str(build(cache_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None)  # bytes, where the compiler took too long
        lines = (told if told and isinstance(told, str) else str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else type(error).__name__)
        warnings.warn(f"the dispersion loss on the CPU runs uncompiled, which takes longer: {reason}", stacklevel=2)
        return None


def cache_folder() -> Path:
    """Raises RuntimeError if the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanodisp"


def build(folder: Path) -> Path:
    """The library in this folder that belongs to source, compiler and CPU; compiled if it is not there.

    Raises OSError or subprocess.SubprocessError: no compiler, it fails, or the folder is another user's.
    """
    compiler = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]
    compiler += ARCHITECTURE.get(torch.backends.cpu.get_cpu_capability(), [])
    made_from = "\n".join([SOURCE.read_text(), platform.machine(), *compiler])
    built = folder / f"loops-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    make_private(folder)
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            object_file, linked = f"{scratch}/loops.o", f"{scratch}/loops.so"
            # linked without -fopenmp: the OpenMP library is the one that PyTorch has loaded, and so are the threads
            to_object = [*compiler, "-fopenmp", "-c", str(SOURCE), "-o", object_file]
            for command in to_object, [*compiler, "-shared", object_file, "-o", linked]:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            Path(linked).replace(built)  # in one step: another process sees all of it or nothing
    return built


def make_private(folder: Path) -> None:
    """Make a folder for code that will be loaded. Raises OSError if it exists and others could have put code there."""
    if not hasattr(os, "getuid"):
        raise OSError("code is compiled on Linux and macOS only")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise OSError(f"{folder} belongs to another user, or others may write into it")


def directions(z: Tensor, u: Tensor) -> Tensor:
    norm = z.new_empty(*z.shape[:-1], 1)
    _call("directions", z, u, u.dtype == torch.bfloat16, norm, norm.numel(), z.size(-1), NORM_EPS)
    return norm


def pairs(cosines: Tensor, h: Tensor, variant: str, tau: float) -> tuple[Tensor, Tensor]:
    n, n_tokens, _ = cosines.shape
    sums = torch.empty(2, n, -(-n_tokens // TILE), n_tokens, dtype=torch.float32)
    _call(
        "pairs",
        *(FAMILY.index(variant), cosines, cosines.dtype == torch.bfloat16, h, h.dtype == torch.bfloat16),
        *(sums, n, n_tokens, torch.tensor(polynomial(variant, tau), dtype=torch.float32)),
        *(*band(variant), 1 / slope_at_edge(variant, tau)),
    )
    of_w, of_products = sums.sum(dim=2)
    return of_w.sum(dim=1), of_products


def unround(
    product: Tensor, z: Tensor, norm: Tensor, rounded: Tensor, exact: Tensor, scale: Tensor, result: Tensor
) -> None:
    _call("unround", product, z, norm, rounded, exact, scale, result, norm.numel(), z.size(-1), NORM_EPS)


def _call(name: str, *arguments: Tensor | float) -> None:
    """Call a function of loops.cpp: tensors as pointers, int as int64_t, float as float; the threads come last."""
    loops = library()
    assert loops is not None
    getattr(loops, name)(*map(_as_c, arguments), ctypes.c_int64(torch.get_num_threads()))


def _as_c(argument: Tensor | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
