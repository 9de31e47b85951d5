"""The dispersion formulas against a second implementation, pair by pair and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanodisp.dispersion import VARIANTS, DispersionLoss
from nanodisp.dispersion.placement import DispersionConfig, lambda_at, sample_positions, select_layers

# --- the second implementation: one sequence, z [N, F] float64, token by token against the others ---


def others(rows: Tensor, i: int) -> Tensor:
    return torch.cat([rows[:i], rows[i + 1 :]])


def directions(z: Tensor) -> Tensor:
    return z / (z.square().sum(dim=1, keepdim=True).sqrt() + 0.01)


def cosines_with_others(u: Tensor, i: int) -> Tensor:
    return others(u @ u[i], i)


def angles_with_others(u: Tensor, i: int) -> Tensor:
    """arccos / pi at the clamped cosine, with the slope at that point for any cosine."""
    c = cosines_with_others(u, i)
    at = c.detach().clamp(-0.75, 0.75)
    slope = -1 / (math.pi * (1 - at**2).sqrt())
    return at.acos() / math.pi + slope * (c - c.detach())


def mean_over_pairs(rows: Tensor, terms_of_token: Callable[[Tensor, int], Tensor]) -> Tensor:
    return sum(terms_of_token(rows, i).sum() for i in range(len(rows))) / (len(rows) * (len(rows) - 1))


def squared_distances(z: Tensor, i: int) -> Tensor:
    return others((z - z[i]).square().sum(dim=1), i)


def standardised(z: Tensor) -> Tensor:
    centred = z - z.mean(dim=1, keepdim=True)
    return centred / (centred.square().sum(dim=1, keepdim=True) / (z.size(1) - 1)).sqrt()


def negative_entropy(z: Tensor, i: int, tau: float) -> Tensor:
    distances = squared_distances(z, i)
    weights = (-(distances - distances.min().detach()) / tau).exp()
    p = weights / weights.sum()
    return (p * (p + 0.01).log() / math.log(2)).sum()


def expected(variant: str, z: Tensor, tau: float) -> Tensor:
    n_tokens, n_features = z.shape
    if variant == "angular":
        return mean_over_pairs(directions(z), lambda u, i: (-angles_with_others(u, i) / tau).exp()).log()
    if variant == "orthogonalization":
        return mean_over_pairs(directions(z), lambda u, i: (0.5 - angles_with_others(u, i)).relu() ** 2)
    if variant == "cosine":
        return mean_over_pairs(directions(z), lambda u, i: (cosines_with_others(u, i) / tau).exp()).log()
    if variant == "decorrelation":
        rows = standardised(z)
        return mean_over_pairs(rows, lambda rows, i: (others(rows @ rows[i], i) / (n_features - 1)) ** 2)
    if variant == "l2_repel":
        nearest = min(squared_distances(z, i).min().item() for i in range(n_tokens)) / tau
        total = mean_over_pairs(z, lambda z, i: (nearest - squared_distances(z, i) / tau).exp())
        return total.log() - nearest + 0.1 * (z**2).mean()
    if variant == "entropy":
        return sum(negative_entropy(z, i, tau) for i in range(n_tokens)) / n_tokens
    if variant == "variance":
        spread = ((z - z.mean(dim=0)) ** 2).sum(dim=0) / (n_tokens - 1)
        return (1 - spread.sqrt()).relu().mean()
    if variant == "logdet":
        u = directions(z)
        inside = torch.eye(n_features, dtype=z.dtype) + n_features / (n_tokens * tau**2) * u.T @ u
        return -torch.logdet(inside) / 2 / n_features
    return expected_of_rival(variant, z)


def expected_of_rival(variant: str, z: Tensor) -> Tensor:
    n_tokens, n_features = z.shape
    u = directions(z)
    if variant == "cosreg":
        return sum(cosines_with_others(u, i).sum() for i in range(n_tokens)) / n_tokens**2
    if variant == "simctg":
        return mean_over_pairs(u, lambda u, i: (0.5 - u[i] @ u[i] + cosines_with_others(u, i)).relu())
    if variant == "sigreg":
        return epps_pulley(z)
    covariance = torch.cov(z.T).reshape(n_features, n_features)
    if variant == "feature_decorrelation":
        return (covariance - covariance.diagonal().diag()).square().sum() / n_features
    if variant == "feature_correlation":
        correlation = (
            covariance / (covariance.diagonal()[:, None] + 1e-12).sqrt() / (covariance.diagonal() + 1e-12).sqrt()
        )
        return correlation.tril(-1).square().sum() * 2 / n_features
    if variant == "condition":
        spread = torch.linalg.svdvals(z - z.mean(dim=0)).square() / (n_tokens - 1)  # from the largest
        shift = 1e-3 * covariance.trace() / n_features + 1e-12
        return (spread[0] + shift).log() - (spread[min(n_tokens - 1, n_features) - 1] + shift).log()
    if variant in ("istar", "istar_reversed"):
        target = (covariance.trace() / n_features + 1e-12) * torch.eye(n_features, dtype=z.dtype)
        score = isoscore(torch.linalg.eigvalsh(0.8 * covariance + 0.2 * target))
        return 1 - score if variant == "istar" else score
    raise AssertionError(f"no second implementation of {variant}")


def isoscore(variances: Tensor) -> Tensor:
    """Step by step as in arXiv 2108.07344: normalise, defect, fraction of dimensions used, rescale."""
    n = len(variances)
    normalised = math.sqrt(n) * variances / variances.norm()
    squared_defect = (normalised - 1).square().sum() / (2 * (n - math.sqrt(n)))
    used = (n - squared_defect * (n - math.sqrt(n))) ** 2 / n**2
    return (n * used - 1) / (n - 1)


def epps_pulley(z: Tensor) -> Tensor:
    """By complex numbers over both halves of the interval."""
    drawn = torch.randn(z.size(1), 64, generator=torch.Generator().manual_seed(0)).double()
    projected = z @ (drawn / drawn.square().sum(dim=0).sqrt())  # [N, 64]
    t = torch.linspace(-3, 3, 33, dtype=z.dtype)
    gap = torch.exp(1j * projected[:, :, None] * t).mean(dim=0) - torch.exp(-(t**2) / 2)
    return len(z) * torch.trapezoid(gap.abs().square() * torch.exp(-(t**2) / 2), t).mean()


def expected_loss_and_gradient(variant: str, z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    z = z.double().requires_grad_()
    loss = sum(expected(variant, sequence, tau) for sequence in z) / len(z)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def loss_and_gradient(variant: str, z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = DispersionLoss(variant, tau, backend="reference")(z)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def tokens(n_sequences: int, n_tokens: int, n_features: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    return torch.randn(n_sequences, n_tokens, n_features, generator=torch.Generator().manual_seed(seed)) * scale


def check_against_second_implementation(variant: str, z: Tensor, tau: float) -> None:
    loss, gradient = loss_and_gradient(variant, z, tau)
    right_loss, right = expected_loss_and_gradient(variant, z, tau)
    assert abs(loss - right_loss) <= 1e-5 * max(1, abs(right_loss))
    # 5e-8: the rounding of one cosine, if orthogonalization has almost no gradient
    assert (gradient - right).norm() <= 1e-5 * right.norm() + 5e-8


SHAPES = [(1, 2, 2), (3, 2, 7), (2, 5, 3), (2, 16, 16), (1, 33, 130), (1, 130, 33), (1, 512, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_gradient_is_within_1e_5_of_the_formula(variant: str, shape: tuple[int, int, int]) -> None:
    check_against_second_implementation(variant, tokens(*shape), tau=1.0)


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    n_tokens=st.integers(2, 40),
    n_features=st.integers(3, 40),
    seed=st.integers(0, 10**6),
    tau=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_any_shape_and_temperature(variant: str, n_tokens: int, n_features: int, seed: int, tau: float) -> None:
    z = tokens(2, n_tokens, n_features, seed)
    u = z / (z.norm(dim=2, keepdim=True) + 0.01)
    to_the_kink = 0.5 - u.square().sum(dim=2)[:, :, None] + u @ u.mT
    assume(variant != "simctg" or to_the_kink.abs().min() > 1e-6)  # there the gradient depends on the rounding
    check_against_second_implementation(variant, z, tau)


DEGENERATE = {
    "identical": torch.ones(1, 6, 5).cumsum(dim=2),
    "zero": torch.zeros(1, 6, 5),
    "opposite": torch.ones(1, 6, 5) * torch.tensor([1.0, -1.0] * 3)[None, :, None],
    "one zero": tokens(1, 6, 5) * torch.tensor([0.0, 1, 1, 1, 1, 1])[None, :, None],
    "constant features": torch.arange(1.0, 7.0)[None, :, None].expand(1, 6, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "variance"])
def test_degenerate_tokens_have_finite_gradients(variant: str, kind: str, dtype: torch.dtype) -> None:
    loss, gradient = loss_and_gradient(variant, DEGENERATE[kind].to(dtype), 1.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_tokens_does_not_matter(variant: str) -> None:
    z = tokens(2, 20, 12)
    shuffled = z[:, torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    loss = DispersionLoss(variant, backend="reference")
    torch.testing.assert_close(loss(shuffled), loss(z))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_over_sequences(variant: str) -> None:
    z = tokens(3, 9, 6)
    loss = DispersionLoss(variant, backend="reference")
    torch.testing.assert_close(loss(z), torch.stack([loss(sequence[None]) for sequence in z]).mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_reduce_the_precision(variant: str) -> None:
    z = tokens(2, 20, 12)
    loss = DispersionLoss(variant, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z), loss(z.double().float()))
        inside = loss(z)
    assert torch.equal(inside, loss(z))


def test_a_float64_input_gives_a_float64_loss() -> None:
    assert DispersionLoss()(tokens(1, 4, 3).double()).dtype == torch.float64


def test_orthogonal_tokens_have_an_angle_of_one_half() -> None:
    z = 1000 * torch.eye(4)[None]
    torch.testing.assert_close(DispersionLoss("angular", tau=0.5, backend="reference")(z).item(), -0.5 / 0.5)
    assert DispersionLoss("orthogonalization", backend="reference")(z).item() == pytest.approx(0, abs=1e-12)


def test_between_the_edges_the_clamp_changes_nothing() -> None:
    z = 1000 * torch.tensor([[[1.0, 0], [0.85, math.sqrt(1 - 0.85**2)]]])
    assert DispersionLoss(backend="reference", clamp=0.1)(z).item() == pytest.approx(
        -math.acos(0.85) / math.pi, abs=1e-4
    )
    assert DispersionLoss(backend="reference")(z).item() == pytest.approx(-math.acos(0.75) / math.pi, abs=1e-6)


def test_the_diagonal_is_excluded() -> None:
    """Two opposite tokens: with a term for c_ii = 1 the loss would be larger than its value at the edge."""
    z = torch.tensor([[[100.0, 0], [-100, 0]]])
    edge = math.acos(-0.75) / math.pi
    assert DispersionLoss("angular", backend="reference")(z).item() == pytest.approx(-edge, abs=1e-6)


@pytest.mark.parametrize(("cosine", "clamp"), [(0.8, 0.25), (0.99, 0.25), (0.9999, 0.25), (0.95, 0.1)])
def test_nearly_parallel_tokens_are_pushed_apart_with_the_slope_at_the_edge(cosine: float, clamp: float) -> None:
    second = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    z = 10 * torch.stack([torch.tensor([1.0, 0.0]), second])[None]
    z.requires_grad_()
    loss = DispersionLoss("angular", 1.0, "reference", clamp)(z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(-math.acos(1 - clamp) / math.pi, abs=1e-6)  # the value at the edge
    assert gradient[0, 0, 1] > 0  # descent turns the first token away from the second
    sine = math.sqrt(1 - cosine**2)
    slope_of_edge = 1 / (math.pi * math.sqrt(1 - (1 - clamp) ** 2))  # -dD/dc
    assert gradient[0, 0, 1].item() == pytest.approx(slope_of_edge * sine * 10 / 10.01**2, rel=1e-4)


# --- layers, positions, schedules ------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [1, 2, 3, 4, 5]),
        ("last", [5]),
        ("first_half", [1, 2]),
        ("last_half", [3, 4, 5]),
        ([0, 3], [0, 3]),
        ([-1, 5, 2], [2, 5]),
        ([-6], [0]),
    ],
)
def test_layers_are_selected_by_name_or_index(layers, expected: list[int]) -> None:
    assert select_layers(layers, 5) == expected


@pytest.mark.parametrize("layers", ["middle", [6], [-7], [1.5], [], ["all"]])
def test_layers_that_the_model_does_not_have_are_rejected(layers) -> None:
    with pytest.raises(ValueError, match="layers"):
        select_layers(layers, 5)


def test_first_half_of_one_layer_is_rejected() -> None:
    with pytest.raises(ValueError, match="selects no layer"):
        select_layers("first_half", 1)


def test_positions_are_distinct_sorted_and_in_range() -> None:
    positions = sample_positions(1, 2, [1, 2, 3], 50, 10)
    assert positions.shape == (3, 10)
    assert (positions.diff(dim=1) > 0).all()
    assert positions.min() >= 0
    assert positions.max() < 50


def test_positions_depend_only_on_seed_step_and_layer() -> None:
    torch.manual_seed(0)
    alone = sample_positions(1, 2, [3], 50, 10)
    torch.manual_seed(1)
    with_others = sample_positions(1, 2, [1, 2, 3], 50, 10)
    assert torch.equal(with_others[2], alone[0])


@pytest.mark.parametrize(("seed", "step", "layer"), [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
def test_a_different_seed_step_or_layer_draws_different_positions(seed: int, step: int, layer: int) -> None:
    assert not torch.equal(sample_positions(seed, step, [layer], 50, 10), sample_positions(1, 2, [3], 50, 10))


@pytest.mark.parametrize("max_tokens", [None, 7, 8])
def test_a_short_sequence_uses_all_its_positions(max_tokens: int | None) -> None:
    assert sample_positions(0, 0, [1, 2], 7, max_tokens).tolist() == [list(range(7))] * 2


def test_drawing_positions_does_not_use_the_global_generator() -> None:
    before = torch.get_rng_state()
    sample_positions(1, 2, [3], 50, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_constant_schedule() -> None:
    assert [lambda_at(DispersionConfig(lambda_disp=0.3), step, 10) for step in (0, 9)] == [0.3, 0.3]


def test_warmup_schedule_rises_linearly_and_then_stays_constant() -> None:
    config = DispersionConfig(lambda_disp=0.2, schedule="warmup", warmup_fraction=0.5)
    assert [lambda_at(config, step, 8) for step in (0, 1, 2, 4, 7)] == pytest.approx([0, 0.05, 0.1, 0.2, 0.2])


def test_the_old_name_of_the_warmup_schedule_is_rejected_with_the_new_one() -> None:
    with pytest.raises(ValueError, match=r"schedule=linear is now called dispersion\.schedule=warmup"):
        DispersionConfig(schedule="linear")


def test_cosine_schedule_decays() -> None:
    config = DispersionConfig(lambda_disp=0.2, schedule="cosine")
    assert [lambda_at(config, step, 4) for step in (0, 2)] == pytest.approx([0.2, 0.1])
    assert lambda_at(config, 3, 4) < lambda_at(config, 2, 4)


# --- rejected settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "angle"},
        {"schedule": "step"},
        {"lambda_disp": -1.0},
        {"lambda_disp": math.inf},
        {"tau": 0.0},
        {"tau": math.nan},
        {"max_tokens": 1},
        {"warmup_fraction": 0.0},
        {"backend": "cuda"},
        {"clamp": 0.0},
        {"clamp": 1.0},
        {"clamp": math.nan},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_error_names_a_wrong_setting(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DispersionConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"variant": "angle"}, {"tau": 0.0}, {"backend": "cuda"}, {"clamp": 0.0}], ids=str)
def test_the_error_names_a_wrong_argument_of_the_loss(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DispersionLoss(**wrong)


@pytest.mark.parametrize("z", [torch.zeros(4, 3), torch.zeros(1, 1, 3), torch.zeros(1, 4, 3, dtype=torch.int64)])
def test_a_wrong_tensor_is_rejected(z: Tensor) -> None:
    with pytest.raises(ValueError, match="z must be floating point"):
        DispersionLoss()(z)


def test_the_defaults_are_the_papers_settings_and_two_tokens_are_enough() -> None:
    assert DispersionConfig() == DispersionConfig("angular", 0.1, 1.0, "all", 256, "constant")
    assert DispersionConfig(max_tokens=2).max_tokens == 2
    assert DispersionConfig("orthogonalization", tau=1e-3, backend="cpu").backend == "cpu", "it has no temperature"
