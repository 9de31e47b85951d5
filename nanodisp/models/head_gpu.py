"""The rows of the head's logits on a GPU: cross-entropy, and its gradient in place, by one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3e38)  # instead of -inf, which would give exp(-inf + inf) for a block without a predicted token


@triton.jit
def row_kernel(
    product_pointer,
    bias_pointer,
    target_pointer,
    loss_pointer,
    n_columns,
    ignored: tl.constexpr,
    with_grad: tl.constexpr,
    block: tl.constexpr,
):
    """One row of the logits l = product [n, V] + bias [V], with target t: log sum exp(l) - l_t into loss [n], float32.

    With `with_grad`, product is replaced by exp(l) / sum exp(l) - one_hot(t), rounded to its dtype. The row is read
    twice: the first time for its largest logit and the sum, which is rescaled whenever a larger one appears.
    """
    row = tl.program_id(0).to(tl.int64)
    row_pointer = product_pointer + row * n_columns
    target = tl.load(target_pointer + row)
    counts = target != ignored
    offsets = tl.arange(0, block)
    column = tl.where(counts, target, 0)  # read before any thread writes: the reductions below are barriers
    logit = tl.load(row_pointer + column).to(tl.float32) + tl.load(bias_pointer + column)

    largest, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, n_columns, block):
        columns = start + offsets
        inside = columns < n_columns
        logits = tl.load(row_pointer + columns, mask=inside, other=float("-inf")).to(tl.float32)
        logits += tl.load(bias_pointer + columns, mask=inside, other=0.0)
        before = largest
        largest = tl.maximum(before, tl.max(logits, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logits - largest), axis=0)

    tl.store(loss_pointer + row, tl.where(counts, largest + tl.log(total) - logit, 0.0))

    if with_grad:
        scale = tl.where(counts, 1 / total, 0.0)
        for start in range(0, n_columns, block):
            columns = start + offsets
            inside = columns < n_columns
            logits = tl.load(row_pointer + columns, mask=inside, other=float("-inf")).to(tl.float32)
            logits += tl.load(bias_pointer + columns, mask=inside, other=0.0)
            gradient = tl.exp(logits - largest) * scale - tl.where(counts & (columns == target), 1.0, 0.0)
            tl.store(row_pointer + columns, gradient.to(product_pointer.dtype.element_ty), mask=inside)


def softmax_minus_one_hot_(product: Tensor, bias: Tensor, targets: Tensor, ignored: int, with_grad: bool) -> Tensor:
    """As `head.softmax_minus_one_hot_`, without scratch. `product` [n, V] is contiguous; `ignored` is no target."""
    losses = torch.empty(len(product), dtype=torch.float32, device=product.device)
    block = min(4096, triton.next_power_of_2(product.size(1)))
    with torch.cuda.device_of(product):
        row_kernel[(len(product),)](
            product, bias, targets, losses, product.size(1), ignored, with_grad, block, num_warps=8
        )
    return losses
