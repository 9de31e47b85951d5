"""What the explorer shows: the tokens' places and cosines, for every run, step and layer.

A token is seen as its direction, a point on a sphere in F dimensions. The projection `cone` keeps what condensation is
about: the angle between a token and the direction that all tokens of the text have in common is exact. That direction,
their mean, is the pole, so tokens that have condensed into a cone are seen in a cone of the same opening, and tokens
with nothing in common are on the equator. (The cosine with the pole is on average the root of the mean cosine of all
pairs, a token with itself included.) A flat projection would not do: of 128 dimensions it keeps two, and tokens that
are spread out would all lie near its centre.

The two dimensions around the pole cannot be exact. They are, at each step, the plane across the pole in which the
tokens are nearest to where they are on average over all steps and runs (an orthogonal Procrustes problem, Schönemann
1966): what moves from step to step is what the model has changed, not the camera.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanodisp.condensation.figures import tsne, umap

NEIGHBOURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tsne": tsne, "umap": umap}
PROJECTIONS = ("cone", "pca", *NEIGHBOURS)


@dataclass(frozen=True)
class View:
    """One run.

    name: as the page shows it.
    places: float32 [S, L + 1, N, 2]. With `cone` the angle to the pole and the angle around it, in radians; else x and
        y, at most 1 from the centre.
    cosines: int8 [S, L + 1, N (N - 1) / 2], the pairs i < j row by row, in units of 1/127.
    means: float64 [S, L + 1], the mean cosine of these pairs.
    """

    name: str
    places: np.ndarray
    cosines: np.ndarray
    means: np.ndarray


@dataclass(frozen=True)
class Scene:
    """The runs at the same steps, of the same text.

    tokens: the text of each token. projection: one of `PROJECTIONS`.
    """

    steps: Sequence[int]
    tokens: Sequence[str]
    projection: str
    views: Sequence[View]


def build(names: Sequence[str], directions: Sequence[np.ndarray], projection: str) -> list[View]:
    """A view of each run from its hidden states as unit vectors, float32 [S, L + 1, N, F], S and N the same in all.

    A layer of a run is placed together with the layer of the same depth in the others.

    Raises UserError if the package of the projection is not installed.
    """
    depths = [each.shape[1] for each in directions]
    places = [np.empty((*each.shape[:3], 2), dtype=np.float32) for each in directions]
    reference: np.ndarray | None = None  # the layer before: the next is turned towards it
    for layer in range(max(depths)):
        own = [round(layer * (depth - 1) / max(1, max(depths) - 1)) for depth in depths]
        frames = [frame for each, mine in zip(directions, own, strict=True) for frame in each[:, mine]]
        drawn, reference = place(frames, projection, reference)
        for run, part in enumerate(np.split(drawn, len(directions))):
            places[run][:, own[run]] = part
    views = []
    for name, each, where in zip(names, directions, places, strict=True):
        cosines = pairs_of(each)
        views.append(View(name, where, np.rint(cosines * 127).astype(np.int8), cosines.mean(axis=-1, dtype=np.float64)))
    return views


def unit(z: np.ndarray) -> np.ndarray:
    """[…, F] -> float32 of length 1; zero stays zero."""
    z = z.astype(np.float32)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def pairs_of(u: np.ndarray) -> np.ndarray:
    """Cosines of the pairs i < j of unit vectors [S, L + 1, N, F], float32 [S, L + 1, N (N - 1) / 2]."""
    rows, columns = np.triu_indices(u.shape[2], 1)
    return np.stack([(each @ each.transpose(0, 2, 1))[:, rows, columns] for each in u]).clip(-1, 1)


def place(frames: Sequence[np.ndarray], projection: str, reference: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Place one layer's unit vectors, a list of [N, F]: float32 [len(frames), N, 2] as in `View`, and a reference.

    The reference turns the next layer, so that tokens keep their places from layer to layer as well.
    """
    if projection in NEIGHBOURS:
        return follow([NEIGHBOURS[projection](frame) for frame in frames], reference)
    if projection == "pca":
        target = turned(consensus(frames), reference)
        return np.stack([frame @ plane_towards(frame, target) for frame in frames]).astype(np.float32), target
    poles = [unit(frame.mean(axis=0)) for frame in frames]
    heights = [frame @ pole for frame, pole in zip(frames, poles, strict=True)]
    across = [frame - np.outer(height, pole) for frame, height, pole in zip(frames, heights, poles, strict=True)]
    target = turned(consensus(across), reference)
    drawn = []
    for height, rest in zip(heights, across, strict=True):
        x, y = (rest @ plane_towards(rest, target)).T
        drawn.append(np.stack([np.arccos(height.clip(-1, 1)), np.arctan2(y, x)], axis=1))
    return np.stack(drawn).astype(np.float32), target


def consensus(frames: Sequence[np.ndarray]) -> np.ndarray:
    """The places [N, 2] whose inner products are nearest to the frames' mean ones: where the tokens are on average."""
    gram = np.mean([frame.astype(np.float64) @ frame.T.astype(np.float64) for frame in frames], axis=0)
    values, vectors = np.linalg.eigh(gram)
    places = vectors[:, :-3:-1] * np.sqrt(values[:-3:-1].clip(min=0))
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def plane_towards(frame: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The plane in which a frame [N, F] is nearest to `target` [N, 2], as orthonormal columns [F, 2]."""
    left, _, right = np.linalg.svd(frame.T.astype(np.float64) @ target, full_matrices=False)
    return left @ right


def turned(places: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """Places [N, 2], turned or mirrored to be nearest to `reference`."""
    return places if reference is None else places @ plane_towards(places, reference)


def follow(frames: Sequence[np.ndarray], reference: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Places [N, 2] of a method without axes: each centred, turned towards the one before, all drawn to one scale."""
    drawn = []
    for frame in frames:
        reference = turned(frame - frame.mean(axis=0), reference)
        drawn.append(reference)
    largest = max(np.linalg.norm(each, axis=1).max() for each in drawn)
    return (np.stack(drawn) / max(largest, 1e-12)).astype(np.float32), drawn[0]
