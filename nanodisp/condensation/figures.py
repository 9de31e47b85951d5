"""Figures of condensation and of the effect of dispersion, in one style.

Every function takes plain arrays and returns a matplotlib Figure; `save` writes it as PNG and SVG.
Colours run from dark to light in the order of the values (viridis), so that they are distinct
in grayscale and for colour-blind readers; each line also has a marker of its own.

In an SVG, whatever belongs to a label is a group with that label as its id: the report's filter hides by it.

pyplot's global state is not used, so figures can be made from any thread and program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from nanodisp.errors import UserError

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "savefig.dpi": 160,
    "svg.hashsalt": "nanodisp",  # makes the files reproducible
    "svg.fonttype": "none",  # text that can be searched and read aloud, in a fraction of the bytes
}
MARKERS = "osD^vP*Xh<>p"
COLUMNS = 3  # of panels, at most
VIEWS = 6  # models in a row of `two_views`, at most
PANEL = (2.7, 2.3)  # inches
COSINES, SIGNED = "viridis", Normalize(0, 1)  # of a mean cosine: one scale for all figures
DENSEST = 10.0  # density at the dark end of every heatmap, so that figures can be compared
LONGEST_TITLE = 34  # characters
POINTS = 400  # of a line over steps, at most
MOST_MARKERS = 24  # points of a line that each have a marker


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg` and create their folder; raises UserError if that fails."""
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for path in paths:
                figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"{stem} cannot be written: {error}") from error
    return paths


def density(histograms: Mapping[str, np.ndarray]) -> Figure:
    """Distribution of the cosine similarities by layer fraction: one panel per model or step.

    histograms: title -> density over [-1, 1], [L + 1, bins] (`Condensation.histogram`).
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(list(histograms), "layer fraction", "cosine similarity")
        norm = PowerNorm(0.5, 0, DENSEST)  # the root makes thin tails visible
        for ax, histogram in zip(axes, histograms.values(), strict=True):
            _heatmap(ax, histogram, norm)
        figure.colorbar(ScalarMappable(norm, "Greys"), ax=axes, label="density", extend="max", shrink=0.9)
    return figure


def mean_by_layer(runs: Mapping[str, np.ndarray]) -> Figure:
    """Mean cosine by layer fraction, a line per label, with a band of one standard deviation over seeds.

    runs: label -> [seeds, L + 1].
    """
    with matplotlib.rc_context(STYLE):
        figure, ax = _single("layer fraction", "mean cosine similarity")
        for index, (label, means) in enumerate(runs.items()):
            depth = np.linspace(0, 1, means.shape[1])
            look = _look(index, len(runs))
            ax.plot(depth, means.mean(axis=0), label=label, gid=label, **look)
            _band(ax, depth, means, look["color"], label)
        ax.axhline(0, color="0.6", linewidth=0.8)
        _legend(figure, ax)
    return figure


def measures(panels: Mapping[str, Mapping[str, np.ndarray]], logarithmic: Collection[str] = ()) -> Figure:
    """Measures by layer fraction, a panel per kind of measure; each panel has a scale and a legend of its own.

    panels: title -> label -> [L + 1] (`Condensation.panels`).
    logarithmic: titles of the panels with a logarithmic scale, if all of their values are positive.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(list(panels), "layer fraction", "", shared=False)
        figure.set_size_inches(*(1.25 * figure.get_size_inches()))
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for index, (label, values) in enumerate(lines.items()):
                ax.plot(np.linspace(0, 1, len(values)), values, label=label, **_look(index, len(lines)))
            if title in logarithmic and all(np.nanmin(values, initial=1) > 0 for values in lines.values()):
                ax.set_yscale("log")
            if len(lines) > 1:
                ax.legend(fontsize=6, loc="best")
    return figure


def two_views(histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Distribution of the cosines by layer fraction as arXiv 2602.00217 draws it, above every pair's.

    histograms: title -> two densities over [-1, 1], [L + 1, bins]: of the matrix of cosines averaged position by
    position over the texts, and of all cosines. Averaging narrows the bands, so each row has a scale of its own.
    """
    with matplotlib.rc_context(STYLE):
        n = len(histograms)
        strips = -(-n // VIEWS)
        columns = -(-n // strips)
        figure = Figure(figsize=(1.9 * columns + 1.2, 2 * PANEL[1] * strips + 0.4), layout="constrained")
        grid = figure.subplots(2 * strips, columns, squeeze=False, sharex=True, sharey=True)
        norms = [PowerNorm(0.5, 0, most) for most in (3 * DENSEST, DENSEST)]
        for index, (title, views) in enumerate(histograms.items()):
            strip, column = divmod(index, columns)
            for row, (histogram, norm) in enumerate(zip(views, norms, strict=True)):
                ax = grid[2 * strip + row, column]
                _heatmap(ax, histogram, norm)
                ax.set_title(_short(title, 20) if row == 0 else "")
                if column == 0:
                    ax.set_ylabel(("averaged over texts", "every pair")[row])
        for ax in grid.reshape(strips, 2, columns).transpose(0, 2, 1).reshape(-1, 2)[n:].flat:
            ax.remove()
        for row, norm in enumerate(norms):
            shades = ScalarMappable(norm, "Greys")
            figure.colorbar(shades, ax=list(grid[row]), label="density", extend="max", shrink=0.8)  # beside the first
        figure.supxlabel("layer fraction", fontsize=STYLE["font.size"])
        figure.supylabel("cosine similarity", fontsize=STYLE["font.size"])
    return figure


def over_training(runs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Mean cosine by layer and step as a heatmap: one panel per run, the embedding at the bottom.

    runs: title -> (steps [S], mean cosines [S, L + 1]). Steps may be at unequal distances.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(list(runs), "step", "layer fraction", shared=False)
        for (label, (steps, means)), ax in zip(runs.items(), axes, strict=True):
            ax.grid(False)
            ax.set_gid(label)
            borders = _edges(steps), np.linspace(0, 1, means.shape[1] + 1)
            ax.pcolormesh(*borders, means.T, cmap=COSINES, norm=SIGNED, rasterized=True)  # a picture: a small file
            ax.locator_params(axis="x", nbins=4, integer=True)
        figure.colorbar(
            ScalarMappable(SIGNED, COSINES), ax=axes, label="mean cosine similarity", extend="both", shrink=0.9
        )
    return figure


def _edges(steps: np.ndarray) -> np.ndarray:
    """The borders of the cells around steps [S]: half-way between neighbours, [S + 1]."""
    if len(steps) < 2:
        return np.array([0.0, 1.0]) + (steps[0] - 0.5 if len(steps) else 0)
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([steps[:1], between, steps[-1:]])


def losses(
    runs: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], quantity: str = "loss, nats per token"
) -> Figure:
    """Training and validation loss over steps: a panel each, a line per run.

    runs: label -> "train" and "val" -> (steps [S], losses [S]).
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(["training", "validation"], "step", quantity)
        figure.set_size_inches(2 * PANEL[0] + 1, 1.2 * PANEL[1])
        for ax, split in zip(axes, ("train", "val"), strict=True):
            for index, (label, curves) in enumerate(runs.items()):
                steps, values = (_thinned(each) for each in curves[split])
                look = _look(index, len(runs)) | ({"marker": "", "linewidth": 1} if len(steps) > MOST_MARKERS else {})
                ax.plot(steps, values, label=label, gid=label, **look)
            ax.locator_params(axis="x", nbins=4, integer=True)
        _legend(figure, axes[1], room=2 * PANEL[0])
    return figure


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most `POINTS` values, each the mean of its neighbours: a line of more is only a larger file."""
    return (
        np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))]) if len(values) else values
    )


def against_lambda(series: Mapping[str, Mapping[float, Sequence[float]]], quantity: str) -> Figure:
    """A quantity against lambda, a line per model size, with standard errors over seeds.

    series: size -> lambda -> the seeds' values. Lambdas are at equal distances, because a logarithmic
    axis has no place for 0.
    """
    lambdas = sorted({value for line in series.values() for value in line})
    with matplotlib.rc_context(STYLE):
        figure, ax = _single("lambda", quantity)
        for index, (label, line) in enumerate(series.items()):
            present = [value for value in lambdas if value in line]
            means = [np.mean(line[value]) for value in present]
            errors = [standard_error(line[value]) for value in present]
            places = [lambdas.index(value) for value in present]
            drawn = ax.errorbar(
                places, means, np.nan_to_num(errors), capsize=3, label=label, **_look(index, len(series))
            )
            for part in drawn.get_children():
                part.set_gid(label)
        ax.set_xticks(range(len(lambdas)), [f"{value:g}" for value in lambdas])
        _legend(figure, ax)
    return figure


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, s / sqrt(n); NaN for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def spread(n: int, most: int) -> list[int]:
    """At most `most` of range(n), first and last included, evenly spread."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def similarity(panels: Mapping[str, np.ndarray], what: str, runs: Sequence[str], places: Sequence[int]) -> Figure:
    """CKA of layers or steps with each other, 0 to 1: one panel per title, bright where they are alike.

    panels: title -> [A, B]. what: "layer" or "step". runs: the names of the rows' and the columns' run, "" for one run
    alone. places: the layer or step of each row, evenly spaced in the figure whatever their distance.
    """
    rows, columns = (f"{what}, {_short(run)}" if run else what for run in runs)
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(list(panels), columns, rows)
        for ax, matrix in zip(axes, panels.values(), strict=True):
            ax.grid(False)
            ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1, origin="lower", interpolation="nearest", aspect="auto")
            for n, set_ticks in zip(matrix.shape, (ax.set_yticks, ax.set_xticks), strict=True):
                chosen = spread(n, 5)
                set_ticks(chosen, [str(places[i]) for i in chosen])
        figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), ax=axes, label="CKA", shrink=0.9)
    return figure


def projection(tokens: Mapping[str, np.ndarray], method: str = "pca") -> Figure:
    """One sequence's tokens projected onto the plane, one panel per layer, coloured by position.

    tokens: title -> [N, F]. method: a key of `PROJECTIONS`; tsne needs scikit-learn, umap umap-learn.

    Raises UserError if the package of the method is not installed.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(list(tokens), f"{method} 1", f"{method} 2", shared=False)
        for ax, z in zip(axes, tokens.values(), strict=True):
            x, y = PROJECTIONS[method](np.asarray(z, dtype=np.float64)).T
            ax.scatter(x, y, c=np.arange(len(x)), s=6, cmap=_truncated(), linewidths=0)
            ax.set_xticks([])
            ax.set_yticks([])
        places = ScalarMappable(Normalize(0, max(len(z) for z in tokens.values()) - 1), _truncated())
        figure.colorbar(places, ax=axes, label="position", shrink=0.9)
    return figure


def pca(z: np.ndarray) -> np.ndarray:
    """Project onto the two directions of most variance, [N, F] -> [N, 2]; a direction's largest entry is positive."""
    centred = z - z.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((2, z.shape[1]))
    plane[: len(directions)] = directions[:2]
    largest = np.abs(plane).argmax(axis=1)[:, None]
    plane *= np.where(np.take_along_axis(plane, largest, axis=1) < 0, -1, 1)
    return centred @ plane.T


def tsne(z: np.ndarray) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("projection=tsne needs scikit-learn: pip install scikit-learn, or use pca") from error
    return TSNE(perplexity=min(30, (len(z) - 1) / 3), init="pca", random_state=0).fit_transform(z)


def umap(z: np.ndarray) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError("projection=umap needs umap-learn: pip install umap-learn, or use pca") from error
    return UMAP(n_jobs=1, n_neighbors=min(15, len(z) - 1), random_state=0).fit_transform(z)


PROJECTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pca": pca, "tsne": tsne, "umap": umap}


# --- shared by the figures -------------------------------------------------------------


def _single(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return figure, ax


def _panels(titles: Sequence[str], xlabel: str, ylabel: str, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per title, row by row."""
    columns = len(titles) if len(titles) <= COLUMNS else min(COLUMNS, math.ceil(math.sqrt(len(titles))))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(PANEL[0] * columns + 1, PANEL[1] * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flatten()
    for ax, title in zip(grid, titles, strict=False):
        ax.set_title(_short(title))
    for index, ax in enumerate(grid):
        if index >= len(titles):
            ax.remove()
        elif shared and index + columns >= len(titles):
            ax.xaxis.set_tick_params(labelbottom=True)  # the last panel of its column, in whatever row
    figure.supxlabel(xlabel, fontsize=STYLE["font.size"])
    figure.supylabel(ylabel, fontsize=STYLE["font.size"])
    return figure, list(grid[: len(titles)])


def _heatmap(ax: Axes, histogram: np.ndarray, norm: Normalize) -> None:
    """A density by layer, [L + 1, bins], over [0, 1] x [-1, 1]."""
    ax.grid(False)
    ax.set_xticks([0, 0.5, 1])
    ax.imshow(
        histogram.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, 1, -1, 1),  # all layers equally wide
        cmap="Greys",
        norm=norm,
    )


def _short(title: str, longest: int = LONGEST_TITLE) -> str:
    """Its end, if it is longer."""
    return title if len(title) <= longest else "…" + title[1 - longest :]


def _look(index: int, n: int) -> dict[str, Any]:
    """Colour, marker and dashes of line `index` of `n`."""
    colour = _truncated()(index / max(1, n - 1))
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linestyle": ("-", "--", ":")[index % 3]}


def _truncated() -> matplotlib.colors.Colormap:
    """viridis without its yellow end, which is too light for a line on white."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256))
    return matplotlib.colors.ListedColormap(colours)


def _band(ax: Axes, x: np.ndarray, values: np.ndarray, colour: object, label: str) -> None:
    """One standard deviation around the mean of [seeds, X]; nothing for a single seed."""
    if len(values) > 1:
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
        ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0, gid=label)


def _legend(figure: Figure, ax: Axes, room: float = PANEL[0]) -> None:
    """A legend beside the axes, where it hides no line; long labels widen the figure, so that axes have `room`."""
    handles, labels = ax.get_legend_handles_labels()
    columns, font = 1 + (len(labels) - 1) // 16, FontProperties(size=STYLE["legend.fontsize"])
    points = max(TextPath((0, 0), label, prop=font).get_extents().width for label in labels)
    figure.set_figwidth(max(figure.get_figwidth(), room + columns * (0.7 + points / 72)))
    legend = figure.legend(handles, labels, loc="outside right upper", ncols=columns)
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        for part in (handle, text):
            if part is not None:
                part.set_gid(text.get_text())
