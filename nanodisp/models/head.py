"""Cross-entropy and KL divergence of a linear head, in chunks of tokens, without storing all logits.

For GPT-2's vocabulary the logits of a batch are by far the largest tensor of a training step: 16 x 1024
tokens are 3.3 GB in float32, and plain PyTorch keeps three or four tensors of that size. Here the tokens are
processed in chunks, one after the other. The gradient of the logits, softmax minus one-hot, is computed with the loss,
and only the gradients of the head's input and weight are kept for backward. The work is the same three matrix products.

Both losses are operators that torch.compile does not look into: it would let the logits of several chunks live at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target of a token without loss, as in torch.nn.functional.cross_entropy
CHUNK_BYTES = 2**29  # of a chunk's logits; smaller ones update the weight's gradient too often


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x weight^T + bias in nats: a float32 scalar.

    Args:
        x: [n, C]. Under autocast the matrix products use autocast's dtype, everything else is float32.
        weight: [V, C].
        bias: float32 [V], without gradient; -inf for tokens that are never predicted.
        targets: int64 [n], each below V, or `IGNORED`.
    """
    return _cross_entropy(x, weight, bias, targets, _product_dtype(x), _needs_gradient(x, weight))[0]


def linear_kl_divergence(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, bias: Tensor, temperature: float
) -> Tensor:
    """Mean KL(p || q) in nats of the predictions q = softmax((x weight^T + bias) / temperature) from a teacher's p.

    A float32 scalar. Arguments as for `linear_cross_entropy`; the teacher has no gradient and may have another width:

        teacher_x: [n, C of the teacher].
        teacher_weight: [V, C of the teacher].
        temperature: > 0. The gradient falls with its square; Hinton et al., arXiv 1503.02531, multiply the loss by it.
    """
    dtype, with_grad = _product_dtype(x), _needs_gradient(x, weight)
    return _kl_divergence(x, weight, teacher_x, teacher_weight, bias, temperature, dtype, with_grad)[0]


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


@torch.library.custom_op("nanodisp::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients of x and weight (empty without `with_grad`)."""
    with torch.autocast(x.device.type, enabled=False):
        n, operand = (targets != IGNORED).sum(), weight.to(dtype)
        gradients = _Gradients(x, operand, with_grad)
        # on a GPU one kernel turns the products into their gradient in place
        in_place = x.is_cuda or dtype == torch.float32
        chunks = _chunks(len(x), len(weight) * (dtype.itemsize if x.is_cuda else 4))
        products = operand.new_empty(chunks[0].stop, len(weight))
        logits = products if in_place else products.new_empty(products.shape, dtype=torch.float32)
        loss = x.new_zeros((), dtype=torch.float32)
        for rows in chunks:
            chunk, target = x[rows].to(dtype), targets[rows]
            product = torch.mm(chunk, operand.T, out=products[: len(chunk)])
            loss += softmax_minus_one_hot_(product, logits[: len(chunk)], bias, target, with_grad).sum()
            if with_grad:
                gradients.add(rows, product, chunk)
        return loss / n, *gradients.divided_by(n)


def softmax_minus_one_hot_(product: Tensor, logits: Tensor, bias: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
    """Cross-entropy of each row of product + bias, in nats, float32 [n]; its gradient replaces `product`.

    Args:
        product: [n, V], the logits without bias.
        logits: float32 [n, V], scratch on a CPU; may be `product` itself.
        bias: float32 [V].
        targets: int64 [n]; the loss and gradient of an `IGNORED` one are 0.
        with_grad: without it `product` is not changed in a useful way.
    """
    if product.is_cuda:
        from nanodisp.models import head_gpu  # needs triton

        return head_gpu.softmax_minus_one_hot_(product, bias, targets, IGNORED, with_grad)
    counts = (targets != IGNORED)[:, None]
    target = targets[:, None].where(counts, 0)
    logits.copy_(product).add_(bias)
    logit, largest = logits.gather(1, target), logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    if with_grad:
        product.copy_(logits.mul_(counts / total).scatter_add_(1, target, -counts.float()))
    return (largest + total.log() - logit).where(counts, 0.0)[:, 0]


@torch.library.custom_op("nanodisp::linear_kl_divergence", mutates_args=())
def _kl_divergence(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor,
    temperature: float,
    dtype: torch.dtype,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients of x and weight (empty without `with_grad`)."""

    def log_softmax(chunk: Tensor, operand: Tensor) -> Tensor:
        return torch.mm(chunk, operand.T).float().add_(bias).div_(temperature).log_softmax(dim=1)

    with torch.autocast(x.device.type, enabled=False):
        operand, teacher_operand = weight.to(dtype), teacher_weight.to(dtype)
        gradients = _Gradients(x, operand, with_grad)
        loss = x.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(x), 4 * 4 * len(weight)):  # four tensors of the size of the logits
            chunk = x[rows].to(dtype)
            log_q, log_p = log_softmax(chunk, operand), log_softmax(teacher_x[rows].to(dtype), teacher_operand)
            p = log_p.exp()
            loss += log_p.sub_(log_q).mul_(p).where(p > 0, 0.0).sum()  # never predicted tokens: 0, not NaN
            if with_grad:
                gradients.add(rows, log_q.exp_().sub_(p).to(dtype), chunk)
        return loss / len(x), *gradients.divided_by(len(x) * temperature)


class _Gradients:
    """dloss/dx and dloss/dweight, summed over chunks; each is float32 if the argument is.

    The sums are divided at the end: small gradients of the logits would underflow in 16 bits.
    """

    def __init__(self, x: Tensor, operand: Tensor, wanted: bool) -> None:
        self.operand = operand
        self.dx = torch.empty_like(x) if wanted else x.new_empty(0)
        self.dweight = x.new_zeros(operand.shape if wanted else 0, dtype=torch.float32)

    def add(self, rows: slice, dlogits: Tensor, chunk: Tensor) -> None:
        """dlogits: [rows, V], chunk: x[rows], both in the products' dtype."""
        self.dx[rows] = dlogits @ self.operand
        if chunk.dtype == torch.float32:
            self.dweight.addmm_(dlogits.T, chunk)
        elif chunk.is_cuda:
            self.dweight.add_(torch.mm(dlogits.T, chunk, out_dtype=torch.float32))
        else:
            self.dweight.add_(dlogits.T @ chunk)

    def divided_by(self, n: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.dx.div_(n), self.dweight.div_(n)


def _chunks(n: int, bytes_per_token: int) -> list[slice]:
    """Equal chunks of n tokens, of at most CHUNK_BYTES if that is more than one token."""
    largest = max(1, CHUNK_BYTES // bytes_per_token)
    size = -(-n // -(-n // largest))
    return [slice(start, start + size) for start in range(0, n, size)]


def _shapes(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_grad = rest[-1]
    return (
        x.new_empty((), dtype=torch.float32),
        torch.empty_like(x) if with_grad else x.new_empty(0),
        x.new_empty(weight.shape if with_grad else 0, dtype=torch.float32),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.n_inputs = len(inputs)
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    return dx * grad, (dweight * grad).to(ctx.weight_dtype), *[None] * (ctx.n_inputs - 2)


for operator in (_cross_entropy, _kl_divergence):
    operator.register_fake(_shapes)
    operator.register_autograd(_backward, setup_context=_keep_gradients)
