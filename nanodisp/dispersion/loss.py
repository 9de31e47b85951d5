"""`DispersionLoss`: a formula as a loss to minimise, computed by the fastest backend available."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels
from .formulas import CLAMP, VARIANTS

BACKENDS = ("auto", "reference", "triton", "cpu")


class DispersionLoss(nn.Module):
    """Dispersion of hidden states as a loss to minimise.

    Args:
        variant: a key of `VARIANTS`; "angular" is the paper's.
        tau: temperature, > 0, of the formulas that have one.
        backend: "reference" computes the formula as written in `formulas.py`; "triton" (on a GPU) and "cpu" are
            fused kernels for angular, orthogonalization and cosine that need a fraction of the time and memory;
            "auto" uses the fused kernel if it supports the input, else the reference. A fused loss can be
            differentiated only once: second derivatives need "reference".
        clamp: margin of the cosines, between 0 and 1: angular and orthogonalization clamp them to [-1 + clamp,
            1 - clamp] before arccos. The fused kernels need at least 0.1.

    Shapes:
        z ``[B, N, F]``, any floating dtype, N >= 2 -> scalar, float32 (float64 for float64
        z), the mean over B. slices ``[F, any number]``: the directions of sigreg, see `sample_slices`; without them it
        takes the same 64 every time.

    Raises:
        ValueError: unknown variant or backend, tau not positive, clamp not between 0 and 1, z of another shape, or a
            backend that does not support the input.
    """

    def __init__(self, variant: str = "angular", tau: float = 1.0, backend: str = "auto", clamp: float = CLAMP) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown dispersion variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive")
        if not 0 < clamp < 1:
            raise ValueError(f"clamp={clamp} must be between 0 and 1")
        check_backend(backend, variant, tau, clamp)
        self.variant = variant
        self.tau = tau
        self.backend = backend
        self.clamp = clamp

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, tau={self.tau}, backend={self.backend!r}, clamp={self.clamp}"

    def forward(self, z: Tensor, slices: Tensor | None = None) -> Tensor:
        if z.dim() != 3 or z.size(1) < 2 or not z.is_floating_point():
            raise ValueError(f"z must be floating point [B, N, F] with N >= 2, not {z.dtype} {list(z.shape)}")
        backend = kernels.choose(self.backend, self.variant, self.tau, self.clamp, z)
        if backend != "reference":
            return kernels.pairwise_dispersion(z, self.variant, self.tau, self.clamp, backend)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
            drawn = () if slices is None else (slices,)
            return VARIANTS[self.variant](z, self.tau, self.clamp, *drawn).mean().to(z.dtype)


def check_backend(backend: str, variant: str, tau: float, clamp: float) -> None:
    """Raises ValueError for a backend that is unknown, or that supports variant, tau and clamp for no tensor."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown dispersion backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in ("triton", "cpu"):
        kernels.require(backend, variant, tau, clamp)
