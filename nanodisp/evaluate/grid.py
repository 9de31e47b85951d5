"""Scores of every layer, pooling and transform; which of them are reported; as a table and as an entry of a file.

Without a part of the data that chooses, the figure of a transform is that of the last layer with mean pooling, and the
best one is exploratory: it was chosen on the examples that it is measured on. With such a part (`dev`), the layer and
pooling that are best there are the ones that are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodisp.evaluate.embeddings import POOLINGS
from nanodisp.evaluate.transforms import TRANSFORMS, fit
from nanodisp.files import finite

Scores = dict[str, tuple[float, float]]  # metric -> value, standard error over examples (NaN if unknown)
VERSION = 2  # of what the tasks compute: raised when figures change


@dataclass
class Grid:
    """Scores, the first metric being the main one; higher is better.

    transforms: those that could be fitted.
    values, errors: metric -> float64 [layers, poolings, transforms].
    """

    transforms: tuple[str, ...]
    values: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]

    @property
    def main(self) -> str:
        return next(iter(self.values))

    def last(self, transform: str) -> tuple[int, int]:
        """The last layer and mean pooling."""
        return self.values[self.main].shape[0] - 1, list(POOLINGS).index("mean")

    def best(self, transform: str) -> tuple[int, int]:
        """The layer and pooling with the highest main metric; of equal ones the first. NaN is lowest."""
        values = np.nan_to_num(self.values[self.main][:, :, self.transforms.index(transform)], nan=-np.inf)
        layer, pooling = np.unravel_index(values.argmax(), values.shape)
        return int(layer), int(pooling)

    def at(self, transform: str, where: tuple[int, int]) -> Scores:
        index = (*where, self.transforms.index(transform))
        return {name: (float(self.values[name][index]), float(self.errors[name][index])) for name in self.values}


def make_grid(sets: Sequence[Tensor], held_out: Tensor | None, score: Callable[..., Scores]) -> Grid:
    """Score `sets`, each [layers, poolings, n_texts, F], after every transform fitted on `held_out` of the same kind.

    score: the transformed sets of one layer and pooling, [n_texts, F] each, as arguments -> scores.
    """
    transforms = TRANSFORMS if held_out is not None else TRANSFORMS[:1]
    shape = (*sets[0].shape[:2], len(transforms))
    values: dict[str, np.ndarray] = {}
    errors: dict[str, np.ndarray] = {}
    for layer, pooling in np.ndindex(*shape[:2]):
        fitted = fit(None if held_out is None else held_out[layer, pooling], sets[0].size(-1))
        for column, name in enumerate(transforms):
            for metric, (value, error) in score(*(fitted[name](x[layer, pooling]) for x in sets)).items():
                values.setdefault(metric, np.full(shape, math.nan))[layer, pooling, column] = value
                errors.setdefault(metric, np.full(shape, math.nan))[layer, pooling, column] = error
    return Grid(transforms, values, errors)


def unit(x: Tensor) -> Tensor:
    """Rows of x [n, F] at length 1, so that a product is a cosine; a row of zeros stays."""
    return torch.nn.functional.normalize(x, dim=-1)


def entry(
    grid: Grid, dev: Grid | None, baselines: dict[str, Scores], *, examples: int, seed: int, notes: Sequence[str]
) -> dict[str, Any]:
    """The entry of a task in evaluation.json: docs/formats.md describes it.

    baselines: name -> scores, of methods without layers.
    """
    choose = (dev or grid).best if dev else grid.last
    chosen = {transform: choose(transform) for transform in grid.transforms}
    scores = {transform: grid.at(transform, where) for transform, where in chosen.items()} | baselines
    metrics = {
        f"{metric} {name}": {"value": finite(of[metric][0]), "stderr": finite(of[metric][1]), "higher_is_better": True}
        for metric in grid.values
        for name, of in scores.items()
    }
    return {
        "metrics": metrics,
        "shots": 0,
        "examples": examples,
        "version": VERSION,
        "seed": seed,
        "notes": list(notes),
        "chosen": {name: place(where) for name, where in chosen.items()} | {"by": "dev" if dev else "nothing"},
        "best": {name: place(grid.best(name)) for name in grid.transforms},
        "grid": {
            metric: {
                name: {
                    pooling: finite([round(value, 4) for value in values[:, p, t].tolist()])
                    for p, pooling in enumerate(POOLINGS)
                }
                for t, name in enumerate(grid.transforms)
            }
            for metric, values in grid.values.items()
        },
    }


def place(where: tuple[int, int]) -> dict[str, Any]:
    return {"layer": where[0], "pooling": list(POOLINGS)[where[1]]}


def table(grid: Grid, dev: Grid | None, baselines: dict[str, Scores]) -> str:
    """A line per transform: scores of the last layer with mean pooling, and of the best layer and pooling."""
    metrics, width = list(grid.values), 11 * len(grid.values)
    best = "best of dev" if dev else "best (exploratory)"
    show = lambda scores: "".join(f"{scores[metric][0]:11.4f}" for metric in metrics)  # noqa: E731
    heads = "".join(f"{metric:>11}" for metric in metrics)
    lines = [f"{'':12}{'last layer, mean':>{width}}  {best:>{width}}", f"{'':12}{heads}  {heads}  layer pooling"]
    for transform in grid.transforms:
        layer, pooling = where = (dev or grid).best(transform)
        last = show(grid.at(transform, grid.last(transform)))
        lines.append(f"{transform:12}{last}  {show(grid.at(transform, where))}  {layer:5} {list(POOLINGS)[pooling]}")
    lines += [f"{name:12}{show(scores)}" for name, scores in baselines.items()]
    return "\n".join(lines)
