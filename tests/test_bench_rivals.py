"""Losses compared at the same dispersion."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from bench.rivals import Point, curves, entries, loss_at, table
from nanodisp.errors import UserError
from nanodisp.runs.read import RunSummary


def run(variant: str, weight: float, loss: float, cosine: float, seed: int = 1, speed: float = 1000.0) -> RunSummary:
    config = {
        "dispersion.variant": variant,
        "dispersion.lambda_disp": weight,
        "seed": seed,
        "train.batch_size": 4,
        "model.block_size": 25,
    }
    numbers = {"loss": loss, "tokens_per_second": speed}
    layers = {"mean_cosine": [0.99, cosine - 0.1, cosine + 0.1]}
    return RunSummary(Path(f"{variant}{weight}-{seed}"), "finished", config=config, numbers=numbers, layers=layers)


RUNS = [
    run("angular", 0.0, 3.0, 0.8),
    run("angular", 0.1, 2.8, 0.39, seed=1),
    run("angular", 0.1, 3.0, 0.41, seed=2),
    run("cosreg", 0.1, 2.95, 0.6),
    run("cosreg", 0.3, 3.05, 0.2, speed=500.0),
    run("simctg", 0.1, 2.5, 0.7),
]


def test_the_loss_is_interpolated_between_the_neighbouring_weights() -> None:
    points = [Point(weight, loss, cosine, 1.0) for weight, loss, cosine in ((0, 3, 0.8), (1, 2, 0.6), (2, 4, 0.2))]
    assert loss_at(0.7, points) == pytest.approx(2.5)
    assert loss_at(0.3, points) == pytest.approx(3.5)
    assert loss_at(0.6, points) == pytest.approx(2)
    assert loss_at(0.1, points) is None
    assert loss_at(0.9, points) is None


def test_points_are_means_over_seeds_and_layers_after_the_embedding_and_share_weight_0() -> None:
    found = curves(entries(RUNS))
    assert list(found) == ["off", "angular", "cosreg", "simctg"]
    assert found["angular"][1] == pytest.approx((0.1, 2.9, 0.4, 100.0))
    assert [points[0] for points in found.values()] == [found["off"][0]] * 4
    assert found["cosreg"][2].milliseconds == pytest.approx(200)


def test_a_line_has_the_best_loss_and_that_at_the_cosine_of_angular() -> None:
    lines = table(entries([*RUNS, RunSummary(Path("broken"), "failed")]), 0.1)
    assert "loss at cosine 0.400" in lines[0]
    assert "| cosreg | 2.9500 | 0.1 | 0.600 | +0.1500 | 3.0000 | +0.2000 | 150 |" in lines
    assert any(
        line.startswith("| angular | 2.9000 | 0.1 | 0.400 | +0.0000 [+0.0000, +0.0000] | 2.9000 |") for line in lines
    )
    nothing = "\N{EN DASH}"
    assert f"| simctg | 2.5000 | 0.1 | 0.700 | -0.3000 | {nothing} | {nothing} | 100 |" in lines, "it never gets there"
    assert len(lines) == 6


def test_differences_are_paired_by_seed() -> None:
    more = [run("cosreg", 0.1, 3.07, 0.6, seed=2), run("cosreg", 0.3, 3.35, 0.2, seed=2)]
    more += [run("angular", 0.0, 3.1, 0.8, seed=2)]
    (line,) = (line for line in table(entries([*RUNS, *more]), 0.1) if line.startswith("| cosreg"))
    best = stats.ttest_rel([2.95, 3.07], [2.8, 3.0]).confidence_interval(0.95)
    same = stats.ttest_rel([3.0, 3.21], [2.8, 3.0]).confidence_interval(0.95)
    for gap, (low, high) in ((0.11, best), (0.205, same)):
        assert f"| {gap:+.4f} [{low:+.4f}, {high:+.4f}] |" in line


def test_without_angular_at_that_weight_nothing_can_be_compared() -> None:
    with pytest.raises(UserError, match=r"angular dispersion\.lambda_disp=0\.2.*--weight"):
        table(entries(RUNS), 0.2)
