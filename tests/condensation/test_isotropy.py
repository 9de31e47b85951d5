"""Measures of isotropy, against naive computations in float64 and where the answer is known."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from test_measure import WINDOWS, Lookup, lookup
from torch import Tensor

from nanodisp.condensation import isotropy
from nanodisp.condensation.layers import LAYER_FIGURES, POOLED_FIGURES, figures_from, summed
from nanodisp.condensation.measure import Condensation, measure, measure_states
from nanodisp.condensation.sums import strata_of
from nanodisp.dispersion.formulas import istar

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def mean_cosine_of(windows: np.ndarray) -> float:
    """Over the pairs of different tokens of each window, one after the other."""
    found = [cosine(a, b) for window in windows for a, b in itertools.permutations(window, 2)]
    return float(np.mean(found))


def steps_of_isoscore(covariance: np.ndarray) -> float:
    """Steps 3 to 7 of arXiv 2108.07344, algorithm 1, as they are written there."""
    n = len(covariance)
    variances = np.linalg.svd(covariance, compute_uv=False)
    normalised = math.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - np.ones(n)) / math.sqrt(2 * (n - math.sqrt(n)))
    fraction = (n - defect**2 * (n - math.sqrt(n))) ** 2 / n**2
    return (n * fraction - 1) / (n - 1)


def naive(z: np.ndarray, idx: np.ndarray, k: int) -> dict[str, float | np.ndarray]:
    """Every measure of one layer, [W, N, F], by its definition."""
    n_windows, n_features = len(z), z.shape[-1]
    x = z.reshape(-1, n_features)
    covariance = np.cov(x.T)
    eigenvalues = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    shrunk = []
    for window in z:
        own = np.cov(window.T)
        shrunk.append(steps_of_isoscore(0.8 * own + 0.2 * np.trace(own) / n_features * np.eye(n_features)))
    across = [cosine(a, b) for v, w in itertools.permutations(range(n_windows), 2) for a in z[v] for b in z[w]]
    smaller = np.delete(z, np.argsort(np.square(x).mean(axis=0))[-k:], axis=-1)

    ranks = np.arange(1, n_features + 1)
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues), 1, w=np.sqrt(1 / ranks))[0]
    return {
        "cosine_centred": mean_cosine_of(z - x.mean(axis=0)),
        "cosine_across": float(np.mean(across)),
        "cosine_without_first": mean_cosine_of(z[:, 1:]),
        "cosine_without_largest": mean_cosine_of(smaller),
        "cosine_by_frequency": by_frequency(z, idx),
        "centred_rank": math.exp(stats.entropy(np.linalg.svd(x - x.mean(axis=0), compute_uv=False))),
        "participation": eigenvalues.sum() ** 2 / np.square(eigenvalues).sum(),
        "isoscore": steps_of_isoscore(covariance),
        "isoscore_star": float(np.mean(shrunk)),
        "nesum": eigenvalues.sum() / eigenvalues[0],
        "spectrum_slope": -slope,
        "kurtosis_by_dimension": stats.kurtosis(x, axis=0, fisher=False),
    }


def by_frequency(z: np.ndarray, idx: np.ndarray) -> np.ndarray:
    counts = Counter(idx.flatten().tolist())
    total, before, stratum = idx.size, 0, {}
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        stratum[token] = min(3, int(4 * (before + count / 2) / total))
        before += count
    found: list[list[float]] = [[], [], [], []]
    for window, ids in zip(z, idx.tolist(), strict=True):
        for i, j in itertools.permutations(range(len(ids)), 2):
            if ids[i] != ids[j] and stratum[ids[i]] == stratum[ids[j]]:
                found[stratum[ids[i]]].append(cosine(window[i], window[j]))
    return np.array([np.mean(each) if each else math.nan for each in found])


SKEWED = (torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) ** 2 * 12).long()  # few tokens are frequent
MEASURES = tuple(naive(np.random.default_rng(0).normal(size=(2, 4, 3)), np.arange(8).reshape(2, 4), 1))


@pytest.fixture(scope="module")
def both() -> tuple[Condensation, list[dict[str, float | np.ndarray]]]:
    """What is measured, in batches of unequal size, and the naive figures of every layer."""
    model = lookup(3, 6)
    with torch.no_grad():
        model.tables[1, :, 2] += 4  # a dimension that makes cosines
        model.tables[2] += torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) ** 3
    states = [z.detach().numpy() for z in model(SKEWED)]
    return measure(model, SKEWED.split(3), without_largest=2), [naive(z, SKEWED.numpy(), 2) for z in states]


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_equals_its_naive_computation(
    name: str, both: tuple[Condensation, list[dict[str, float | np.ndarray]]]
) -> None:
    result, expected = both
    for layer, values in enumerate(expected):
        np.testing.assert_allclose(getattr(result, name)[layer], values[name], **CLOSE)


@pytest.mark.parametrize("name", MEASURES)
def test_states_that_are_there_are_measured_like_a_model(
    name: str, both: tuple[Condensation, list[dict[str, float | np.ndarray]]]
) -> None:
    model = lookup(3, 6)
    states = [z.detach() for z in model(SKEWED)]
    np.testing.assert_allclose(
        getattr(measure_states(states, SKEWED), name), getattr(measure(model, SKEWED), name), rtol=1e-9
    )
    if name == "cosine_by_frequency":
        assert np.isnan(measure_states(states).cosine_by_frequency).all(), "nobody knows the tokens"


def test_an_iterator_of_windows_is_read_only_once() -> None:
    def batches() -> Iterator[Tensor]:
        yield from WINDOWS.split(2)

    once, anew = measure(lookup(), batches(), without=1), measure(lookup(), WINDOWS, without=1)
    np.testing.assert_allclose(once.cosine_centred, anew.cosine_centred, atol=1e-12)
    np.testing.assert_allclose(once.cosine_by_frequency, anew.cosine_by_frequency, atol=1e-12)


# --- where the answer is known ---------------------------------------------------------------


def of_one(x: Tensor, without_largest: int = 1) -> dict[str, np.ndarray]:
    """The measures of one layer."""
    return {name: value[0] for name, value in vars(measure_states([x], without_largest=without_largest)).items()
            if isinstance(value, np.ndarray)}  # fmt: skip


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_an_isotropic_gaussian_uses_all_directions() -> None:
    found = of_one(gaussian(40, 100, 8))
    assert found["isoscore"] == pytest.approx(1, abs=0.01)
    assert found["isoscore_star"] > 0.9
    for name in ("participation", "nesum", "centred_rank", "effective_rank"):
        assert found[name] == pytest.approx(8, rel=0.1), name
    assert found["spectrum_slope"] == pytest.approx(0, abs=0.1)
    for name in ("cosine_centred", "cosine_across", "cosine_without_first", "cosine_without_largest"):
        assert found[name] == pytest.approx(0, abs=0.02), name
    np.testing.assert_allclose(found["kurtosis_by_dimension"], 3, atol=0.4)


def test_a_line_uses_one() -> None:
    found = of_one(gaussian(4, 50, 1) * gaussian(8) + gaussian(8))
    assert found["isoscore"] == pytest.approx(0, abs=1e-9)
    assert found["participation"] == pytest.approx(1)
    assert found["nesum"] == pytest.approx(1)
    assert found["centred_rank"] == pytest.approx(1)
    assert math.isnan(found["spectrum_slope"]), "one eigenvalue has no slope"


def test_a_common_vector_is_all_that_a_constant_and_noise_share() -> None:
    found = of_one(gaussian(20, 100, 16) + 10)
    assert found["mean"] > 0.98
    assert found["cosine_across"] > 0.98
    assert found["cosine_without_first"] > 0.98
    assert found["cosine_without_largest"] > 0.98, "all dimensions have a share in it"
    assert found["cosine_centred"] == pytest.approx(0, abs=0.005)
    assert found["isoscore"] > 0.98, "IsoScore does not see where the tokens are"
    np.testing.assert_allclose(found["kurtosis_by_dimension"], 3, atol=0.5)


def test_what_only_a_window_shares_is_seen_within_it_alone() -> None:
    found = of_one(gaussian(60, 1, 32) * 3 + gaussian(60, 30, 32))
    assert found["mean"] > 0.85
    assert found["cosine_centred"] > 0.85
    assert found["cosine_across"] == pytest.approx(0, abs=0.05)


def test_one_dimension_can_make_all_of_the_cosine() -> None:
    x = gaussian(10, 50, 16)
    x[..., 3] += 50
    assert of_one(x)["mean"] > 0.98
    assert of_one(x)["cosine_without_largest"] == pytest.approx(0, abs=0.02)
    assert of_one(-x)["cosine_without_largest"] == pytest.approx(0, abs=0.02)


def test_a_first_token_that_is_unlike_the_others_hides_their_cosine() -> None:
    x = gaussian(10, 5, 16) * 0.01 + 1
    x[:, 0] *= -1
    found = of_one(x)
    assert found["mean"] == pytest.approx((12 - 8) / 20, abs=1e-3)
    assert found["cosine_without_first"] == pytest.approx(1, abs=1e-3)


def test_an_outlier_dimension_has_a_kurtosis_of_its_own_even_far_from_zero() -> None:
    x = gaussian(10, 100, 4)
    x[..., 2] = 1000
    x[0, 0, 2] = 1010  # one of 1000
    x[..., 3] += 1e5
    found = of_one(x)["kurtosis_by_dimension"]
    assert found[2] == pytest.approx(998, rel=0.01)
    np.testing.assert_allclose(found, stats.kurtosis(x.numpy().reshape(-1, 4), axis=0, fisher=False), rtol=1e-6)
    x[..., 1] = 7
    assert math.isnan(of_one(x)["kurtosis_by_dimension"][1]), "a constant has no kurtosis"
    assert math.isfinite(measure_states([x]).column("kurtosis_by_dimension")[0]), "the mean is of the others"


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [10, 300, 900])
def test_the_slope_of_a_power_law_is_its_exponent(alpha: float, n: int) -> None:
    eigenvalues = np.arange(1, n + 1) ** -alpha
    assert isotropy.spectrum_slope(np.random.default_rng(0).permutation(eigenvalues)) == pytest.approx(alpha)
    eigenvalues[:10] *= 100 if n > 22 else 1  # a massive activation does not count
    eigenvalues[500:] = 1e-9
    assert isotropy.spectrum_slope(eigenvalues) == pytest.approx(alpha)


def test_isoscore_is_the_share_of_equal_directions() -> None:
    """Property 5 of arXiv 2108.07344: k of n directions with equal variance score (k - 1) / (n - 1)."""
    assert isotropy.isoscore(np.array([2.0] * 4 + [0.0] * 5)) == pytest.approx(3 / 8)
    assert math.isnan(isotropy.isoscore(np.zeros(3)))
    assert math.isnan(isotropy.isoscore(np.ones(1)))


def test_fewer_tokens_than_dimensions_leave_directions_without_variance() -> None:
    x = gaussian(1, 5, 20)
    found = of_one(x)
    covariance = np.cov(x[0].numpy().T)
    assert found["isoscore"] == pytest.approx(steps_of_isoscore(covariance), abs=1e-9)
    assert found["isoscore"] < 3 / 19
    assert math.isnan(found["cosine_across"]), "one window"


def test_isoscore_star_is_one_minus_the_loss_of_that_name() -> None:
    for shape in ((3, 30, 8), (3, 8, 30)):
        z = gaussian(*shape) * torch.arange(1, shape[2] + 1) + 2
        torch.testing.assert_close(isotropy.isoscore_star(z), 1 - istar(z, 1.0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(isotropy.isoscore_star(z.float()).double(), 1 - istar(z, 1.0), rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            low = isotropy.isoscore_star(z.float())
        torch.testing.assert_close(low.double(), 1 - istar(z, 1.0), rtol=5e-3, atol=1e-4)


def test_strata_are_quarters_of_the_text() -> None:
    counts = torch.tensor([5, 0, 50, 10, 25, 10])
    assert strata_of(counts).tolist() == [3, 3, 1, 3, 2, 3]
    even = strata_of(torch.ones(8, dtype=torch.int64))
    assert even.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_frequent_tokens_that_condense_are_seen_by_their_stratum() -> None:
    tables = gaussian(1, 50, 24)
    tables[:, :3] = tables[:, :3] * 0.1 + 3
    found = measure(Lookup(tables), SKEWED).cosine_by_frequency[0]
    assert found[1] > 0.95 > 0.5 > found[3]
    assert math.isnan(found[0]), "one token makes up a quarter of the text"


# --- during training -------------------------------------------------------------------------


def test_figures_of_training_are_those_of_the_command_however_windows_are_shared() -> None:
    model = lookup(3, 6)
    expected = measure(model, WINDOWS)
    parts = [(len(part), summed(model(part))) for part in WINDOWS.split(4)]
    means = sum(n * part for n, part in parts) / len(WINDOWS)
    assert isinstance(means, Tensor)
    found = figures_from(means.detach(), 3, len(WINDOWS))
    assert list(found) == [*LAYER_FIGURES, *POOLED_FIGURES]
    for name, values in found.items():
        np.testing.assert_allclose(values, expected.column(name.replace("mean_cosine", "mean")), err_msg=name, **CLOSE)


def test_training_needs_no_float64_states_for_the_kurtosis_of_a_dimension_far_from_zero() -> None:
    x = gaussian(8, 200, 3)
    x[..., 1] = x[..., 1] ** 3 + 300
    means = torch.cat([summed([x.float()[:2]])[None], summed([x.float()[2:]])[None]])
    found = figures_from((2 * means[0] + 6 * means[1]) / 8, 1, 8)["kurtosis_by_dimension"]
    expected = stats.kurtosis(x.numpy().reshape(-1, 3), axis=0, fisher=False).mean()
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_one_window_has_no_other() -> None:
    found = figures_from(summed(lookup(2, 6)(WINDOWS[:1])).detach(), 2, 1)
    assert all(math.isnan(value) for value in found["cosine_across"])
    assert all(math.isfinite(value) for value in found["isoscore_star"])
