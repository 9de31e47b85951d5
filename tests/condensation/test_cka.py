"""Linear CKA: against a naive computation, what it does not depend on, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanodisp.condensation import __main__ as condensation
from nanodisp.condensation import over_training
from nanodisp.condensation.cka import cka, cka_matrix
from nanodisp.errors import UserError
from nanodisp.runs import snapshots

RNG = np.random.default_rng(0)
X = RNG.standard_normal((30, 8)) + 3
Y = X[:, :5] ** 2 + 0.5 * RNG.standard_normal((30, 5))


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """The formula with features and loops, for float64."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)

    def squares(a: np.ndarray, b: np.ndarray) -> float:
        return sum(float(np.dot(a[:, i], b[:, j])) ** 2 for i in range(a.shape[1]) for j in range(b.shape[1]))

    return squares(x, y) / np.sqrt(squares(x, x) * squares(y, y))


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. (2012), equation 5: the unbiased estimator."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_it_is_the_formula() -> None:
    assert cka(X, Y) == pytest.approx(naive(X, Y), abs=1e-12)
    assert 0.1 < cka(X, Y) < 0.9
    debiased = hsic(X, Y) / np.sqrt(hsic(X, X) * hsic(Y, Y))
    assert cka(X, Y, debiased=True) == pytest.approx(debiased, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_a_state_is_like_itself_rotated_scaled_and_moved(debiased: bool) -> None:
    rotation, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    assert cka(X, X, debiased=debiased) == pytest.approx(1, abs=1e-12)
    assert cka(X, 7 * X @ rotation + 100, debiased=debiased) == pytest.approx(1, abs=1e-10)
    assert cka(X @ rotation, Y, debiased=debiased) == pytest.approx(cka(X, Y, debiased=debiased), abs=1e-12)
    assert cka(X, Y, debiased=debiased) == pytest.approx(cka(Y, X, debiased=debiased), abs=1e-12)
    assert cka(X @ RNG.standard_normal((8, 8)), Y) != pytest.approx(cka(X, Y), abs=1e-3), "not under any linear map"


def test_of_random_states_with_many_features_only_the_debiased_one_is_low() -> None:
    a, b = RNG.standard_normal((2, 50, 400))
    assert cka(a, b) > 0.8
    assert abs(cka(a, b, debiased=True)) < 0.1


def test_all_pairs_at_once() -> None:
    states = [X, Y, X[:, :3]]
    table = cka_matrix(states, [Y, X])
    assert table == pytest.approx(np.array([[cka(a, b) for b in (Y, X)] for a in states]), abs=1e-12)
    assert cka_matrix(states) == pytest.approx(cka_matrix(states, states), abs=1e-12)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the same tokens"):
        cka(X, Y[:20])
    with pytest.raises(ValueError, match="at least 4 tokens"):
        cka(X[:3], Y[:3])
    assert np.isnan(cka(np.ones((5, 3)), X[:5])), "all tokens are one"


def write_snapshots(folder: Path, states: dict[int, np.ndarray]) -> Path:
    for step, hidden in states.items():
        snapshots.write(folder / "snapshots", step, torch.arange(hidden.shape[1]), torch.from_numpy(hidden))
    return folder


def test_the_command_compares_layers_steps_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {step: RNG.standard_normal((3, 20, 6)) for step in (0, 10, 20)}
    states[20][1] = 2 * states[10][1]
    a = write_snapshots(tmp_path / "a", states)

    condensation.main(["cka", str(a)])
    arrays = np.load(a / "cka.npz")
    table = arrays["cka"]
    assert table.shape == (3, 3, 3, 3) and arrays["steps"].tolist() == [0, 10, 20]
    assert table[1, 1, 2, 1] == pytest.approx(1, abs=1e-4)
    assert table[0, 2, 2, 1] == pytest.approx(cka(states[0][2], states[20][1]), abs=1e-3), "of float16"
    assert table[2, 1, 0, 2] == table[0, 2, 2, 1]
    printed = capsys.readouterr().out
    assert "CKA with step 20, by layer" in printed
    assert [line.split()[2] for line in printed.splitlines()[2:5]] == [f"{table[s, 1, 2, 1]:.3f}" for s in range(3)]
    assert {path.name for path in (a / "figures").iterdir()} == {
        f"cka_{what}.{end}" for what in ("layers", "steps") for end in ("png", "svg")
    }


def test_two_runs_of_other_depths_are_compared_at_their_common_steps(tmp_path: Path) -> None:
    states = {step: RNG.standard_normal((3, 20, 6)) for step in (0, 10)}
    a = write_snapshots(tmp_path / "a", states)
    b = write_snapshots(tmp_path / "b", {10: np.concatenate([states[10], states[10][:1]]), 20: RNG.random((4, 20, 6))})
    condensation.main(["cka", str(a), str(b), f"out={tmp_path / 'c'}", "debiased=true"])
    table = np.load(tmp_path / "c" / "cka.npz")["cka"]
    assert table.shape == (1, 3, 1, 4)
    assert np.diagonal(table[0, :, 0, :3]) == pytest.approx(np.ones(3), abs=1e-4)
    assert table[0, 0, 0, 1] == pytest.approx(cka(states[10][0], states[10][1], debiased=True), abs=1e-3)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of one run, or of two"):
        condensation.main(["cka"])
    short = write_snapshots(tmp_path / "short", {0: RNG.standard_normal((2, 3, 4))})
    with pytest.raises(UserError, match="at least 4 tokens, this state has 3"):
        over_training.main([str(short)])
