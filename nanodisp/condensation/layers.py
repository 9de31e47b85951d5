"""The figures that training tracks for every layer, by name.

To add one, write a function of a hidden state, [B, N, F] -> float32 scalar, and register it in `LAYER_FIGURES`. It
must be cheap; it need not be differentiable. Validation, metrics.jsonl, the terminal, W&B, TensorBoard and the report
pick it up by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanodisp.condensation.cosine import mean_cosine

LAYER_FIGURES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_cosine": mean_cosine,
}


def figures_of(hidden: Iterable[Tensor]) -> Tensor:
    """Every figure of every hidden state [B, N, F]: float32 [len(LAYER_FIGURES), L + 1]."""
    states = list(hidden)
    return torch.stack([torch.stack([figure(z) for z in states]) for figure in LAYER_FIGURES.values()])
