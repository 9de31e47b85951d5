"""Condensation: the mean cosine of all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.condensation import mean_cosine


@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 30), st.floats(-2, 5), st.integers(0, 999))
def test_mean_cosine_is_the_mean_over_all_pairs(b: int, n: int, f: int, shift: float, seed: int) -> None:
    z = torch.randn(b, n, f, generator=torch.Generator().manual_seed(seed)) + shift
    pairs = [
        torch.cosine_similarity(z[s, i], z[s, j], dim=0) for s in range(b) for i in range(n) for j in range(n) if i != j
    ]
    assert mean_cosine(z).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_the_extremes() -> None:
    same = torch.ones(2, 5, 8, dtype=torch.bfloat16)
    assert mean_cosine(same).item() == pytest.approx(1)
    assert mean_cosine(torch.eye(6)[None]).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine(torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]])).item() == pytest.approx(-1)
