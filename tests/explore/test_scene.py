"""Where the explorer places tokens: the cone's angles are exact, and only the model moves the points."""

from __future__ import annotations

import numpy as np
import pytest

from nanodisp.explore.scene import View, build, place, unit

RNG = np.random.default_rng(0)
S, N, F = 3, 20, 12


def states(condensed: float, layers: int = 2, features: int = F) -> np.ndarray:
    z = RNG.standard_normal((S, layers, N, features))
    return z + condensed * RNG.standard_normal((S, layers, 1, features))


def view_of(names: list[str], states: list[np.ndarray], projection: str) -> list[View]:
    return build(names, [unit(z) for z in states], projection)


def cosines(z: np.ndarray) -> np.ndarray:
    u = z / np.linalg.norm(z, axis=-1, keepdims=True)
    return u @ u.T


def test_the_angle_to_the_common_direction_is_exact() -> None:
    z = states(1.5)
    (view,) = view_of(["a"], [z], "cone")
    assert view.places.shape == (S, 2, N, 2)
    for step in range(S):
        u = z[step, 1] / np.linalg.norm(z[step, 1], axis=1, keepdims=True)
        mean = u.mean(axis=0)
        assert np.cos(view.places[step, 1, :, 0]) == pytest.approx(u @ mean / np.linalg.norm(mean), abs=1e-5)


def test_a_cone_is_seen_as_a_cone_and_tokens_with_nothing_in_common_on_the_equator() -> None:
    opening = np.deg2rad(25)
    around = RNG.standard_normal((N, F - 1))
    around -= around.mean(axis=0)  # so that the axis is the mean direction
    lengths = np.linalg.norm(around, axis=1, keepdims=True)
    cone = np.concatenate([lengths / np.tan(opening), around], axis=1)
    cone = cone / np.linalg.norm(cone, axis=1, keepdims=True)
    apart = np.concatenate([np.eye(N)[:10], -np.eye(N)[:10] + 1e-6 * RNG.standard_normal((10, N))])
    (condensed,) = view_of(["a"], [cone[None, None]], "cone")
    (spread,) = view_of(["b"], [apart[None, None]], "cone")
    assert np.rad2deg(condensed.places[0, 0, :, 0]).mean() == pytest.approx(25, abs=1.5)
    assert np.rad2deg(spread.places[0, 0, :, 0]).mean() == pytest.approx(90, abs=5)
    height = np.cos(condensed.places[0, 0, :, 0]).mean()
    assert height**2 == pytest.approx((1 + (N - 1) * condensed.means[0, 0]) / N, abs=1e-4), "as the page says"


def test_cosines_are_of_the_pairs_in_order() -> None:
    z = states(0.5)
    (view,) = view_of(["a"], [z], "cone")
    exact = cosines(z[2, 1])[np.triu_indices(N, 1)]
    assert view.cosines.dtype == np.int8
    assert view.cosines[2, 1] / 127 == pytest.approx(exact, abs=0.5 / 127 + 1e-6)
    assert view.means[2, 1] == pytest.approx(exact.mean(), abs=1e-6)


@pytest.mark.parametrize("projection", ["cone", "pca"])
def test_two_runs_that_begin_alike_begin_at_the_same_places(projection: str) -> None:
    a, b = states(1.0), states(1.0)
    b[0] = a[0]
    one, other = view_of(["a", "b"], [a, b], projection)
    assert np.array_equal(one.places[0], other.places[0])
    assert np.abs(one.places[2] - other.places[2]).max() > 0.1


@pytest.mark.parametrize("projection", ["cone", "pca"])
def test_a_rotation_of_the_features_moves_nothing(projection: str) -> None:
    """What is drawn depends on the angles between tokens alone, though the weights rotate from step to step."""
    z = states(1.0)
    rotation, _ = np.linalg.qr(RNG.standard_normal((F, F)))
    turned = z.copy()
    turned[1] = z[1] @ rotation
    (plain,), (other,) = view_of(["a"], [z], projection), view_of(["a"], [turned], projection)
    assert other.places[..., 0] == pytest.approx(plain.places[..., 0], abs=1e-4)
    assert np.cos(other.places[..., 1] - plain.places[..., 1]) == pytest.approx(np.ones((S, 2, N)), abs=1e-4)


def test_tokens_keep_their_places_while_nothing_changes_but_noise() -> None:
    z = np.repeat(states(1.0)[:1, :1], S, axis=0)
    z = z + 0.01 * RNG.standard_normal(z.shape)
    (view,) = view_of(["a"], [z], "cone")
    x = np.sin(view.places[..., 0]) * np.cos(view.places[..., 1])
    assert np.abs(x - x[0]).max() < 0.1


def test_layers_are_turned_towards_the_layer_before() -> None:
    z = states(1.0, layers=1)
    z = np.concatenate([z, z + 0.02 * RNG.standard_normal(z.shape)], axis=1)
    (view,) = view_of(["a"], [z], "cone")
    assert np.median(np.cos(view.places[:, 1, :, 1] - view.places[:, 0, :, 1])) > 0.9


def test_runs_of_other_depth_and_width_are_placed_together() -> None:
    deep, shallow = view_of(["a", "b"], [states(1.0, layers=5), states(1.0, layers=3, features=6)], "cone")
    assert deep.places.shape == (S, 5, N, 2) and shallow.places.shape == (S, 3, N, 2)
    assert np.isfinite(shallow.places).all() and np.abs(shallow.places).max() > 0


def test_a_plane_keeps_the_origin_so_that_condensed_tokens_are_off_centre() -> None:
    condensed, spread = view_of(["a", "b"], [states(4.0), states(0.0)], "pca")
    assert np.linalg.norm(condensed.places[0, 1].mean(axis=0)) > 3 * np.linalg.norm(spread.places[0, 1].mean(axis=0))
    assert np.linalg.norm(condensed.places, axis=-1).max() <= 1 + 1e-5


@pytest.mark.slow  # scikit-learn's import
def test_neighbour_embeddings_are_turned_towards_the_step_before() -> None:
    pytest.importorskip("sklearn")
    frames = [RNG.standard_normal((N, F)).astype(np.float32)] * 2
    drawn, _ = place(frames, "tsne", None)
    assert drawn[0] == pytest.approx(drawn[1], abs=1e-4)
    assert np.linalg.norm(drawn, axis=-1).max() == pytest.approx(1)
