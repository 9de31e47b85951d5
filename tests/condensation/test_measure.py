"""The figures of condensation against the full matrices in numpy and scipy."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bench.condensation import package_on
from nanodisp.condensation.cosine import mean_cosine, trend
from nanodisp.condensation.measure import hidden_states, measure
from nanodisp.condensation.sums import LayerSums
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPT, GPTConfig

WINDOWS = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(0))


class Lookup(nn.Module):
    """Hidden states that a test chooses: [layers, vocabulary, F] looked up by token."""

    def __init__(self, tables: Tensor) -> None:
        super().__init__()
        self.tables = nn.Parameter(tables)

    def forward(self, idx: Tensor) -> list[Tensor]:
        return [table[idx] for table in self.tables]


def lookup(n_layers: int = 4, n_features: int = 12, seed: int = 0) -> Lookup:
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(n_layers, 50, n_features, generator=generator, dtype=torch.float64)
    return Lookup(tables + torch.arange(n_layers)[:, None, None] * 0.4)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=24, vocab_size=50, dropout=0.1))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 30), st.floats(-2, 5), st.integers(0, 999))
def test_mean_cosine_is_the_mean_over_all_pairs(b: int, n: int, f: int, shift: float, seed: int) -> None:
    z = torch.randn(b, n, f, generator=torch.Generator().manual_seed(seed)) + shift
    pairs = [
        torch.cosine_similarity(z[s, i], z[s, j], dim=0) for s in range(b) for i in range(n) for j in range(n) if i != j
    ]
    assert mean_cosine(z).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_equal_orthogonal_and_opposite_tokens() -> None:
    same = torch.ones(2, 5, 8, dtype=torch.bfloat16)
    assert mean_cosine(same).item() == pytest.approx(1)
    assert mean_cosine(torch.eye(6)[None]).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine(torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]])).item() == pytest.approx(-1)


# --- against the full matrices -----------------------------------------------------------


def pairs(z: np.ndarray, include_diagonal: bool) -> np.ndarray:
    """Every window's cosines, [windows, pairs]."""
    u = z / np.linalg.norm(z, axis=-1, keepdims=True)
    chosen = np.ones((z.shape[1],) * 2, dtype=bool) if include_diagonal else ~np.eye(z.shape[1], dtype=bool)
    return np.array([np.clip(window @ window.T, -1, 1)[chosen] for window in u])


@pytest.mark.parametrize("include_diagonal", [False, True])
def test_cosines_equal_those_of_the_full_matrix(include_diagonal: bool) -> None:
    model = lookup()
    result = measure(model, WINDOWS.split(4), include_diagonal=include_diagonal)
    for layer, z in enumerate(model(WINDOWS)):
        expected = pairs(z.detach().numpy(), include_diagonal)
        assert result.mean[layer] == pytest.approx(expected.mean(), abs=1e-6)
        assert result.std[layer] == pytest.approx(expected.std(), abs=1e-6)
        density, _ = np.histogram(expected, bins=128, range=(-1, 1), density=True)
        np.testing.assert_allclose(result.histogram[layer], density, atol=1e-6)
        assert result.histogram[layer].mean() * 2 == pytest.approx(1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 24), st.integers(2, 16), st.integers(0, 999))
def test_spectrum_and_covariance_are_of_all_tokens(windows: int, block: int, n_features: int, seed: int) -> None:
    model, idx = lookup(2, n_features, seed), WINDOWS[:windows, :block]
    result = measure(model, idx)
    for layer, z in enumerate(model(idx)):
        x = z.detach().numpy().reshape(-1, n_features)
        sigma = np.linalg.svd(x, compute_uv=False)
        entropy = stats.entropy(sigma)
        assert result.entropy[layer] == pytest.approx(entropy, abs=1e-6)
        assert result.effective_rank[layer] == pytest.approx(math.exp(entropy), abs=1e-5)
        assert result.explained[layer] == pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), abs=1e-6)
        np.testing.assert_allclose(result.variance[layer], x.var(axis=0, ddof=1), atol=1e-6)
        distinct = len(np.unique(x, axis=0))
        if distinct > n_features:  # else the covariance is singular
            assert result.condition[layer] == pytest.approx(np.linalg.cond(np.cov(x.T)), rel=1e-6)
        elif len(x) <= n_features:
            assert math.isinf(result.condition[layer])


def test_frequencies_are_split_within_each_window() -> None:
    model = lookup()
    result = measure(model, WINDOWS)
    for layer, z in enumerate(model(WINDOWS)):
        low = z.mean(dim=1, keepdim=True).expand_as(z).detach()
        ratios = torch.linalg.matrix_norm(z.detach() - low) / torch.linalg.matrix_norm(low)
        assert result.frequency_ratio[layer] == pytest.approx(ratios.mean().item(), abs=1e-6)


def test_outliers_are_seen_by_kurtosis_and_by_the_largest_value() -> None:
    model = lookup()
    result = measure(model, WINDOWS.split(4))
    for layer, z in enumerate(model(WINDOWS)):
        x = z.detach().double().numpy()
        assert result.kurtosis[layer] == pytest.approx(stats.kurtosis(x, axis=None, fisher=False), rel=1e-6)
        medians = z.detach().abs().flatten(1).median(dim=1).values
        assert result.outlier[layer] == pytest.approx(np.abs(x).max() / medians.mean().item(), rel=1e-6)


def test_float32_states_lose_no_further_precision() -> None:
    model = gpt().eval()
    result = measure(model, WINDOWS)
    for layer, z in enumerate(model(WINDOWS, return_hidden=True).hidden):
        x = z.detach().double().flatten(0, 1).numpy()
        assert result.mean[layer] == pytest.approx(pairs(z.detach().double().numpy(), False).mean(), abs=1e-6)
        assert result.entropy[layer] == pytest.approx(stats.entropy(np.linalg.svd(x, compute_uv=False)), abs=1e-6)
    assert math.isinf(result.condition[-1]), "LayerNorm's outputs are in a hyperplane"


def test_a_token_of_zeros_has_cosine_0_with_every_token_and_itself() -> None:
    model = lookup(1)
    with torch.no_grad():
        model.tables[:, 0] = 0
    idx = torch.tensor([[0, 0, 1]])
    result = measure(model, idx, include_diagonal=True)
    assert result.mean[0] == pytest.approx(1 / 9)
    dead = measure(Lookup(torch.zeros(1, 50, 4)), idx)
    assert dead.mean[0] == 0
    assert math.isnan(dead.entropy[0])


@pytest.mark.parametrize("k", [1, 3])
def test_without_directions_the_rest_of_the_tokens_is_measured(k: int) -> None:
    model = lookup()
    with torch.no_grad():
        model.tables[2, :5, 3] += 1000  # a massive activation of a few tokens
    result, whole = measure(model, WINDOWS.split(4), without=k), measure(model, WINDOWS)
    assert (result.without, result.windows, result.block) == (k, 6, 24)
    assert whole.explained[2] > 0.99 > 0.6 > result.explained[2]
    for layer, z in enumerate(model(WINDOWS)):
        x = z.detach().numpy()
        directions = np.linalg.svd(x.reshape(-1, 12), full_matrices=False)[2][:k]  # [k, F]
        rest = x - x @ directions.T @ directions
        assert result.mean[layer] == pytest.approx(pairs(rest, False).mean(), abs=1e-6)
        assert result.mean[layer] != pytest.approx(whole.mean[layer], abs=1e-3)


def test_more_directions_than_there_are_features_cannot_be_removed() -> None:
    with pytest.raises(UserError, match="without=12 directions leaves nothing of the model's 12: give fewer"):
        measure(lookup(), WINDOWS, without=12)


@settings(max_examples=7, deadline=None)
@given(st.integers(1, 7))
def test_the_batch_size_does_not_change_the_figures(rows: int) -> None:
    model = lookup()
    whole, parts = measure(model, [WINDOWS]), measure(model, WINDOWS.split(rows))
    assert whole.windows == parts.windows == 6
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(parts.entropy, whole.entropy, atol=1e-9)


@pytest.mark.slow
def test_windows_are_not_kept_in_memory() -> None:
    """The sums have the same size after every batch."""
    sizes = []

    def batches() -> Iterator[Tensor]:
        for batch in WINDOWS.repeat(4, 1).split(3):
            yield batch
            sums = [kept for kept in gc.get_objects() if type(kept) is LayerSums]
            sizes.append(sum(v.numel() for kept in sums for v in vars(kept).values() if isinstance(v, Tensor)))

    gc.collect()
    measure(lookup(), batches())
    assert len(sizes) == 8
    assert sizes[0] > 4 * 12 * 12
    assert len(set(sizes)) == 1


# --- over layers ---------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12, unique=True))
def test_trend_counts_concordant_pairs(values: list[int]) -> None:
    n = len(values)
    signs = [math.copysign(1, values[j] - values[i]) for i in range(n) for j in range(i + 1, n)]
    ranks = np.argsort(np.argsort(values))
    rho, tau = trend([value / 50 for value in values])
    assert tau == pytest.approx(sum(signs) / len(signs))
    assert rho == pytest.approx(1 - 6 * ((ranks - np.arange(n)) ** 2).sum() / (n * (n**2 - 1)))


def test_equal_layers_have_no_trend() -> None:
    assert all(math.isnan(value) for value in trend([0.5, 0.5, 0.5]))


def test_mean_of_last_averages_the_last_n_layers() -> None:
    result = measure(lookup(), WINDOWS)
    assert result.mean_of_last[0] == result.mean[-1]
    assert result.mean_of_last[2] == pytest.approx(result.mean[-3:].mean())
    assert len(result.mean_of_last) == 4


# --- models ----------------------------------------------------------------------------------


def test_hidden_states_of_our_model_are_those_of_forward() -> None:
    model = gpt().eval()
    for walked, forward in zip(hidden_states(model, WINDOWS), model(WINDOWS, return_hidden=True).hidden, strict=True):
        assert torch.equal(walked, forward)


def test_measuring_leaves_the_model_in_its_mode() -> None:
    model = gpt().train()
    first, second = (measure(model, WINDOWS).mean for _ in range(2))
    assert model.training
    assert (first == second).all(), "dropout is off while measuring"


@pytest.mark.parametrize("name", ["hidden", "hidden_states"])
def test_any_module_that_returns_hidden_states_can_be_measured(name: str) -> None:
    class Wrapped(nn.Module):
        def forward(self, idx: Tensor) -> SimpleNamespace:
            return SimpleNamespace(**{name: tuple(lookup()(idx))})

    assert (measure(Wrapped(), WINDOWS).mean == measure(lookup(), WINDOWS).mean).all()


def test_models_without_hidden_states_and_unequal_windows_are_rejected() -> None:
    with pytest.raises(TypeError, match="no hidden states"):
        measure(nn.Embedding(50, 4), WINDOWS)
    with pytest.raises(ValueError, match="no windows"):
        measure(lookup(), [])
    with pytest.raises(ValueError, match="a window of 5 tokens"):
        measure(lookup(), [WINDOWS, WINDOWS[:, :5]])


def test_transformers_models_are_measured_without_their_head() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=24, vocab_size=50)
    ).eval()
    with torch.no_grad():
        expected = model(WINDOWS, output_hidden_states=True).hidden_states
    assert measure(model, WINDOWS).mean == pytest.approx([mean_cosine(z).item() for z in expected], abs=1e-6)


def test_layer_means_agree_with_the_embedding_condensation_package() -> None:
    model = gpt().eval()

    class AsTransformers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = model

        def forward(self, input_ids: Tensor, output_hidden_states: bool) -> SimpleNamespace:
            return SimpleNamespace(hidden_states=self.gpt(input_ids, return_hidden=True).hidden)

    theirs = package_on(AsTransformers())
    if theirs is None:
        pytest.skip("needs `pip install embedding-condensation nltk`")
    assert measure(model, WINDOWS, include_diagonal=True).mean == pytest.approx(theirs(WINDOWS).numpy(), abs=1e-4)


def test_hidden_states_that_are_not_finite_are_reported_by_layer() -> None:
    model = lookup()
    with torch.no_grad():
        model.tables[2, WINDOWS[3, 4], 5] = math.nan
    with pytest.raises(UserError, match="layer 2 of the model gives NaN or infinite values"):
        measure(model, WINDOWS)
