"""What the transforms do to the texts that they were fitted on."""

from __future__ import annotations

import pytest
import torch

from nanodisp.evaluate.transforms import TRANSFORMS, fit


def skewed(n: int = 400, n_features: int = 120) -> torch.Tensor:
    """Texts in a narrow cone, with a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, n_features, generator=generator) * torch.linspace(5, 0.5, n_features)
    return x @ torch.linalg.qr(torch.randn(n_features, n_features, generator=generator)).Q + 3


def test_all_are_fitted_and_without_text_only_raw() -> None:
    x = skewed()
    assert tuple(fit(x, 120)) == TRANSFORMS
    assert list(fit(None, 120)) == ["raw"]
    assert torch.equal(fit(x, 120)["raw"](x), x)


@pytest.mark.parametrize("name", TRANSFORMS[1:])
def test_the_mean_is_removed(name: str) -> None:
    x = skewed()
    assert fit(x, 120)[name](x).mean(dim=0).abs().max() < 1e-4
    assert torch.equal(fit(x, 120)["centred"](x), x - x.double().mean(dim=0).float())


@pytest.mark.parametrize(("n_features", "removed"), [(8, 1), (120, 1), (260, 3)])
def test_the_first_directions_are_removed_and_nothing_else(n_features: int, removed: int) -> None:
    x = skewed(1000, n_features)
    before = torch.linalg.eigvalsh(torch.cov(x.double().T))
    after = torch.linalg.eigvalsh(torch.cov(fit(x, n_features)["top removed"](x).double().T))
    assert after[:removed].abs().max() < 1e-6 * before[-1]
    assert torch.allclose(after[removed:], before[:-removed], rtol=1e-4)


def test_whitening_makes_the_covariance_the_identity() -> None:
    x = skewed()
    covariance = torch.cov(fit(x, 120)["whitened"](x).T)
    assert torch.allclose(covariance, torch.eye(120), atol=1e-3)


def test_directions_without_variance_stay_without_it() -> None:
    """After a LayerNorm without bias, the features of every token add up to zero."""
    x = skewed(200, 30)
    x = x - x.mean(dim=1, keepdim=True)
    white = fit(x, 30)["whitened"](x)
    assert white.isfinite().all()
    variances = torch.linalg.eigvalsh(torch.cov(white.double().T))
    assert variances[0].abs() < 1e-3
    assert torch.allclose(variances[1:], torch.ones(29, dtype=torch.float64), atol=1e-3)
