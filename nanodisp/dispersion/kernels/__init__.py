"""Fused kernels of the pairwise-cosine family: loss and gradient in one pass, dz alone kept for backward.

`pairwise_dispersion` is what `DispersionLoss` calls; `choose` says which backend serves a tensor.
The scheme, and what the members of the family have in common, stands in `pairwise.py`; `gpu.py` is the
Triton kernel, `cpu.py` the same in PyTorch operations on blocks. Both compute the gradient together
with the loss, because its common factor, 1/S, is all that is not known while the pairs are visited.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .pairwise import FAMILY, gradient_dtype, smallest_tau

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CPU_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on the CPU, slowly, to test them


def why_not(backend: str, variant: str, tau: float, z: Tensor | None = None) -> str | None:
    """What keeps the backend ("triton" or "cpu") from serving, or None; without `z` as far as one can know."""
    if variant not in FAMILY:
        return f"variant={variant}: the fused kernels know {', '.join(FAMILY)}"
    if tau < smallest_tau(variant):
        return f"tau={tau}: below {smallest_tau(variant):.3g} exp(1/tau) leaves float32"
    if backend == "triton" and not TRITON_INSTALLED:
        return "without triton: install it (it comes with PyTorch for CUDA)"
    if z is None:
        return None
    if z.size(2) == 0:
        return "tokens without features"
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return "torch.func or forward-mode differentiation: the fused kernels know backward() and torch.autograd.grad"
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{z.dtype}: the fused kernels know float32, bfloat16 and float16"
    if backend == "cpu" and z.device.type != "cpu":
        return f"a tensor on {z.device}: it is the CPU's"
    if backend == "triton" and not z.is_cuda and not (INTERPRETED and z.device.type == "cpu"):
        return f"a tensor on {z.device}: it needs a GPU"
    if backend == "triton" and torch.version.hip is not None:
        return "AMD's GPUs: its tiles are NVIDIA's"
    if backend == "triton" and z.is_cuda and torch.cuda.get_device_properties(z.device).major < 8:
        return "this GPU: it needs compute capability 8.0 or more"
    return None


def choose(backend: str, variant: str, tau: float, z: Tensor) -> str:
    """The backend that serves z: "triton", "cpu" or "reference".

    "auto" takes the fused one of z's device, and the reference where that cannot serve.

    Raises:
        ValueError: another `backend` than "auto" cannot serve; says why.
    """
    if backend == "reference":
        return backend
    candidate = backend if backend != "auto" else "triton" if z.is_cuda else "cpu"
    reason = why_not(candidate, variant, tau, z)
    if reason is None:
        return candidate
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend={backend} cannot serve {reason}; use backend=auto or backend=reference")


def pairwise_dispersion(z: Tensor, variant: str, tau: float, backend: str) -> Tensor:
    """The dispersion loss of z [B, N, F], mean over B: a float32 scalar, differentiable once.

    Matmuls run in bfloat16 where z is bfloat16 or float16, or where autocast asks for a 16-bit type, and in
    float32 otherwise, and on a CPU without bfloat16. Everything else is float32.
    """
    device = z.device.type
    half = z.dtype != torch.float32 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float32
    )
    half = half and (device != "cpu" or backend == "triton" or CPU_HAS_BFLOAT16)
    matmul_dtype = torch.bfloat16 if half else torch.float32  # float16 would not hold exp(s / tau)
    with_grad = torch.is_grad_enabled() and z.requires_grad
    return _pairwise(z, variant, tau, matmul_dtype, with_grad, backend)[0]


@torch.library.custom_op("nanodisp::pairwise_dispersion", mutates_args=())
def _pairwise(
    z: Tensor, variant: str, tau: float, matmul_dtype: torch.dtype, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and dloss/dz, which is empty without `with_grad`."""
    if backend == "triton":
        from . import gpu as kernel  # triton is imported with the first use of it
    else:
        from . import cpu as kernel  # type: ignore[no-redef]
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return kernel.pairwise_cosine(z.detach(), variant, tau, matmul_dtype, with_grad)


@_pairwise.register_fake
def _(
    z: Tensor, variant: str, tau: float, matmul_dtype: torch.dtype, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    loss = z.new_empty((), dtype=torch.float32)
    return loss, z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.z_dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, grad_dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_dz is not None:  # someone differentiates the gradient that this function returned before
        raise RuntimeError("the fused dispersion loss can be differentiated once only; use backend=reference")
    (dz,) = ctx.saved_tensors
    dloss = None if grad_loss is None else (dz * grad_loss).to(ctx.z_dtype)
    return dloss, None, None, None, None, None


_pairwise.register_autograd(_backward, setup_context=_keep_gradient)
