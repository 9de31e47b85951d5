"""Fused kernels of the pairwise-cosine family: loss and gradient in one pass, only dz kept for backward.

`DispersionLoss` calls `pairwise_dispersion`; `choose` selects the backend for a tensor. `pairwise.py` documents
the scheme and what the family has in common; `gpu.py` launches the kernels of `triton_kernels.py`, `cpu.py` is that
for CPUs, with loops in C++ (`loops.cpp`) where it can compile them. Both compute the gradient together with the loss,
because only its common factor, 1/S, is unknown while the pairs are visited.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..formulas import CLAMPED
from .pairwise import FAMILY, SMALLEST_CLAMP, gradient_dtype, smallest_tau

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CPU_HAS_BFLOAT16 = torch.cpu._is_amx_tile_supported()  # AVX512-BF16 alone is slower than float32 on some CPUs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on the CPU, slowly, for tests


def unsupported(backend: str, variant: str, tau: float, clamp: float, z: Tensor | None = None) -> str | None:
    """Why "triton" or "cpu" does not support the input, or None if it does; without `z` only what holds for any z."""
    if variant not in FAMILY:
        return f"variant={variant} has no fused kernel, only {', '.join(FAMILY)} have"
    if variant in CLAMPED and clamp < SMALLEST_CLAMP:
        return f"clamp={clamp} is below {SMALLEST_CLAMP}, where their polynomials for arcsin are inexact"
    if tau < smallest_tau(variant, clamp):
        return f"tau={tau} is below {smallest_tau(variant, clamp):.3g}, where exp(1/tau) overflows float32"
    if backend == "triton" and not TRITON_INSTALLED:
        return "triton is not installed (it comes with PyTorch for CUDA)"
    if z is None:
        return None
    if z.size(2) == 0:
        return "z has no features"
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return "the fused kernels support backward() and torch.autograd.grad, not torch.func or forward mode"
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"z is {z.dtype}, but the fused kernels take float32, bfloat16 and float16"
    if backend == "cpu" and z.device.type != "cpu":
        return f"z is on {z.device}, but it needs the CPU"
    if backend == "triton" and not z.is_cuda and not (INTERPRETED and z.device.type == "cpu"):
        return f"z is on {z.device}, but it needs a GPU"
    if backend == "triton" and torch.version.hip is not None:
        return "it does not support AMD GPUs (its tile sizes are for NVIDIA)"
    if backend == "triton" and z.is_cuda and torch.cuda.get_device_properties(z.device).major < 8:
        return "this GPU has a compute capability below 8.0"
    return None


def require(backend: str, variant: str, tau: float, clamp: float, z: Tensor | None = None) -> None:
    """Raises ValueError, with the reason, if "triton" or "cpu" does not support the input."""
    reason = unsupported(backend, variant, tau, clamp, z)
    if reason is not None:
        raise ValueError(f"backend={backend} is not available: {reason}; use backend=auto or backend=reference")


def choose(backend: str, variant: str, tau: float, clamp: float, z: Tensor) -> str:
    """The backend that computes the loss of z: "triton", "cpu" or "reference".

    "auto" is the fused backend of z's device if it supports z, else the reference.

    Raises:
        ValueError: the backend was named explicitly and does not support z; says why.
    """
    if backend == "auto":
        fused = "triton" if z.is_cuda else "cpu"
        return fused if unsupported(fused, variant, tau, clamp, z) is None else "reference"
    if backend != "reference":
        require(backend, variant, tau, clamp, z)
    return backend


def pairwise_dispersion(z: Tensor, variant: str, tau: float, clamp: float, backend: str) -> Tensor:
    """The dispersion loss of z [B, N, F], mean over B: a float32 scalar, differentiable once.

    Matmuls run in bfloat16 if z is bfloat16 or float16 or autocast selects a 16-bit type, and in float32 otherwise
    or on a CPU without AMX. Everything else is float32.
    """
    device = z.device.type
    half = z.dtype != torch.float32 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float32
    )
    half = half and (device != "cpu" or backend == "triton" or CPU_HAS_BFLOAT16)
    matmul_dtype = torch.bfloat16 if half else torch.float32  # float16 would not hold exp(s / tau)
    with_grad = torch.is_grad_enabled() and z.requires_grad
    return _pairwise(z, variant, tau, clamp, matmul_dtype, with_grad, backend)[0]


# The operator's namespace is the package, so that a copy of this folder in another package registers its own.
@torch.library.custom_op(f"{__name__.partition('.')[0]}::pairwise_dispersion", mutates_args=())
def _pairwise(
    z: Tensor, variant: str, tau: float, clamp: float, matmul_dtype: torch.dtype, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss (scalar) and dloss/dz (empty without `with_grad`)."""
    if backend == "triton":
        from . import gpu as kernel  # imports triton on first use
    else:
        from . import cpu as kernel  # type: ignore[no-redef]
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return kernel.pairwise_cosine(z.detach(), variant, tau, clamp, matmul_dtype, with_grad)


@_pairwise.register_fake
def _(
    z: Tensor, variant: str, tau: float, clamp: float, matmul_dtype: torch.dtype, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    loss = z.new_empty((), dtype=torch.float32)
    return loss, z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.z_dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, grad_dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_dz is not None:  # second derivative: the caller differentiates a gradient returned from here
        raise RuntimeError("the fused dispersion loss can be differentiated only once; use backend=reference")
    (dz,) = ctx.saved_tensors
    dloss = None if grad_loss is None else (dz * grad_loss).to(ctx.z_dtype)
    return dloss, None, None, None, None, None, None


_pairwise.register_autograd(_backward, setup_context=_keep_gradient)
