"""What the study says about causes, on runs whose answer is known; its figures from few and many records."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from bench.study import figures
from bench.study.mechanism import beginnings, compared, correlations, partial_correlation, rivals, time_in_cone
from bench.study.pairs import arms_of
from bench.study.report import blimp, loss


def record(name: str, loss: float, cosines: tuple[float, ...], weight: float, variant: str = "angular") -> Any:
    """A run of two layers; cosines: of the last layer over training; at the end both layers have the last of them."""
    end = [0.0, cosines[-1], cosines[-1]]
    return {
        **{"name": name, "design": name[: name.index("-")], "loss": loss},
        "config": {"dispersion": {"variant": variant, "lambda_disp": weight}},
        "condensation": [{"step": 10 * i, "mean_cosine": [*end[:2], each]} for i, each in enumerate(cosines)],
        "train": [{"step": 1, "loss": 9.0}],
        "val": [{"mean_cosine": end, "step": 40}],
    }


def ladder(size: str, base: float, slope: float) -> list[dict[str, Any]]:
    """Runs at four lambdas and five seeds whose loss is a line of the time that they spend in the cone."""
    runs = []
    for number, (weight, seed) in enumerate(itertools.product((0.0, 0.03, 0.1, 0.3), range(1, 6))):
        high = 0.55 + 0.02 * number
        run = record(f"a-{size}-lam{weight:g}-s{seed}", 0.0, (0.0, high, 0.3, 0.2), weight)
        runs.append(run | {"loss": base + slope * time_in_cone(run)})
    return runs


def test_the_time_in_the_cone_is_the_share_above_one_half() -> None:
    assert time_in_cone(record("a-77k-lam0-s1", 5, (0.0, 1.0, 0.0), 0)) == pytest.approx(0.5)
    assert time_in_cone(record("a-77k-lam0-s1", 5, (0.6, 0.6, 0.4, 0.0, 0.5), 0)) == pytest.approx(1.5 / 4)
    assert time_in_cone(record("a-77k-lam0-s1", 5, (0.0, 0.4, 0.0), 0)) == 0


def early_runs(size: str) -> list[dict[str, Any]]:
    """Pairs of three seeds: lambda 0.1 lowers the loss by about 0.2 after 250 steps, by about 0.1 after 500."""
    runs = []
    for weight, seed in itertools.product((0.0, 0.1), (1, 2, 3)):
        run = record(f"early-{size}-lam{weight:g}-s{seed}", 5.0, (0.0, 0.9 if weight else 1.0, 0.0, 0.0), weight)
        fallen = weight * (1 + 0.01 * (seed - 2))
        losses = {0: 8.0, 250: 6.0 + seed - 2 * fallen, 500: 5.0 + seed - fallen}
        end = run["val"][-1]["mean_cosine"]
        val = [{"step": step, "loss": loss, "mean_cosine": end} for step, loss in losses.items()]
        run["config"]["optim"] = {"warmup_fraction": 0.1}
        runs.append(run | {"val": val, "train": [{"step": 100, "loss": 7.0 - 4 * fallen}]})
    return runs


def test_the_start_of_training_is_told_by_its_cone_and_its_loss() -> None:
    lines = list(beginnings([*early_runs("312k"), *early_runs("77k")[:4]]))
    assert lines[4].startswith("| early-77k-lam0.1 | 50 | 1 | 1.000 | 0.900 |")
    assert lines[5].startswith("| early-312k-lam0.1 | 50 | 3 | 1.000 | 0.900 | 10 | 10 | 10 | 9 | -1.1 [-1.1, -1.1] |")
    assert "| -0.7 [-0.7, -0.7] | -0.4000 [-0.4099, -0.3901] |" in lines[5]
    assert lines[5].endswith("| -0.2000 [-0.2050, -0.1950] | -0.1000 [-0.1025, -0.0975] |")
    assert "Not known yet" in list(beginnings(ladder("77k", 5.4, 1.0)))[-1]


def test_a_partial_correlation_is_that_of_residuals_of_a_regression_on_the_groups() -> None:
    random = np.random.default_rng(0)
    groups = random.choice(["a", "b", "c"], 40)
    x, y = random.normal(size=40) + (groups == "b"), random.normal(size=40) + 5 * (groups == "c")
    y += x
    dummies = np.stack([groups == name for name in "abc"], axis=1).astype(float)
    residual = [v - dummies @ np.linalg.lstsq(dummies, v, rcond=None)[0] for v in (x, y)]
    assert partial_correlation(x, y, groups.tolist()) == pytest.approx(np.corrcoef(*residual)[0, 1])
    assert np.isnan(partial_correlation(np.ones(40), y, groups.tolist()))


def test_neither_sizes_nor_lambdas_make_a_correlation() -> None:
    runs = ladder("77k", 5.4, 1.0) + ladder("150k", 4.0, 1.0)
    shifted = [run | {"loss": run["loss"] + 3 * run["config"]["dispersion"]["lambda_disp"]} for run in runs]
    for each in (runs, shifted):
        (line,) = (line for line in correlations(each, "Loss", loss) if "above 0.5" in line)
        assert line.count("+1.00 [+1.00, +1.00]") == 3
    (line,) = (line for line in correlations(ladder("77k", 5.4, -1.0), "Loss", loss) if "above 0.5" in line)
    assert line.count("-1.00") == 9
    assert "Not known yet" in list(correlations(ladder("77k", 5.4, -1.0), "BLiMP", blimp))[1]


def test_losses_of_others_are_compared_with_the_same_seeds_of_angular() -> None:
    runs = ladder("77k", 5.4, 1.0)
    others = [
        record(f"rivals-77k-cosreg-{w}-s{s}", 5.3, (0.5, 0.1 * w), w, "cosreg") for w in (1, 3) for s in (1, 2, 9)
    ]
    assert {entry.seed for entry in compared([*runs, *others])} == {1, 2, 3}
    assert any(line.startswith("| cosreg | 5.3000 | 1 | 0.100 |") for line in rivals([*runs, *others]))
    assert "Not known yet" in "".join(rivals(runs))
    assert "Not known yet" in "".join(rivals(others)), "there is nothing to compare with"


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 20, 30])
def test_the_figures_can_be_drawn_from_any_number_of_runs(number: int) -> None:
    runs = [*ladder("77k", 5.4, 1.0), *early_runs("77k"), *early_runs("671k-warm38")[:4]][:number]
    for run in runs[::3] + runs[1::3]:  # not all are measured
        run["by_context"] = {"losses": [1.0, 2.0, 3.0], "shares": [0.1, 0.3, 0.6]}
        run["context_over_steps"] = [[500, 3.0, 3.0, 3.0], [1000, 1.0, 2.0, 3.0]]
    drawn = figures.draw(runs, arms_of(runs, loss), arms_of(runs, blimp), compared(runs))
    assert len(drawn) == 6
    assert "copying" not in figures.draw([], {}, {}, [])
    kept = [r for r in runs if "context_over_steps" in r and r["name"].startswith(("a-77k-lam0-", "a-77k-lam0.1-"))]
    assert len(drawn["copying"].axes[0].lines) == 3 * len(kept) > 0
    for figure in drawn.values():
        figure.draw_without_rendering()
