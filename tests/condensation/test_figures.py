"""Figures: what they show, that lines are distinguishable, and that nothing is cut off."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nanodisp.condensation import figures
from nanodisp.errors import UserError

RNG = np.random.default_rng(0)
HISTOGRAM = np.full((7, 128), 0.5)
LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
VAL = (np.array([0, 500, 998]), np.array([3.0, np.nan, 1.0]))


SAMPLES: dict[str, Callable[[], Figure]] = {
    "density": lambda: figures.density({f"a run with quite a long name, number {i}": HISTOGRAM for i in range(5)}),
    "layers": lambda: figures.mean_by_layer({f"lambda {disp:g}": RNG.random((3, 7)) for disp in LAMBDAS}),
    "training": lambda: figures.over_training({f"{d:g}": (np.arange(4), RNG.random((4, 7))) for d in LAMBDAS}),
    "loss": lambda: figures.against_lambda({"1.3M": {disp: [1.0, 2.0] for disp in LAMBDAS}}, "validation loss"),
    "losses": lambda: figures.losses(
        {
            f"lambda_disp={disp:g} variant=orthogonalization": {"train": (np.arange(999), RNG.random(999)), "val": VAL}
            for disp in LAMBDAS
        }
    ),
    "tokens": lambda: figures.projection({f"layer {i}": RNG.random((30, 8)) for i in range(4)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SAMPLES))
def test_nothing_extends_beyond_the_edge(name: str, tmp_path: Path) -> None:
    figure = SAMPLES[name]()
    paths = figures.save(figure, tmp_path / "deep" / name)
    assert [path.suffix for path in paths] == [".png", ".svg"]
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.02
    assert box.x1 <= width + 0.02
    assert box.y1 <= height + 0.02


def test_the_same_figure_gives_the_same_file(tmp_path: Path) -> None:
    contents = [figures.save(figures.density({"a": HISTOGRAM}), tmp_path / name)[1].read_bytes() for name in "ab"]
    assert contents[0] == contents[1]


def test_figures_do_not_change_matplotlibs_settings(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures.save(figures.density({"a": HISTOGRAM}), tmp_path / "a")
    assert dict(matplotlib.rcParams) == before


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 6))
def test_lines_differ_in_gray_and_in_marker(n: int) -> None:
    ax = figures.mean_by_layer({str(i): RNG.random((1, 3)) for i in range(n)}).axes[0]
    lines = ax.get_lines()[:n]
    gray = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in lines]
    assert all(b - a > 0.05 for a, b in itertools.pairwise(gray)), gray
    assert gray[-1] < 0.75, "too light to be seen on white"
    assert len({line.get_marker() for line in lines}) == n


def test_a_density_has_layers_from_left_to_right_and_cosines_from_bottom_to_top() -> None:
    histogram = np.zeros((5, 128))
    histogram[1, 127] = 64  # the second layer's cosines are all near 1
    image = figures.density({"a": histogram}).axes[0].get_images()[0]
    left, right, bottom, top = image.get_extent()
    assert (bottom, top) == (-1, 1)
    column, row = np.argwhere(image.get_array().T == 64)[0]
    assert left + (column + 0.5) * (right - left) / 5 == pytest.approx(0.3)
    assert row == 127


def test_a_band_spans_one_standard_deviation_of_the_seeds() -> None:
    ax = figures.mean_by_layer({"a": np.array([[0.0, 1.0], [2.0, 1.0]]), "single": np.array([[0.0, 0.0]])}).axes[0]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1 - 2**0.5, 1 + 2**0.5))
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [1, 1])


def test_losses_have_a_panel_for_each_split_and_long_lines_are_averaged() -> None:
    training, validation = figures.losses({"a": {"train": (np.arange(1600), np.arange(1600) / 2), "val": VAL}}).axes
    (line,) = training.get_lines()
    assert line.get_xydata()[:2].tolist() == [[1.5, 0.75], [5.5, 2.75]]
    assert len(line.get_xydata()) == figures.POINTS
    np.testing.assert_array_equal(validation.get_lines()[0].get_xydata(), np.stack(VAL, axis=1))
    empty = (np.empty(0), np.empty(0))
    assert len(figures.losses({"a": {"train": empty, "val": VAL}}).axes[0].get_lines()[0].get_xdata()) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", ["W" * 200, "x" * 100])
def test_long_labels_leave_room_for_the_axes(label: str, tmp_path: Path) -> None:
    for figure in (
        figures.against_lambda({label: {0.0: [1.0]}}, "loss"),
        figures.mean_by_layer({label: np.ones((1, 3))}),
        figures.losses({label: {"train": VAL, "val": VAL}}),
    ):
        figures.save(figure, tmp_path / "figure")
        width = sum(ax.get_position().width for ax in figure.axes) * figure.get_figwidth()
        assert width > 2, "inches"


def test_lambdas_are_equally_spaced_and_a_size_may_lack_some() -> None:
    ax = figures.against_lambda({"small": {0.0: [3.0, 5.0], 1.0: [2.0]}, "large": {0.1: [1.0]}}, "loss").axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.1", "1"]
    data = [container.lines[0].get_xydata().tolist() for container in ax.containers]
    assert data == [[[0, 4], [2, 2]], [[1, 1]]]
    assert figures.standard_error([3.0, 5.0]) == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 20), st.integers(2, 10), st.integers(0, 99))
def test_pca_keeps_the_variance_of_the_first_two_directions(n: int, f: int, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(n, f))
    plane = figures.pca(z)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.T))[::-1]
    np.testing.assert_allclose(plane.var(axis=0, ddof=1), eigenvalues[:2], atol=1e-8)
    np.testing.assert_allclose(figures.pca(z + 5), plane, atol=1e-8)


def test_pca_of_fewer_than_two_dimensions() -> None:
    assert figures.pca(np.array([[1.0], [2.0]])).shape == (2, 2)
    assert (figures.pca(np.ones((4, 3))) == 0).all()


@pytest.mark.parametrize(("method", "module"), [("umap", "umap"), ("tsne", "sklearn.manifold")])
def test_a_missing_package_is_reported_by_name(method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install"):
        figures.projection({"a": RNG.random((9, 4))}, method)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        figures.save(figures.density({"a": HISTOGRAM}), tmp_path / "file" / "a")


@given(st.integers(1, 40), st.integers(1, 9))
def test_places_are_spread_from_the_first_to_the_last(n: int, most: int) -> None:
    places = figures.spread(n, most)
    assert places[0] == 0 and (most == 1 or places[-1] == n - 1)
    assert len(places) == min(n, most) and places == sorted(set(places))
    gaps = np.diff(places)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
