"""The operators of `attach`: what happens in backward, and what is drawn.

The gradient that reaches the loss is left in a tensor, `scale`, from which those of the dispersions follow later
in the same backward pass. torch.compile does not look into an operator; it would move what does not depend on a
gradient into the forward pass, where the scale is not known yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formulas import N_SLICES
from .placement import sample_positions, sample_slices

NAMESPACE = __name__.partition(".")[0]  # the package's, so that a copy in another one registers its own operators

# --- in backward -------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::record_scale", mutates_args=("scale",))
def record_scale(grad: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the loss, scalar, which times `share` is left in `scale`."""
    scale.copy_(grad * share.to(grad.device))
    return grad.clone()


@record_scale.register_fake
def _(grad: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(grad)


@torch.library.custom_op(f"{NAMESPACE}::dispersion_gradient", mutates_args=("total",))
def dispersion_gradient(grad: Tensor, dispersion: Tensor, weight: Tensor, scale: Tensor, total: Tensor) -> Tensor:
    """The gradient of the dispersion, scalar: weight * scale. `total` += its value and one.

    grad: that of the hidden state, because of which this cannot run before backward.
    """
    total.add_(torch.stack([dispersion, torch.ones_like(dispersion)]).to(total))
    return (scale * weight.to(scale.device)).to(dispersion)


@dispersion_gradient.register_fake
def _(grad: Tensor, dispersion: Tensor, weight: Tensor, scale: Tensor, total: Tensor) -> Tensor:
    return torch.empty_like(dispersion)


class RecordScale(torch.autograd.Function):
    """A loss, scalar, as it is; in backward its gradient times `share` is left in `scale`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        ctx.share, ctx.scale = share, scale
        return loss.clone()  # no view: trainers multiply the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return record_scale(grad, ctx.share, ctx.scale), None, None


class AddGradient(torch.autograd.Function):
    """A hidden state as it is; in backward the dispersion, scalar, has the gradient weight * scale."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dispersion: Tensor, weight: Tensor, scale: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(dispersion)
        ctx.weight, ctx.scale, ctx.total = weight, scale, total  # not saved: they change before they are read
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (dispersion,) = ctx.saved_tensors
        return grad, dispersion_gradient(grad, dispersion, ctx.weight, ctx.scale, ctx.total), None, None, None


# --- drawn in forward, the same again when recomputed ------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::draw_positions", mutates_args=())
def draw_positions(hidden: Tensor, key: Tensor, layer: int, max_tokens: int) -> Tensor:
    """See `sample_positions`: int64 [max_tokens] of hidden [B, N, F]."""
    seed, step = key.tolist()
    return sample_positions(seed, step, [layer], hidden.size(1), max_tokens)[0].to(hidden.device, non_blocking=True)


@draw_positions.register_fake
def _(hidden: Tensor, key: Tensor, layer: int, max_tokens: int) -> Tensor:
    return hidden.new_empty(max_tokens, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::draw_slices", mutates_args=())
def draw_slices(hidden: Tensor, key: Tensor) -> Tensor:
    """See `sample_slices`: float32 [F, 64]."""
    seed, step = key.tolist()
    slices = sample_slices("sigreg", seed, step, hidden.size(2))
    assert slices is not None
    return slices.to(hidden.device, non_blocking=True)


@draw_slices.register_fake
def _(hidden: Tensor, key: Tensor) -> Tensor:
    return hidden.new_empty(hidden.size(2), N_SLICES, dtype=torch.float32)
