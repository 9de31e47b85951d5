"""Cross-entropy and KL divergence of a linear head, in chunks of tokens, without storing all logits.

For GPT-2's vocabulary the logits of a batch are by far the largest tensor of a training step: 16 x 1024
tokens are 3.3 GB in float32, and plain PyTorch keeps three or four tensors of that size. Here the tokens are
processed in chunks. The gradient of the logits, softmax minus one-hot, is computed with the loss, and only the
gradients of the head's input and weight are kept for backward. The work is the same three matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target of a token without loss, as in torch.nn.functional.cross_entropy
CHUNK_BYTES = 2**29  # of a chunk's float32 logits; smaller ones update the weight's gradient too often


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x weight^T + bias in nats: a float32 scalar.

    Args:
        x: [n, C]. Under autocast the matrix products use autocast's dtype, everything else is float32.
        weight: [V, C].
        bias: float32 [V], without gradient; -inf for tokens that are never predicted.
        targets: int64 [n], each below V, or `IGNORED`.
    """
    dtype, n_chunks, with_grad = _plan(x, weight, 1)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, n_chunks, dtype, with_grad)[0]


def linear_kl_divergence(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, bias: Tensor, temperature: float
) -> Tensor:
    """Mean KL(p || q) in nats of the predictions q = softmax((x weight^T + bias) / temperature) from a teacher's p.

    A float32 scalar. Arguments as for `linear_cross_entropy`; the teacher has no gradient and may have another width:

        teacher_x: [n, C of the teacher].
        teacher_weight: [V, C of the teacher].
        temperature: > 0. The gradient falls with its square; Hinton et al., arXiv 1503.02531, multiply the loss by it.
    """
    dtype, n_chunks, with_grad = _plan(x, weight, 4)
    return _LinearKLDivergence.apply(
        x, weight, teacher_x, teacher_weight, bias, temperature, n_chunks, dtype, with_grad
    )[0]


def _plan(x: Tensor, weight: Tensor, n_copies: int) -> tuple[torch.dtype, int, bool]:
    """The products' dtype, how many chunks if n_copies of a chunk's logits are held, whether to compute gradients."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    largest = CHUNK_BYTES // (4 * n_copies * weight.size(0))
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return dtype, -(-x.size(0) // max(1, largest)), with_grad


class _WithGradients(torch.autograd.Function):
    """A loss computed together with its gradients: `forward(x, weight, ...)` returns loss, dx and dweight."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, *[None] * (len(ctx.needs_input_grad) - 2)


class _LinearCrossEntropy(_WithGradients):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, n_chunks: int, dtype: torch.dtype, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            counts = targets != IGNORED
            n = counts.sum()
            operand = weight.to(dtype)
            size = -(-x.size(0) // n_chunks)
            product_scratch = operand.new_empty(size, weight.size(0))
            logits_scratch = (
                product_scratch
                if dtype == torch.float32
                else product_scratch.new_empty(product_scratch.shape, dtype=torch.float32)
            )
            loss = x.new_zeros((), dtype=torch.float32)
            dx = torch.empty_like(x) if with_grad else x.new_empty(0)
            dweight = torch.zeros_like(weight) if with_grad else weight.new_empty(0)
            for start in range(0, x.size(0), size):
                rows = slice(start, start + size)
                chunk, count = x[rows].to(dtype), counts[rows, None]
                product, logits = product_scratch[: len(chunk)], logits_scratch[: len(chunk)]
                torch.mm(chunk, operand.T, out=product)
                logits.copy_(product).add_(bias)
                target = targets[rows, None].where(count, 0)
                logit, largest = logits.gather(1, target), logits.amax(dim=1, keepdim=True)
                total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
                loss += (largest + total.log() - logit).where(count, 0.0).sum()
                if with_grad:  # dlogits = softmax - one-hot; 1 / n is applied at the end: 16 bits would underflow
                    dlogits = logits.mul_(count / total).scatter_add_(1, target, -count.float())
                    product = product.copy_(dlogits) if dtype != torch.float32 else dlogits
                    dx[rows] = product @ operand
                    if dtype == torch.float32:
                        dweight.addmm_(product.T, chunk)
                    else:
                        dweight.add_(product.T @ chunk)
        return loss / n, dx.div_(n), dweight.div_(n)


class _LinearKLDivergence(_WithGradients):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        bias: Tensor,
        temperature: float,
        n_chunks: int,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def log_softmax(chunk: Tensor, operand: Tensor) -> Tensor:
            return torch.mm(chunk, operand.T).float().add_(bias).div_(temperature).log_softmax(dim=1)

        with torch.autocast(x.device.type, enabled=False):
            operand, teacher_operand = weight.to(dtype), teacher_weight.to(dtype)
            n, size = x.size(0), -(-x.size(0) // n_chunks)
            loss = x.new_zeros((), dtype=torch.float32)
            dx = torch.empty_like(x) if with_grad else x.new_empty(0)
            dweight = torch.zeros_like(weight) if with_grad else weight.new_empty(0)
            for start in range(0, n, size):
                rows = slice(start, start + size)
                chunk = x[rows].to(dtype)
                log_q, log_p = log_softmax(chunk, operand), log_softmax(teacher_x[rows].to(dtype), teacher_operand)
                p = log_p.exp()
                loss += log_p.sub_(log_q).mul_(p).where(p > 0, 0.0).sum()  # never predicted tokens: 0, not NaN
                if with_grad:  # dlogits = q - p; 1 / (n * temperature) is applied at the end: 16 bits would underflow
                    product = log_q.exp_().sub_(p).to(dtype)
                    dx[rows] = product @ operand
                    dweight.add_(product.T @ chunk)
        return loss / n, dx.div_(n * temperature), dweight.div_(n * temperature)
