"""Cross-entropy of a linear head, without holding all its logits.

For GPT-2's vocabulary the logits of a batch are by far the largest tensor of a training step: 16 x 1024
tokens are 3.3 GB in float32, and plain PyTorch keeps three or four of that size. Here the tokens go
through in chunks. As the gradient of the logits is softmax minus one-hot, it is computed with the loss, and
what is kept for backward is the gradient of the head's input and of its weight. The work is the same three
matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target that does not count, as in torch.nn.functional.cross_entropy
CHUNK_BYTES = 2**29  # of a chunk's float32 logits: small chunks would add to the weight's gradient too often


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x weight^T + bias in nats: a float32 scalar.

    Args:
        x: [n, C]. Under autocast the products are of its dtype, everything else is float32.
        weight: [V, C].
        bias: float32 [V], without gradient; -inf for what is never predicted.
        targets: int64 [n], each below V, or `IGNORED`.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    largest = CHUNK_BYTES // (4 * weight.size(0))
    n_chunks = -(-x.size(0) // max(1, largest))
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, n_chunks, dtype, with_grad)[0]


class _LinearCrossEntropy(torch.autograd.Function):
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
                if with_grad:  # dlogits = softmax - one-hot, times 1 / n in the end: 16 bits would not hold it
                    dlogits = logits.mul_(count / total).scatter_add_(1, target, -count.float())
                    product = product.copy_(dlogits) if dtype != torch.float32 else dlogits
                    dx[rows] = product @ operand
                    if dtype == torch.float32:
                        dweight.addmm_(product.T, chunk)
                    else:
                        dweight.add_(product.T @ chunk)
        return loss / n, dx.div_(n), dweight.div_(n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None, None, None
