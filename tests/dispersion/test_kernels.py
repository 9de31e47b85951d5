"""The fused kernels against float64 autograd of the reference formulas.

The Triton kernel runs in Triton's interpreter (conftest.py sets TRITON_INTERPRET); test_aot.py checks that it
compiles for real GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.kernels import rounding
from nanodisp.dispersion import VARIANTS, DispersionLoss, kernels
from nanodisp.dispersion.kernels import FAMILY, cpu, pairwise
from nanodisp.dispersion.placement import DispersionConfig

triton = pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402

from nanodisp.dispersion.kernels import gpu  # noqa: E402

FUSED = ("cpu", "triton")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # relative to float64


@pytest.fixture(autouse=True)
def the_interpreter_rounds_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", rounding(interpreter._convert_float))


def tokens(*shape: int, seed: int = 0, cosine: float = 0.0) -> Tensor:
    """Random tokens with cosines of about `cosine`."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(*shape, generator=generator)
    return z + 3 * (cosine / (1 - cosine)) ** 0.5 * torch.randn(shape[-1], generator=generator)


def loss_and_gradient(z: Tensor, variant: str, tau: float, backend: str, clamp: float = 0.25) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = DispersionLoss(variant, tau, backend, clamp)(z)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def check(z: Tensor, variant: str, tau: float, backend: str, matmul_dtype: torch.dtype, clamp: float = 0.25) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=matmul_dtype == torch.bfloat16):
        loss, gradient = loss_and_gradient(z, variant, tau, backend, clamp)
    right_loss, right = loss_and_gradient(z.double(), variant, tau, "reference", clamp)
    tolerance = TOLERANCE[matmul_dtype]
    assert loss.dtype == torch.float32
    assert abs(loss - right_loss) <= tolerance * (1 + abs(right_loss))
    # the tangential gradient may be a small part of the gradient before the normalisation, or zero
    before = 1 / (tau * z.norm(dim=-1).min() * (z.size(0) * z.size(1)) ** 0.5)
    assert (gradient - right).norm() <= tolerance * right.norm() + 3e-7 * before
    assert gradient.dtype == z.dtype


# (2, 130, 40) takes three tiles per side in the interpreter, with ragged edges.
COSINES = [0.0, 0.9]
SHAPES = [(1, 2, 2), (3, 7, 5), (2, 130, 40), (1, 3, 1100)]


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", FUSED)
def test_float32_gradient(backend: str, variant: str, shape: tuple[int, ...], cosine: float) -> None:
    check(tokens(*shape, cosine=cosine), variant, 1.0, backend, torch.float32)


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", FUSED)
def test_bfloat16_autocast_gradient(backend: str, variant: str, cosine: float) -> None:
    check(tokens(2, 130, 96, cosine=cosine), variant, 1.0, backend, torch.bfloat16)


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", ["triton"])
def test_condensed_tokens(backend: str, variant: str, matmul_dtype: torch.dtype) -> None:
    """Of their gradient almost everything cancels: rounded errors along u_i would drown what is left."""
    check(tokens(1, 130, 40, cosine=0.99), variant, 1.0, backend, matmul_dtype)


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp", [0.1, 0.15, 0.6])
@pytest.mark.parametrize("variant", ["angular", "orthogonalization"])
@pytest.mark.parametrize("backend", FUSED)
def test_another_clamp(backend: str, variant: str, clamp: float, matmul_dtype: torch.dtype) -> None:
    """Tokens whose cosines lie on both sides of each of these edges."""
    z = torch.cat([tokens(1, 66, 40, cosine=cosine) for cosine in (0.5, 0.9)], dim=1)
    check(z, variant, 1.0, backend, matmul_dtype, clamp)
    values = [loss_and_gradient(z, variant, 1.0, backend, each)[0] for each in (clamp, 0.25)]
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("tau", [0.05, 0.1])
@pytest.mark.parametrize("variant", ["angular", "cosine"])
def test_bfloat16_at_small_temperatures(variant: str, tau: float, cosine: float) -> None:
    check(tokens(2, 256, 256, cosine=cosine), variant, tau, "cpu", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FUSED)
def test_half_precision_input(backend: str, dtype: torch.dtype) -> None:
    # Scaled as by a GradScaler: otherwise the gradient underflows float16.
    z = tokens(2, 70, 96).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(DispersionLoss(backend=backend)(z) * 2.0**14, z)
    _, right = loss_and_gradient(z.double(), "angular", 1.0, "reference")
    assert gradient.dtype == dtype
    error = (gradient.double() / 2**14 - right).norm() / right.norm()
    assert error <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    "shape", [(3, 256, 24), (2, 300, 24), (1, 1000, 24), (1, 515, 8), (9, 127, 8), (2, 129, 8)], ids=str
)
@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernel_in_any_number_of_strips_and_tiles(shape: tuple[int, ...], matmul_dtype: torch.dtype) -> None:
    check(tokens(*shape), "angular", 1.0, "cpu", matmul_dtype)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(FAMILY),
    n_sequences=st.integers(1, 4),
    n_tokens=st.integers(2, 400),
    n_features=st.integers(2, 80),
    tau=st.sampled_from([0.1, 0.5, 1.0, 4.0]),
    cosine=st.sampled_from(COSINES),
    seed=st.integers(0, 1000),
)
def test_any_shape_on_the_cpu(variant, n_sequences, n_tokens, n_features, tau, cosine, seed) -> None:
    z = tokens(n_sequences, n_tokens, n_features, seed=seed, cosine=cosine)
    check(z, variant, tau, "cpu", torch.float32)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    variant=st.sampled_from(FAMILY),
    n_tokens=st.integers(2, 140),
    n_features=st.integers(2, 80),
    tau=st.sampled_from([0.1, 1.0, 4.0]),
    cosine=st.sampled_from(COSINES),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_triton(variant, n_tokens, n_features, tau, cosine, seed) -> None:
    check(tokens(1, n_tokens, n_features, seed=seed, cosine=cosine), variant, tau, "triton", torch.float32)


DEGENERATE = {
    "zero rows": tokens(2, 9, 6) * (torch.arange(9) % 3 > 0)[:, None],
    "all zero": torch.zeros(1, 5, 4),
    "identical": torch.ones(1, 5, 4),
    "opposite": torch.ones(1, 4, 4) * torch.tensor([1.0, -1, 1, -1])[:, None],
    "tiny": 1e-20 * tokens(1, 5, 4),
    "large": 1e15 * tokens(1, 5, 4),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", FUSED)
def test_degenerate_tokens(backend: str, variant: str, kind: str) -> None:
    z = DEGENERATE[kind]
    _, gradient = loss_and_gradient(z, variant, 1.0, backend)
    _, right = loss_and_gradient(z.double(), variant, 1.0, "reference")
    assert gradient.isfinite().all()
    # identical and opposite tokens have no tangential gradient, only rounding error
    assert (gradient - right).norm() <= 1e-5 * right.norm() + (1e-6 if kind in ("identical", "opposite") else 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "every other feature": lambda z: z.repeat_interleave(2, dim=2)[:, :, ::2],
    "cut from wider rows": lambda z: torch.cat([z, z], dim=2)[:, :, : z.size(2)],
    "batch last": lambda z: z.movedim(0, 2).contiguous().movedim(2, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_the_layout_of_the_input_does_not_matter(backend: str, layout: str) -> None:
    z = tokens(3, 21, 12)
    laid_out = LAYOUTS[layout](z)
    assert torch.equal(laid_out, z)
    for a, b in zip(
        loss_and_gradient(laid_out, "angular", 1.0, backend),
        loss_and_gradient(z, "angular", 1.0, backend),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", FUSED)
def test_the_same_input_gives_the_same_bits(backend: str, variant: str) -> None:
    z = tokens(6, 300, 96) if backend == "cpu" else tokens(2, 140, 20)  # several blocks or tiles
    first, second = (loss_and_gradient(z, variant, 1.0, backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("backend", "limit"), [("cpu", "SCRATCH_ELEMENTS"), ("triton", "H_BYTES")])
def test_sequences_in_groups_give_the_same_as_all_at_once(
    backend: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = tokens(5, 20, 12)
    at_once = loss_and_gradient(z, "angular", 1.0, backend)
    two_at_a_time = {"cpu": 2 * 20 * 20, "triton": 2 * 64 * 64 * 4}
    monkeypatch.setattr({"cpu": cpu, "triton": gpu}[backend], limit, two_at_a_time[backend])
    in_groups = loss_and_gradient(z, "angular", 1.0, backend)
    torch.testing.assert_close(in_groups[0], at_once[0])
    torch.testing.assert_close(in_groups[1], at_once[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("backend", FUSED)
def test_without_gradient_the_loss_is_the_same_and_dz_is_not_computed(backend: str, variant: str) -> None:
    z = tokens(2, 70, 12)
    loss, dz = kernels._pairwise(z, variant, 1.0, 0.25, torch.float32, False, backend)
    assert torch.equal(loss, kernels._pairwise(z, variant, 1.0, 0.25, torch.float32, True, backend)[0])
    assert dz.numel() == 0


@pytest.mark.parametrize("backend", FUSED)
def test_backward_saves_one_tensor_of_the_size_of_z(backend: str) -> None:
    z = tokens(2, 40, 12).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        DispersionLoss(backend=backend)(z)
    assert [tensor.shape for tensor in kept] == [z.shape]


@pytest.mark.parametrize("backend", FUSED)
def test_the_gradient_is_multiplied_by_the_incoming_gradient(backend: str) -> None:
    z = tokens(2, 20, 12).requires_grad_()
    loss = DispersionLoss(backend=backend)(z)
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, z)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.hessian], ids=lambda f: f.__name__)
def test_auto_uses_the_reference_under_torch_func(
    derivative: Callable[..., Callable[[Tensor], Tensor]],
) -> None:
    z = tokens(1, 4, 3)
    torch.testing.assert_close(derivative(DispersionLoss())(z), derivative(DispersionLoss(backend="reference"))(z))
    with pytest.raises(ValueError, match=r"torch\.func.*use backend=auto or backend=reference"):
        derivative(DispersionLoss(backend="cpu"))(z)


def test_auto_uses_the_reference_in_forward_mode() -> None:
    z, direction = tokens(1, 4, 3), tokens(1, 4, 3, seed=1)
    _, slope = torch.func.jvp(DispersionLoss(), (z,), (direction,))
    torch.testing.assert_close(slope, (torch.func.grad(DispersionLoss())(z) * direction).sum())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    z = tokens(1, 5, 4)
    right = loss_and_gradient(z, "angular", 1.0, "cpu")
    torch.set_default_dtype(default)
    try:
        ours = loss_and_gradient(z, "angular", 1.0, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_rejected_with_advice(backend: str) -> None:
    z = tokens(1, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(DispersionLoss(backend=backend)(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="backend=reference"):
        gradient.square().sum().backward()


def test_the_reference_has_a_second_derivative() -> None:
    z = tokens(1, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(DispersionLoss(backend="reference")(z), z, create_graph=True)
    gradient.square().sum().backward()
    assert z.grad is not None


def test_a_nan_is_propagated() -> None:
    z = tokens(1, 5, 4)
    z[0, 0, 0] = float("nan")
    for backend in FUSED:
        assert DispersionLoss(backend=backend)(z).isnan()


# --- as a PyTorch operator -------------------------------------------------------------------


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_the_operator_is_registered_properly(backend: str, with_grad: bool, matmul_dtype: torch.dtype) -> None:
    z = tokens(2, 9, 6).requires_grad_(with_grad)
    # the remaining check would differentiate dz
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        kernels._pairwise, (z, "angular", 1.0, 0.25, matmul_dtype, with_grad, backend), test_utils=checks
    )


class Model(nn.Module):
    """A layer, and the loss on its output."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 12)
        self.dispersion = DispersionLoss("angular", 0.5, backend)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return hidden.square().mean() + 0.1 * self.dispersion(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_a_model_with_the_loss_compiles_without_a_graph_break(backend: str, autocast: bool) -> None:
    model, x = Model(backend), tokens(2, 20, 12)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            forward(x).backward()
        gradients.append(model.layer.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# --- choice of the backend ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_is_the_cpu_kernel_for_the_family_and_the_reference_otherwise(variant: str) -> None:
    chosen = kernels.choose("auto", variant, 1.0, 0.25, tokens(1, 4, 3))
    assert chosen == ("cpu" if variant in FAMILY else "reference")


def test_auto_is_the_reference_if_the_kernels_do_not_support_the_input() -> None:
    assert kernels.choose("auto", "angular", 1.0, 0.25, tokens(1, 4, 3).double()) == "reference"
    assert kernels.choose("auto", "angular", 0.001, 0.25, tokens(1, 4, 3)) == "reference"


def test_the_kernels_have_no_polynomial_for_a_clamp_below_a_tenth() -> None:
    assert kernels.choose("auto", "angular", 1.0, 0.05, tokens(1, 4, 3)) == "reference"
    assert kernels.choose("auto", "cosine", 1.0, 0.05, tokens(1, 4, 3)) == "cpu", "which clamps nothing"
    with pytest.raises(ValueError, match=r"clamp=0\.05 is below 0\.1.*use backend=auto"):
        DispersionLoss(backend="cpu", clamp=0.05)


def test_the_smallest_temperature_is_still_finite() -> None:
    for variant in ("angular", "cosine"):
        for backend in FUSED:
            check(tokens(1, 6, 4), variant, 1.01 * pairwise.smallest_tau(variant, 0.25), backend, torch.float32)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("make", [DispersionLoss, DispersionConfig], ids=["loss", "config"])
def test_a_fused_backend_rejects_a_variant_outside_the_family(make: type, backend: str) -> None:
    with pytest.raises(ValueError, match=r"variant=entropy.*angular.*use backend=auto"):
        make(variant="entropy", backend=backend)


@pytest.mark.parametrize("backend", FUSED)
def test_a_fused_backend_rejects_an_unsupported_dtype(backend: str) -> None:
    with pytest.raises(ValueError, match=r"float64.*use backend=auto"):
        DispersionLoss(backend=backend)(tokens(1, 4, 3).double())


def test_triton_rejects_a_cpu_tensor_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"cpu.*needs a GPU.*use backend=auto"):
        DispersionLoss(backend="triton")(tokens(1, 4, 3))
