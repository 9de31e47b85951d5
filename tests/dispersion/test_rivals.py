"""The losses that stand beside the paper's: closed forms, memory, random directions.

`test_loss.py` compares all formulas with a second implementation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.formulas import VARIANTS, draw_slices
from nanodisp.dispersion.placement import sample_positions, sample_slices

RIVALS = [
    "cosreg",
    "simctg",
    "feature_decorrelation",
    "feature_correlation",
    "istar",
    "istar_reversed",
    "condition",
    "sigreg",
]
COVARIANCE = ["feature_decorrelation", "feature_correlation", "istar", "condition"]
WITHOUT_AXES = ["cosreg", "simctg", "istar", "istar_reversed", "condition"]
LINEAR = ["cosreg", "feature_decorrelation", "feature_correlation", "istar", "istar_reversed", "condition", "sigreg"]


def loss(variant: str, z: Tensor, *slices: Tensor) -> float:
    return DispersionLoss(variant)(z, *slices).item()


def gaussian(n_tokens: int, n_features: int, seed: int = 0) -> Tensor:
    return torch.randn(1, n_tokens, n_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_variances(variances: list[float]) -> Tensor:
    """2 F tokens, +-s_f along each axis, whose covariance is diagonal with these variances."""
    n_tokens = 2 * len(variances)
    half = torch.tensor(variances, dtype=torch.float64).mul((n_tokens - 1) / 2).sqrt().diag()
    return torch.cat([half, -half])[None]


def rotated(z: Tensor) -> Tensor:
    return z @ torch.linalg.qr(gaussian(z.size(2), z.size(2), seed=1)[0]).Q


# --- closed forms ------------------------------------------------------------------------------


def test_cosreg_of_equal_opposite_and_orthogonal_tokens() -> None:
    equal = torch.full((1, 4, 9), 1e4)
    assert loss("cosreg", equal) == pytest.approx(12 / 16, abs=1e-5)
    assert loss("cosreg", equal * torch.tensor([1.0, -1, 1, -1])[None, :, None]) == pytest.approx(-4 / 16, abs=1e-5)
    assert loss("cosreg", 1e4 * torch.eye(4)[None]) == pytest.approx(0, abs=1e-6)


def test_cosreg_excludes_the_diagonal_exactly_also_for_short_tokens() -> None:
    assert loss("cosreg", 0.01 * torch.eye(4)[None]) == pytest.approx(0, abs=1e-7), "u has the length 1/2"


@pytest.mark.parametrize(("cosine", "right"), [(1.0, 0.5), (0.6, 0.1), (0.4, 0.0), (-1.0, 0.0)])
def test_simctg_penalises_cosines_above_one_half(cosine: float, right: float) -> None:
    z = 1e5 * torch.tensor([[[1.0, 0], [cosine, math.sqrt(1 - cosine**2)]]])
    assert loss("simctg", z) == pytest.approx(right, abs=1e-6)


def test_feature_decorrelation_of_two_features() -> None:
    x = gaussian(50, 1)[0, :, 0]
    x = (x - x.mean()) / x.std()
    z = torch.stack([x, 3 * x], dim=1)[None]  # Cov = [[1, 3], [3, 9]]
    assert loss("feature_decorrelation", z) == pytest.approx((9 + 9) / 2)
    assert loss("feature_decorrelation", with_variances([1, 4, 0.5])) == pytest.approx(0, abs=1e-12)


def test_feature_correlation_of_two_features_has_no_unit() -> None:
    z = 10 * gaussian(50, 2)
    right = torch.corrcoef(z[0].T)[0, 1].item() ** 2  # twice, over F = 2
    assert loss("feature_correlation", z) == pytest.approx(right, rel=1e-6)
    assert loss("feature_correlation", z * torch.tensor([100.0, 1])) == pytest.approx(right, rel=1e-6)


def shrunk_score(variances: list[float]) -> float:
    shrunk = 0.8 * np.array(variances) + 0.2 * (np.mean(variances) + 1e-12)
    return (shrunk.sum() ** 2 / (shrunk**2).sum() - 1) / (len(variances) - 1)


@pytest.mark.parametrize("variances", [[2.0] * 6, [1, 3], [5, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]], ids=str)
def test_istar_of_known_variances(variances: list[float]) -> None:
    z = with_variances(variances)
    assert loss("istar_reversed", z) == pytest.approx(shrunk_score(variances))
    assert loss("istar", z) == pytest.approx(1 - shrunk_score(variances))


def test_istar_of_an_isotropic_cloud_is_0() -> None:
    assert loss("istar", with_variances([2.0] * 6)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", ["istar", "feature_correlation", "condition"])
def test_tokens_that_move_together_do_not_lower_the_loss(variant: str) -> None:
    z = gaussian(20, 5) * torch.tensor([10.0, 1, 1, 1, 1], dtype=torch.float64) + 3
    closer = z.mean(dim=1, keepdim=True) + 1e-4 * (z - z.mean(dim=1, keepdim=True))
    assert loss(variant, closer) == pytest.approx(loss(variant, z), rel=0.001)


def test_istar_reversed_has_the_opposite_gradient() -> None:
    z = gaussian(10, 6).requires_grad_()
    forward, backward = (torch.autograd.grad(DispersionLoss(v)(z), z)[0] for v in ("istar", "istar_reversed"))
    torch.testing.assert_close(forward, -backward)


def test_condition_of_known_variances() -> None:
    shift = 1e-3 * (100 + 9 + 4) / 3 + 1e-12
    assert loss("condition", with_variances([9, 100, 4])) == pytest.approx(math.log((100 + shift) / (4 + shift)))
    assert loss("condition", with_variances([5, 5, 5])) == pytest.approx(0, abs=1e-9)


def test_condition_ignores_directions_that_so_few_tokens_cannot_fill() -> None:
    """Three tokens at the corners of an equal triangle in 50 dimensions have two equal variances."""
    z = torch.zeros(1, 3, 50, dtype=torch.float64)
    z[0, :, :3] = torch.eye(3)
    assert loss("condition", z) == pytest.approx(0, abs=1e-9)


def test_sigreg_of_equal_tokens_is_the_integral_of_the_gap() -> None:
    """All projections 0: N int (1 - exp(-t^2/2))^2 exp(-t^2/2) from -3 to 3, by the error function."""
    parts = [(1, 1), (-2, 2), (1, 3)]  # (1 - g)^2 g = g - 2 g^2 + g^3
    right = sum(k * math.sqrt(2 * math.pi / a) * math.erf(3 * math.sqrt(a / 2)) for k, a in parts)
    assert loss("sigreg", torch.zeros(1, 10, 5)) == pytest.approx(10 * right, rel=1e-3)


def test_sigreg_is_the_statistic_of_epps_and_pulley() -> None:
    """The integral over all t in closed form, over pairs of tokens; beyond 3 there is little."""
    z = gaussian(12, 1)
    slices = torch.ones(1, 1)
    x = z[0, :, 0]
    pairs = torch.exp(-((x[:, None] - x) ** 2) / 2).mean() * math.sqrt(2 * math.pi)
    right = 12 * (pairs - 2 * math.sqrt(math.pi) * torch.exp(-(x**2) / 4).mean() + math.sqrt(2 * math.pi / 3))
    assert loss("sigreg", z, slices) == pytest.approx(right.item(), abs=12 * 2 * 1.3e-3)
    assert right > 0.1, "or the tolerance would be enough"


def test_sigreg_prefers_a_standard_normal_to_other_spreads_and_shapes() -> None:
    normal = gaussian(2000, 8)
    lowest = sum(loss("sigreg", gaussian(500, 8, seed)) for seed in range(40)) / 40
    assert lowest == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), rel=0.1), "its mean for any N"
    for other in (0.5 * normal, 2 * normal, normal + 1, with_variances([1.0] * 8).repeat(1, 125, 1)):
        assert loss("sigreg", other) > 5 * lowest


@settings(max_examples=30)
@given(st.sampled_from(WITHOUT_AXES), st.integers(2, 20), st.integers(2, 20), st.integers(0, 10**6))
def test_a_rotation_does_not_matter(variant: str, n_tokens: int, n_features: int, seed: int) -> None:
    z = gaussian(n_tokens, n_features, seed)
    assert loss(variant, rotated(z)) == pytest.approx(loss(variant, z), rel=1e-6, abs=1e-6)


@settings(max_examples=30)
@given(st.sampled_from(COVARIANCE), st.integers(0, 10**6))
def test_a_shift_of_all_tokens_does_not_matter_to_a_covariance(variant: str, seed: int) -> None:
    z = gaussian(9, 5, seed)
    assert loss(variant, z + 7) == pytest.approx(loss(variant, z), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("variant", ["condition", "cosreg", "simctg"])
def test_what_is_relative_hardly_depends_on_the_scale(variant: str) -> None:
    z = gaussian(20, 8)
    assert loss(variant, 30 * z) == pytest.approx(loss(variant, z), rel=0.05)


# --- memory --------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation, also of backward, returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest_tensor(variant: str, n_tokens: int, n_features: int) -> int:
    z = torch.randn(1, n_tokens, n_features, requires_grad=True)
    with LargestTensor() as largest:
        DispersionLoss(variant, backend="reference")(z).backward()
    return largest.elements


@pytest.mark.parametrize("variant", LINEAR)
def test_many_tokens_need_no_matrix_of_pairs(variant: str) -> None:
    assert largest_tensor(variant, 1000, 32) <= 1000 * 64


@pytest.mark.parametrize("variant", COVARIANCE)
def test_many_features_need_no_matrix_of_features(variant: str) -> None:
    assert largest_tensor(variant, 32, 1000) <= 32 * 1000


def test_the_largest_tensor_of_a_pairwise_formula_is_seen() -> None:
    assert largest_tensor("simctg", 300, 8) >= 300 * 300


# --- degenerate tokens -----------------------------------------------------------------------------


DEGENERATE = {
    "equal": torch.ones(2, 5, 7),
    "one direction": torch.arange(1.0, 6.0)[None, :, None] * torch.ones(2, 5, 7),
    "tiny": 1e-20 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)),
    "large": 1e4 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)),
    "two tokens": torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("variant", RIVALS)
def test_degenerate_tokens_have_moderate_gradients(variant: str, kind: str, dtype: torch.dtype) -> None:
    z = DEGENERATE[kind].to(dtype).requires_grad_()
    value = DispersionLoss(variant)(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype


@pytest.mark.parametrize("variant", RIVALS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_seen_in_the_loss(variant: str, wrong: float) -> None:
    z = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    z[1, 2, 3] = wrong
    assert math.isnan(loss(variant, z))


@pytest.mark.parametrize("variant", RIVALS)
def test_bfloat16_tokens_are_computed_in_float32(variant: str) -> None:
    z = gaussian(9, 6).to(torch.bfloat16)
    assert loss(variant, z) == loss(variant, z.float())


@pytest.mark.parametrize("variant", ["istar", "condition"])
def test_descent_makes_a_flat_cloud_rounder(variant: str) -> None:
    z = (gaussian(40, 6) * torch.tensor([5.0, 1, 1, 1, 1, 0.2], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(DispersionLoss(variant)(z), z)
    spread = torch.linalg.svdvals((z - gradient).detach()[0] - (z - gradient).detach()[0].mean(dim=0))
    before = torch.linalg.svdvals(z.detach()[0] - z.detach()[0].mean(dim=0))
    assert spread[0] / spread[-1] < before[0] / before[-1]


# --- uniformity --------------------------------------------------------------------------------------


def test_uniformity_is_cosine_with_another_temperature() -> None:
    """log mean exp(-t |u_i - u_j|^2) = cosine(tau = 1 / (2 t)) - 2 t for unit vectors, as docs/dispersion.md says."""
    z, t = 1e6 * gaussian(12, 5), 2.0
    u = z / z.norm(dim=2, keepdim=True)
    squared = torch.cdist(u, u).square()[0][~torch.eye(12, dtype=torch.bool)]
    right = torch.exp(-t * squared).mean().log() + 2 * t
    assert DispersionLoss("cosine", tau=1 / (2 * t))(z).item() == pytest.approx(right.item(), abs=1e-6)


# --- random directions ---------------------------------------------------------------------------------


def test_slices_are_unit_columns_and_follow_from_seed_and_step() -> None:
    slices = sample_slices("sigreg", 1, 2, 10)
    assert slices is not None
    assert slices.shape == (10, 64)
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(64))
    torch.manual_seed(3)
    assert torch.equal(slices, sample_slices("sigreg", 1, 2, 10))
    for seed, step in ((2, 2), (1, 3), (2, 1)):
        assert not torch.equal(slices, sample_slices("sigreg", seed, step, 10))


def test_slices_have_no_preferred_direction() -> None:
    drawn = torch.cat([sample_slices("sigreg", 0, step, 3) for step in range(100)], dim=1)
    assert drawn.mean(dim=1).abs().max() < 0.03
    assert (drawn @ drawn.T / drawn.size(1) - torch.eye(3) / 3).abs().max() < 0.03


def test_slices_do_not_use_the_global_generator_or_that_of_positions() -> None:
    before = torch.get_rng_state()
    slices = sample_slices("sigreg", 1, 2, 10)
    assert torch.equal(torch.get_rng_state(), before)
    for layer in range(3):
        state = int(np.random.SeedSequence((1, 2, layer)).generate_state(1, np.uint64)[0] >> 1)
        assert not torch.equal(slices, draw_slices(10, torch.Generator().manual_seed(state)))
    assert sample_positions(1, 2, [1], 50, 3).tolist() == [[4, 10, 42]], "as before there were slices"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "sigreg"])
def test_other_variants_draw_no_slices(variant: str) -> None:
    assert sample_slices(variant, 1, 2, 10) is None


def test_without_slices_the_loss_is_the_same_every_time() -> None:
    z = gaussian(9, 6)
    assert loss("sigreg", z) == loss("sigreg", z)
    drawn = sample_slices("sigreg", 0, 0, 6)
    assert drawn is not None
    assert loss("sigreg", z, drawn) != loss("sigreg", z)
