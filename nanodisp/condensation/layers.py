"""The figures that training tracks for every layer, by name.

To add one, write a function of a hidden state, [B, N, F] -> float32 scalar, and register it in `LAYER_FIGURES`. It
must be cheap; it need not be differentiable. A figure of all windows together, not a mean over windows of their own,
goes into `POOLED_FIGURES`. Validation, metrics.jsonl, the terminal, W&B, TensorBoard and the report pick it up by its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanodisp.condensation.cosine import exact, mean_cosine
from nanodisp.condensation.isotropy import isoscore_star

LAYER_FIGURES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_cosine": mean_cosine,
    "cosine_without_first": lambda z: mean_cosine(z[:, 1:]),
    "isoscore_star": lambda z: isoscore_star(z).mean().float(),
}


class Pooled(NamedTuple):
    """A figure of all windows together.

    n_rows: K.
    rows: [B, N, F] -> float64 [B, K, F], whose mean over all windows is all that is kept of them.
    finish: that mean [..., K, F] and the number of windows -> the figure, [...].
    """

    n_rows: int
    rows: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]


def _directions(z: Tensor) -> Tensor:
    mean = nn.functional.normalize(exact(z), dim=-1).mean(dim=1, dtype=torch.float64)  # [B, F]
    return torch.stack([mean, mean.square()], dim=1)


def _cosine_across(rows: Tensor, n_windows: int) -> Tensor:
    """With u a window's mean direction, sum_{v != w} u_v . u_w = |sum_w u_w|^2 - sum_w |u_w|^2; NaN for one window."""
    mean, square = rows.unbind(dim=-2)
    difference = n_windows * mean.square().sum(dim=-1) - square.sum(dim=-1)
    return difference / (n_windows - 1) if n_windows > 1 else torch.full_like(difference, torch.nan)


def _powers(z: Tensor) -> Tensor:
    """Means of x, x^2, x^3, x^4, from those of y = x - s, s the window's mean: float32 is exact enough for y."""
    x = exact(z)
    s = x.mean(dim=1, keepdim=True)
    y = x - s
    square = y * y
    y1, y2, y3, y4 = (each.mean(dim=1).double() for each in (y, square, square * y, square * square))
    s = s.squeeze(1).double()
    first, second, third = s + y1, s**2 + 2 * s * y1 + y2, s**3 + 3 * s**2 * y1 + 3 * s * y2 + y3
    return torch.stack([first, second, third, s**4 + 4 * s**3 * y1 + 6 * s**2 * y2 + 4 * s * y3 + y4], dim=1)


def _kurtosis_by_dimension(rows: Tensor, n_windows: int) -> Tensor:
    return torch.nanmean(kurtosis(rows), dim=-1)


def kurtosis(moments: Tensor) -> Tensor:
    """Fourth central moment over squared variance, from the means of x, x^2, x^3, x^4: [..., 4, F] -> [..., F].

    3 for a Gaussian. NaN for a variance of 0.
    """
    m1, m2, m3, m4 = moments.unbind(dim=-2)
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / (m2 - m1**2) ** 2


POOLED_FIGURES: dict[str, Pooled] = {
    "cosine_across": Pooled(2, _directions, _cosine_across),
    "kurtosis_by_dimension": Pooled(4, _powers, _kurtosis_by_dimension),
}
NOT_ON_THE_TERMINAL = ("cosine_without_first", "isoscore_star", "cosine_across", "kurtosis_by_dimension")


def figures_of(hidden: Iterable[Tensor]) -> Tensor:
    """`LAYER_FIGURES` of every hidden state [B, N, F]: float32 [len(LAYER_FIGURES), L + 1]."""
    states = list(hidden)
    return torch.stack([torch.stack([figure(z) for z in states]) for figure in LAYER_FIGURES.values()])


def summed(hidden: Iterable[Tensor]) -> Tensor:
    """What `figures_from` needs, as means over these windows: float64, flat."""
    states = list(hidden)
    rows = [torch.cat([figure.rows(z).mean(dim=0) for figure in POOLED_FIGURES.values()]) for z in states]
    return torch.cat([figures_of(states).double().flatten(), torch.stack(rows).flatten()])


def figures_from(means: Tensor, n_states: int, n_windows: int) -> dict[str, list[float]]:
    """{"mean_cosine": [one for each of n_states hidden states], ...} from the mean of `summed` over all windows."""
    n_figures = len(LAYER_FIGURES) * n_states
    named = dict(zip(LAYER_FIGURES, means[:n_figures].view(-1, n_states), strict=True))
    n_rows = [figure.n_rows for figure in POOLED_FIGURES.values()]
    parts = means[n_figures:].view(n_states, sum(n_rows), -1).split(n_rows, dim=1)
    for (name, figure), rows in zip(POOLED_FIGURES.items(), parts, strict=True):
        named[name] = figure.finish(rows, n_windows)
    return {name: values.tolist() for name, values in named.items()}
