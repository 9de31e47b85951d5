"""A scene as an animated GIF: one layer of every run over the steps, for a README or a talk."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from PIL import Image
from scipy.spatial import ConvexHull

from nanodisp.condensation.figures import STYLE, spread
from nanodisp.errors import UserError
from nanodisp.explore.scene import Scene
from nanodisp.files import write_whole

DPI, PANEL = 100, (3.6, 3.35)  # inches of one run
HEIGHT_OF_LINES = 1.15  # inches of the mean cosines over steps
BETWEEN = 2  # frames from one step to the next
MS, MS_AT_END = 90, 2600  # of a frame, of the last one
YAW, TILT = 0.5, 0.36  # of the camera, in radians, as the page begins
N_COLOURS = 64
LOOKS = (("#440154", "-"), ("#1f9e89", "--"))  # a line per run
SOFT = "0.45"


def write(path: Path, scene: Scene, layer: int) -> None:
    """Write the GIF of one layer of a scene with projection `cone`; raises UserError if the file cannot be written."""
    with matplotlib.rc_context(STYLE):
        pictures = list(frames(scene, layer))
    colours = palette_of(pictures[len(pictures) // 2])
    images = [in_colours(picture, colours) for picture in pictures]
    durations = [MS] * (len(images) - 1) + [MS_AT_END]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"animation={path} cannot be written: {error.strerror}") from error
    write_whole(path, file.getvalue())


def choose_layer(scene: Scene, layer: int | None) -> int:
    """The layer that is drawn: as given, else the last before the final norm.

    Raises UserError for one that the runs do not have, or for runs of different depth.
    """
    depth, *others = {view.means.shape[1] - 1 for view in scene.views}
    if others:
        depths = " and ".join(map(str, sorted((depth, *others))))
        raise UserError(f"animation= shows one layer of all runs, but these have {depths}: give runs of equal depth")
    if layer is not None and not 0 <= layer <= depth:
        raise UserError(f"layer={layer} does not exist: the runs have layers 0 to {depth}")
    return max(0, depth - 1) if layer is None else layer


def palette_of(picture: Image.Image) -> np.ndarray:
    """`N_COLOURS` colours of a picture, [n, 3], for all of them, which makes the file smaller; white stays white."""
    palette = picture.quantize(N_COLOURS, dither=Image.Dither.NONE).getpalette() or []
    return np.vstack([np.reshape(palette, (-1, 3))[: N_COLOURS - 1], [[255, 255, 255]]])


def in_colours(picture: Image.Image, colours: np.ndarray) -> Image.Image:
    """The picture in the nearest of these colours; Pillow's own search confuses those that are near each other."""
    pixels = np.asarray(picture).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    packed, where = np.unique(pixels, return_inverse=True)
    unpacked = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    nearest = ((unpacked[:, None] - colours) ** 2).sum(axis=-1).argmin(axis=1).astype(np.uint8)
    image = Image.fromarray(nearest[where.reshape(pixels.shape)])
    image.putpalette(colours.ravel().tolist())
    return image


def frames(scene: Scene, layer: int) -> Iterator[Image.Image]:
    """The pictures one after the other: every step, and `BETWEEN` - 1 on the way to the next."""
    n_runs, last = len(scene.views), len(scene.steps) - 1
    size = (PANEL[0] * n_runs, PANEL[1] + HEIGHT_OF_LINES)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    share = HEIGHT_OF_LINES / size[1]
    globes = [figure.add_axes((run / n_runs, share, 1 / n_runs, (PANEL[1] - 0.55) / size[1])) for run in range(n_runs)]
    below = figure.add_axes((0.09, 0.42 / size[1], 0.86, share - 0.5 / size[1]))
    for frame in range(BETWEEN * last + 1):
        time = frame / BETWEEN
        for run, (ax, view) in enumerate(zip(globes, scene.views, strict=True)):
            ax.clear()
            draw_globe(ax, moved(view.places[:, layer], time))
            mean = float(np.interp(time, range(last + 1), view.means[:, layer]))
            ax.set_title(f"{view.name}\nmean cosine {mean:.2f}", fontsize=11, color=LOOKS[run][0], fontweight="bold")
        draw_lines(below, scene, layer, time)
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def moved(places: np.ndarray, time: float) -> np.ndarray:
    """Points on the sphere [N, 3], pole first axis up, between the steps around `time`, from [S, N, 2] of `View`."""
    step = min(int(time), len(places) - 1)
    here, there = (on_sphere(places[s]) for s in (step, min(step + 1, len(places) - 1)))
    between = here + (there - here) * (time - step)
    return between / np.maximum(np.linalg.norm(between, axis=1, keepdims=True), 1e-9)


def on_sphere(places: np.ndarray) -> np.ndarray:
    """Angle to the pole and around it [N, 2] -> x, y (the pole's), z [N, 3]."""
    polar, around = places.T.astype(np.float64)
    return np.stack([np.sin(polar) * np.cos(around), np.cos(polar), np.sin(polar) * np.sin(around)], axis=1)


def seen(points: np.ndarray) -> np.ndarray:
    """Points [N, 3] as the camera sees them: right, up, towards the viewer."""
    x, y, z = points.T
    right, back = x * np.cos(YAW) - z * np.sin(YAW), x * np.sin(YAW) + z * np.cos(YAW)
    return np.stack([right, y * np.cos(TILT) - back * np.sin(TILT), y * np.sin(TILT) + back * np.cos(TILT)], axis=1)


def parallel(polar: float) -> np.ndarray:
    """A circle of latitude, seen: [73, 3]."""
    around = np.linspace(0, 2 * np.pi, 73)
    return seen(on_sphere(np.stack([np.full_like(around, polar), around], axis=1)))


def draw_globe(ax: Axes, points: np.ndarray) -> None:
    """The sphere with the tokens [N, 3], and the cone at their mean angle to the pole."""
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_xlim(-1.16, 1.16)
    ax.set_ylim(-1.04, 1.04)
    ax.add_patch(Circle((0, 0), 1, facecolor="0.965", edgecolor="0.8"))
    for degrees in (30, 60, 90):
        ring = parallel(np.deg2rad(degrees))
        front = np.where(ring[:, 2:] >= 0, ring[:, :2], np.nan)
        ax.plot(*front.T, color="0.8", linewidth=0.8)
        edge = ring[ring[:, 0].argmax()]
        ax.text(edge[0] + 0.02, edge[1] + 0.01, f"{degrees}°", fontsize=7, color=SOFT)
    rim = parallel(float(np.arccos(points[:, 1].mean().clip(-1, 1))))[:, :2]
    corners = np.vstack([rim, [[0, 0]]])
    ax.add_patch(Polygon(corners[ConvexHull(corners).vertices], facecolor="0.5", alpha=0.18, linewidth=0))
    ax.plot(*rim.T, color=SOFT, linewidth=1.2)
    drawn = seen(points)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.06, 0.92, len(points)))
    rays = np.stack([np.zeros((len(points), 2)), drawn[:, :2]], axis=1)
    ax.add_collection(LineCollection(list(rays), colors=colours, linewidths=0.6, alpha=0.22))
    order = drawn[:, 2].argsort()
    sizes = 10 + 9 * (drawn[:, 2] + 1)
    look: Any = {"c": colours[order], "s": sizes[order], "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
    ax.scatter(*drawn[order, :2].T, **look)


def draw_lines(ax: Axes, scene: Scene, layer: int, time: float) -> None:
    """Mean cosine of the layer at the steps so far, a line per run, steps at equal distances."""
    ax.clear()
    last = len(scene.steps) - 1
    until = np.append(np.arange(int(time) + 1), time)
    for run, view in enumerate(scene.views):
        colour, dashes = LOOKS[run]
        values = view.means[:, layer]
        ax.plot(range(last + 1), values, color=colour, linewidth=1, alpha=0.2)
        ax.plot(until, np.interp(until, range(last + 1), values), dashes, color=colour, linewidth=1.8)
        ax.plot(time, np.interp(time, range(last + 1), values), "o", color=colour, markersize=5)
    ax.set_xlim(-0.3, last + 0.3)
    ax.set_ylim(0, max(0.1, 1.1 * max(view.means[:, layer].max() for view in scene.views)))
    ax.set_xticks(*ticks(scene.steps))
    ax.tick_params(labelsize=8, length=2)
    ax.set_ylabel("mean cosine", fontsize=8)
    step = scene.steps[min(int(time), last)]
    ax.set_xlabel(f"step {step:,} of {scene.steps[-1]:,}, layer {layer}", fontsize=9)


def ticks(steps: Sequence[int]) -> tuple[list[int], list[str]]:
    """Places and labels of at most nine steps, evenly spread."""
    places = spread(len(steps), 9)
    return places, [f"{steps[i]:,}" for i in places]
