"""The dispersion loss: push the embeddings of one sequence's tokens apart.

Every formula stands here in plain PyTorch. This is the definition that faster
implementations are held against, so it favours being read over being fast. The fast ones
of `angular`, `orthogonalization` and `cosine` are in ``kernels/``; `backend` chooses.

Notation: z is the hidden state of one layer, ``[B, N, F]``: B sequences, N tokens, F
features. Pairs are pairs of tokens of the same sequence, a token is never paired with
itself, and the result is the mean over the B sequences. u = z / (|z| + 0.01) is a token's
direction, c_ij = u_i . u_j the cosine of two tokens, D_ij = arccos(c_ij) / pi their angle.

Whatever z's dtype (and whatever autocast says), everything is computed in float32 or
better. The formulas made of cosines do well with that; the others use float64 inside:
exp(-|z_i - z_j|^2) of distances in the hundreds loses four of float32's seven digits, and
so does the standard deviation of numbers that are nearly equal.

Sources: Liu et al., "Dispersion Loss Counteracts Embedding Condensation and Improves
Generalization in Small Language Models", arXiv 2602.00217; Wang & He, "Diffuse and
Disperse", arXiv 2506.09027; the other formulas name theirs.

The file depends on torch and numpy alone: copy it (and ``kernels/``, if you want it fast) into your
own project and it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    from . import kernels
except ImportError:  # this file was copied without the folder
    kernels = None  # type: ignore[assignment]

BACKENDS = ("auto", "reference", "triton", "cpu")
NORM_EPS = 1e-2  # in u = z / (|z| + eps)
COSINE_MARGIN = 0.25  # cosines are clamped to [-1 + margin, 1 - margin] before arccos
ENTROPY_EPS = 1e-2  # in log2(p + eps)
L2_PENALTY = 0.1  # weight of mean(z^2) in l2_repel


@dataclass
class DispersionConfig:
    """The dispersion loss in training; 0 for `lambda_disp` turns it off.

    variant: which formula, a key of `VARIANTS`.
    lambda_disp: weight of the loss beside cross-entropy.
    tau: temperature of the formulas that have one.
    layers: "all" (every layer after the embedding), "last", "first_half", "last_half", or
        a list of indices into the model's hidden states (0 is the embedding output,
        n_layer the last layer; negative ones count from the end).
    max_tokens: tokens of a sequence that the loss looks at, drawn anew for every layer and
        step, the same positions for all sequences; null for all.
    schedule: how `lambda_disp` moves over the run: "constant", "linear" (from 0 up to it
        over the first `warmup_fraction` of the steps, then constant) or "cosine" (decays
        towards 0 at the end).
    warmup_fraction: see `schedule`, as a share of all steps.
    backend: "auto", "reference", "triton" or "cpu"; see `DispersionLoss`.
    """

    variant: str = "angular"
    lambda_disp: float = 0.1
    tau: float = 1.0
    layers: Any = "all"
    max_tokens: int | None = 256
    schedule: str = "constant"
    warmup_fraction: float = 0.1
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"dispersion.variant={self.variant} is unknown; choose one of {', '.join(VARIANTS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"dispersion.schedule={self.schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.lambda_disp < math.inf:
            raise ValueError(f"dispersion.lambda_disp={self.lambda_disp} must be 0 (off) or a positive number")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"dispersion.tau={self.tau} must be a positive number")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"dispersion.max_tokens={self.max_tokens}: a pair needs 2 tokens; null takes all")
        if not 0 < self.warmup_fraction <= 1:
            raise ValueError(f"dispersion.warmup_fraction={self.warmup_fraction} must lie in (0, 1]")
        _check_backend(self.backend, self.variant, self.tau)


class DispersionLoss(nn.Module):
    """Dispersion of hidden states as a loss to minimise.

    Args:
        variant: a key of `VARIANTS`; "angular" is the paper's.
        tau: temperature, > 0 (unused by orthogonalization, decorrelation and variance).
        backend: "reference" computes the formula as written below; "triton" (on a GPU) and "cpu" are
            fused kernels of angular, orthogonalization and cosine, many times faster and smaller;
            "auto" takes the fused kernel where there is one and the reference elsewhere. A fused loss
            can be differentiated once: what needs second derivatives needs "reference".

    Shapes:
        z ``[B, N, F]``, any floating dtype, N >= 2 -> scalar, float32 (float64 for float64
        z), the mean over B.

    Raises:
        ValueError: unknown variant or backend, tau not positive, z not of that shape, or a backend
            that cannot serve.
    """

    def __init__(self, variant: str = "angular", tau: float = 1.0, backend: str = "auto") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown dispersion variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive")
        _check_backend(backend, variant, tau)
        self.variant = variant
        self.tau = tau
        self.backend = backend

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, tau={self.tau}, backend={self.backend!r}"

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 3 or z.size(1) < 2 or not z.is_floating_point():
            raise ValueError(f"z must be floating point [B, N, F] with N >= 2, not {z.dtype} {list(z.shape)}")
        if kernels is not None:
            backend = kernels.choose(self.backend, self.variant, self.tau, z)
            if backend != "reference":
                return kernels.pairwise_dispersion(z, self.variant, self.tau, backend)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
            return VARIANTS[self.variant](z, self.tau).mean().to(z.dtype)


def _check_backend(backend: str, variant: str, tau: float) -> None:
    """Raises a ValueError for a backend that is unknown or, whatever the tensor, cannot serve."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown dispersion backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in ("triton", "cpu"):
        reason = kernels.why_not(backend, variant, tau) if kernels is not None else "without the folder kernels/"
        if reason is not None:
            raise ValueError(f"backend={backend} cannot serve {reason}; use backend=auto or backend=reference")


# --- the formulas: z [B, N, F] -> loss of each sequence [B] -----------------------------


def angular(z: Tensor, tau: float) -> Tensor:
    """log( mean_{i!=j} exp(-D_ij / tau) ), arXiv 2602.00217."""
    return _log_mean_exp_of_pairs(-_angles(z) / tau)


def cosine(z: Tensor, tau: float) -> Tensor:
    """log( mean_{i!=j} exp(c_ij / tau) ), arXiv 2506.09027 with the diagonal left out."""
    return _log_mean_exp_of_pairs(_cosines(z) / tau)


def orthogonalization(z: Tensor, tau: float) -> Tensor:
    """mean_{i!=j} max(0, 1/2 - D_ij)^2: only acute angles cost. arXiv 2602.00217."""
    return _mean_of_pairs((0.5 - _angles(z)).clamp(min=0).square())


def decorrelation(z: Tensor, tau: float) -> Tensor:
    """mean_{i!=j} Cov_ij^2, Cov = Z Z^T / (F - 1), rows of Z standardised. arXiv 2602.00217.

    A row without variance (all features equal) has no correlation: it counts as zeros.
    """
    z = z.double()
    n_features = z.size(-1)
    std = z.std(dim=-1, keepdim=True)
    standardised = (z - z.mean(dim=-1, keepdim=True)) / std.where(std > 0, 1.0)
    covariance = standardised @ standardised.mT / (n_features - 1)  # [B, N, N]
    return _mean_of_pairs(covariance.square())


def l2_repel(z: Tensor, tau: float) -> Tensor:
    """log( mean_{i!=j} exp(-|z_i - z_j|^2 / tau) ) + 0.1 mean(z^2), arXiv 2602.00217.

    The second term keeps the norms from growing without end.
    """
    z = z.double()
    return _log_mean_exp_of_pairs(-_squared_distances(z) / tau) + L2_PENALTY * z.square().mean(dim=(1, 2))


def entropy(z: Tensor, tau: float) -> Tensor:
    """-mean_i H_i, H_i = -sum_j p_ij log2(p_ij + 0.01), p_i = softmax_{j!=i}(-|z_i - z_j|^2 / tau).

    From the public code of the authors of arXiv 2602.00217.
    """
    logits = -_squared_distances(z.double()) / tau
    p = logits.masked_fill(_diagonal(logits), -math.inf).softmax(dim=-1)
    return (p * (p + ENTROPY_EPS).log2()).sum(dim=-1).mean(dim=-1)


def variance(z: Tensor, tau: float) -> Tensor:
    """mean_f max(0, 1 - std_f), std over the tokens: VICReg's variance term, arXiv 2105.04906."""
    return (1 - z.double().std(dim=1)).clamp(min=0).mean(dim=-1)


def logdet(z: Tensor, tau: float) -> Tensor:
    """-1/(2F) logdet( I + F/(N tau^2) U^T U ): the coding rate of arXiv 2006.08558, negated.

    U^T U [F, F] and U U^T [N, N] give the same determinant; the smaller one is taken.
    """
    _, n_tokens, n_features = z.shape
    u = _directions(z.double())
    gram = u @ u.mT if n_tokens < n_features else u.mT @ u
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(identity + n_features / (n_tokens * tau**2) * gram)
    return -factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) / n_features  # logdet / 2 = sum log diag


VARIANTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "angular": angular,
    "orthogonalization": orthogonalization,
    "decorrelation": decorrelation,
    "l2_repel": l2_repel,
    "entropy": entropy,
    "cosine": cosine,
    "variance": variance,
    "logdet": logdet,
}


# --- what the formulas are made of -----------------------------------------------------


def _directions(z: Tensor) -> Tensor:
    return z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + NORM_EPS)


def _cosines(z: Tensor) -> Tensor:
    u = _directions(z)
    return u @ u.mT  # [B, N, N]


def _angles(z: Tensor) -> Tensor:
    """D = arccos(c) / pi with c clamped in value but not in slope, [B, N, N].

    Outside the band the gradient is the edge's: nearly parallel tokens, where plain
    clamping would give none and arccos an infinite one, must still be pushed apart.
    """
    c = _cosines(z)
    clamped = c + (c.clamp(-1 + COSINE_MARGIN, 1 - COSINE_MARGIN) - c).detach()
    return torch.arccos(clamped) / math.pi


def _squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|^2 = |z_i|^2 + |z_j|^2 - 2 z_i . z_j; cancels, so z should be float64."""
    squared_norm = z.square().sum(dim=-1)
    return squared_norm[:, :, None] + squared_norm[:, None, :] - 2 * z @ z.mT


def _diagonal(pairs: Tensor) -> Tensor:
    return torch.eye(pairs.size(-1), dtype=torch.bool, device=pairs.device)


def _mean_of_pairs(pairs: Tensor) -> Tensor:
    n_tokens = pairs.size(-1)
    return pairs.masked_fill(_diagonal(pairs), 0).sum(dim=(1, 2)) / (n_tokens * (n_tokens - 1))


def _log_mean_exp_of_pairs(logits: Tensor) -> Tensor:
    n_tokens = logits.size(-1)
    total = logits.masked_fill(_diagonal(logits), -math.inf).logsumexp(dim=(1, 2))
    return total - math.log(n_tokens * (n_tokens - 1))


# --- the loss in training: which layers, which tokens, which weight ----------------------


def select_layers(layers: str | Sequence[int], n_layer: int) -> list[int]:
    """Indices into a model's n_layer + 1 hidden states (0 is the embedding output).

    Raises ValueError for a name or an index that the model does not have.
    """
    named = {
        "all": range(1, n_layer + 1),
        "last": range(n_layer, n_layer + 1),
        "first_half": range(1, n_layer // 2 + 1),
        "last_half": range(n_layer // 2 + 1, n_layer + 1),
    }
    if isinstance(layers, str) and layers in named:
        chosen = list(named[layers])
    elif isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"dispersion.layers={layers} is unknown; choose {', '.join(named)} or a list of indices")
    else:
        for layer in layers:
            if type(layer) is not int or not -n_layer - 1 <= layer <= n_layer:
                raise ValueError(f"dispersion.layers names {layer!r}; the model has hidden states 0 to {n_layer}")
        chosen = sorted({int(layer) % (n_layer + 1) for layer in layers})
    if not chosen:
        raise ValueError(f"dispersion.layers={layers} selects no layer of a model with n_layer={n_layer}")
    return chosen


def sample_positions(seed: int, step: int, layers: Sequence[int], n_tokens: int, max_tokens: int | None) -> Tensor:
    """Which tokens the loss looks at: int64 [len(layers), min(n_tokens, max_tokens)] on the CPU.

    A row is drawn without replacement by a generator that (seed, step, layer) alone decides,
    and sorted, so that it is the same whichever other layers, ranks or micro-batches there are.
    """
    if max_tokens is None or max_tokens >= n_tokens:
        return torch.arange(n_tokens).repeat(len(layers), 1)
    generator = torch.Generator()
    rows = []
    for layer in layers:
        generator.manual_seed(int(np.random.SeedSequence((seed, step, layer)).generate_state(1, np.uint64)[0] >> 1))
        rows.append(torch.randperm(n_tokens, generator=generator)[:max_tokens].sort().values)
    return torch.stack(rows)


def _linear(progress: float, warmup_fraction: float) -> float:
    return min(1.0, progress / warmup_fraction)


def _cosine_decay(progress: float, warmup_fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, warmup_fraction: 1.0,
    "linear": _linear,
    "cosine": _cosine_decay,
}


def lambda_at(config: DispersionConfig, step: int, total_steps: int) -> float:
    """The weight of the loss at `step` (from 0) of `total_steps`, by the config's schedule."""
    return config.lambda_disp * SCHEDULES[config.schedule](step / total_steps, config.warmup_fraction)
