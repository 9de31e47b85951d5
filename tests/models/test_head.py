"""The head's loss in chunks equals the loss of all logits, in value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from nanodisp.models import head
from nanodisp.models.head import linear_cross_entropy, linear_kl_divergence


def case(n: int, n_features: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_features, generator=generator)
    weight = torch.randn(vocab_size + 3, n_features, generator=generator)
    bias = torch.zeros(vocab_size + 3)
    bias[vocab_size:] = -math.inf
    targets = torch.randint(vocab_size, (n,), generator=generator)
    targets[1::4] = -100
    return x, weight, bias, targets


SIZES = {
    "n": st.integers(1, 40),
    "n_features": st.integers(1, 9),
    "vocab_size": st.integers(1, 30),
    "at_once": st.integers(1, 41),
    "seed": st.integers(0, 99),
}


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, of)


@settings(deadline=None, max_examples=60)
@given(**SIZES)
def test_cross_entropy_equals_pytorchs(n: int, n_features: int, vocab_size: int, at_once: int, seed: int) -> None:
    x, weight, bias, targets = case(n, n_features, vocab_size, seed)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    right = gradients(F.cross_entropy(F.linear(x, weight, bias.double()), targets), x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", 4 * len(weight) * at_once)
        x, weight = x.float().detach().requires_grad_(), weight.float().detach().requires_grad_()
        ours = gradients(linear_cross_entropy(x, weight, bias, targets), x, weight)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_under_autocast_equals_pytorchs_up_to_rounding(dtype: torch.dtype) -> None:
    x, weight, bias, targets = case(500, 32, 60)
    weight, x = (0.3 * weight).requires_grad_(), x.requires_grad_()
    right = gradients(F.cross_entropy(F.linear(x, weight, bias), targets), x, weight)
    with torch.autocast("cpu", dtype):
        ours = gradients(linear_cross_entropy(x, weight, bias, targets), x, weight)
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype] * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [3, 60, 4500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpus_kernel_gives_the_losses_and_gradients_of_rows(vocab_size: int, dtype: torch.dtype) -> None:
    from nanodisp.models import head_gpu

    x, weight, bias, targets = case(8, 6, vocab_size)
    product = (x @ weight.T).to(dtype)
    logits = torch.empty_like(product, dtype=torch.float32)
    ours, theirs = product.clone(), product.clone()
    losses = head_gpu.softmax_minus_one_hot_(ours, bias, targets, head.IGNORED, with_grad=True)
    right = head.softmax_minus_one_hot_(theirs, logits, bias, targets, with_grad=True)
    torch.testing.assert_close(losses, right)
    assert (losses == 0).sum() == 2, "of the ignored targets"
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    kept = product.clone()
    torch.testing.assert_close(
        head_gpu.softmax_minus_one_hot_(kept, bias, targets, head.IGNORED, with_grad=False), right
    )
    assert torch.equal(kept, product)


@pytest.mark.slow
def test_a_compiler_sees_no_logits_whose_chunks_it_could_merge() -> None:
    x, weight, bias, targets = case(96, 4, 500)
    x.requires_grad_(), weight.requires_grad_()
    sizes: list[int] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            sizes.extend(each.numel() for each in (value if isinstance(value, tuple) else [value]) if each is not None)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    gradients(compiled(x, weight, bias, targets), x, weight)
    assert max(sizes) == weight.numel() < 96 * 500


def test_the_gradient_is_multiplied_by_the_incoming_gradient() -> None:
    x, weight, bias, targets = case(20, 5, 7)
    x.requires_grad_()
    once, thrice = (torch.autograd.grad(k * linear_cross_entropy(x, weight, bias, targets), x)[0] for k in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)


def test_without_gradient_none_is_computed() -> None:
    x, weight, bias, targets = case(20, 5, 7)
    x.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, bias, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, bias, targets).detach())


@pytest.mark.slow
def test_cross_entropy_compiles_without_a_graph_break() -> None:
    x, weight, bias, targets = case(20, 5, 7)
    x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(compiled(x, weight, bias, targets), x, weight),
        gradients(linear_cross_entropy(x, weight, bias, targets), x, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_cross_entropy_saves_only_the_gradients_for_backward() -> None:
    x, weight, bias, targets = case(64, 4, 500)
    x.requires_grad_(), weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, bias, targets)
    assert sorted(t.shape for t in kept) == sorted([x.shape, weight.shape])


# --- KL divergence from a teacher ------------------------------------------------------------


def lesson(n: int, n_features: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """As `case`, with a teacher of another width instead of targets."""
    x, weight, bias, _ = case(n, n_features, vocab_size, seed)
    teacher_x, teacher_weight, _, _ = case(n, n_features + 3, vocab_size, seed + 1)
    return x, weight, teacher_x, teacher_weight, bias


def pytorchs(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, bias: Tensor, temperature: float
) -> Tensor:
    """F.kl_div of all logits in float64, mean over tokens."""
    predicted = bias.isfinite()
    q, p = (
        (F.linear(h.double(), w.double())[:, predicted] / temperature).log_softmax(dim=1)
        for h, w in ((x, weight), (teacher_x, teacher_weight))
    )
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@settings(deadline=None, max_examples=60)
@given(**SIZES, temperature=st.floats(0.5, 8))
def test_the_divergence_equals_pytorchs(
    n: int, n_features: int, vocab_size: int, at_once: int, temperature: float, seed: int
) -> None:
    x, weight, *rest = lesson(n, n_features, vocab_size, seed)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    right = gradients(pytorchs(x, weight, *rest, temperature), x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", 16 * len(weight) * at_once)
        ours = gradients(linear_kl_divergence(x, weight, *rest, temperature), x, weight)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_under_autocast_equals_pytorchs_up_to_rounding(dtype: torch.dtype) -> None:
    x, weight, *rest = lesson(500, 32, 60)
    weight, x = (0.3 * weight).requires_grad_(), x.requires_grad_()
    right = gradients(pytorchs(x, weight, *rest, 2.0), x, weight)
    with torch.autocast("cpu", dtype):
        ours = gradients(linear_kl_divergence(x, weight, *rest, 2.0), x, weight)
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype] * b.norm()


@pytest.mark.slow
def test_the_divergence_saves_no_logits_and_compiles_without_a_graph_break() -> None:
    x, weight, *rest = lesson(64, 4, 500)
    x.requires_grad_(), weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        eager = linear_kl_divergence(x, weight, *rest, 2.0)
    assert sorted(t.shape for t in kept) == sorted([x.shape, weight.shape])
    compiled = torch.compile(linear_kl_divergence, fullgraph=True, backend="aot_eager")(x, weight, *rest, 2.0)
    for a, b in zip(gradients(3 * compiled, x, weight), gradients(3 * eager, x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_has_no_divergence_from_itself() -> None:
    x, weight, _, _, bias = lesson(20, 5, 7)
    x.requires_grad_(), weight.requires_grad_()
    value, *grads = gradients(linear_kl_divergence(x, weight, x.detach(), weight.detach(), bias, 3.0), x, weight)
    assert value == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)
