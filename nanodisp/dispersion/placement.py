"""Where the loss is applied in training: which layers, which tokens, which weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formulas import CLAMP, SLICED, VARIANTS, draw_slices
from .loss import check_backend


@dataclass
class DispersionConfig:
    """The dispersion loss in training; `lambda_disp` = 0 turns it off.

    variant: which formula, a key of `VARIANTS`.
    lambda_disp: weight of the loss, added to cross-entropy.
    tau: temperature, for the formulas that have one.
    layers: "all" (every layer after the embedding), "last", "first_half", "last_half", or
        a list of indices into the model's hidden states (0 is the embedding output,
        n_layer the last layer; negative indices count from the end).
    max_tokens: tokens per sequence that the loss uses, drawn again for every layer and step,
        at the same positions in all sequences; null for all.
    schedule: `lambda_disp` over the run: "constant", "warmup" (linear from 0 over the first
        `warmup_fraction` of the steps, then constant) or "cosine" (decays to 0 at the end).
    warmup_fraction: length of the warm-up as a fraction of all steps.
    backend: "auto", "reference", "triton" or "cpu"; see `DispersionLoss`.
    clamp: margin of the cosines, between 0 and 1: the formulas of angles clamp them to [-1 + clamp, 1 - clamp] before
        arccos, and keep the slope of the edge outside.
    """

    variant: str = "angular"
    lambda_disp: float = 0.1
    tau: float = 1.0
    layers: Any = "all"
    max_tokens: int | None = 256
    schedule: str = "constant"
    warmup_fraction: float = 0.1
    backend: str = "auto"
    clamp: float = CLAMP

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"dispersion.variant={self.variant} is unknown; choose one of {', '.join(VARIANTS)}")
        if self.schedule == "linear":
            raise ValueError("dispersion.schedule=linear is now called dispersion.schedule=warmup")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"dispersion.schedule={self.schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.lambda_disp < math.inf:
            raise ValueError(f"dispersion.lambda_disp={self.lambda_disp} must be 0 (off) or a positive number")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"dispersion.tau={self.tau} must be a positive number")
        if not 0 < self.clamp < 1:
            raise ValueError(f"dispersion.clamp={self.clamp} must be between 0 and 1")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 2):
            raise ValueError(
                f"dispersion.max_tokens={self.max_tokens}: a pair needs 2 tokens; a whole number, or null for all"
            )
        if not 0 < self.warmup_fraction <= 1:
            raise ValueError(f"dispersion.warmup_fraction={self.warmup_fraction} must be in (0, 1]")
        check_backend(self.backend, self.variant, self.tau, self.clamp)


def select_layers(layers: str | Sequence[int], n_layer: int) -> list[int]:
    """Sorted indices into a model's n_layer + 1 hidden states (0 is the embedding output).

    Raises ValueError for an unknown name or an index out of range.
    """
    named = _named_layers(n_layer)
    if isinstance(layers, str) and layers in named:
        chosen = named[layers]
    elif isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"dispersion.layers={layers} is unknown; choose {', '.join(named)} or a list of indices")
    else:
        for layer in layers:
            if type(layer) is not int or not -n_layer - 1 <= layer <= n_layer:
                raise ValueError(f"dispersion.layers names {layer!r}; the model has hidden states 0 to {n_layer}")
        chosen = sorted({int(layer) % (n_layer + 1) for layer in layers})
    if not chosen:
        raise ValueError(f"dispersion.layers={layers} selects no layer of a model with n_layer={n_layer}")
    return chosen


def name_layers(layers: str | Sequence[int], n_layer: int) -> str | list[int]:
    """The one name of what `select_layers` selects: "all", "last", … if it is one of these, else the indices."""
    chosen = select_layers(layers, n_layer)
    return next((name for name, each in _named_layers(n_layer).items() if each == chosen), chosen)


def _named_layers(n_layer: int) -> dict[str, list[int]]:
    return {
        "all": [*range(1, n_layer + 1)],
        "last": [n_layer],
        "first_half": [*range(1, n_layer // 2 + 1)],
        "last_half": [*range(n_layer // 2 + 1, n_layer + 1)],
    }


def sample_positions(seed: int, step: int, layers: Sequence[int], n_tokens: int, max_tokens: int | None) -> Tensor:
    """Positions of the tokens that the loss uses: int64 [len(layers), min(n_tokens, max_tokens)] on the CPU.

    Each row is drawn without replacement by a generator seeded with (seed, step, layer) and sorted,
    so it does not depend on the other layers, the ranks or the micro-batches.
    """
    if max_tokens is None or max_tokens >= n_tokens:
        return torch.arange(n_tokens).repeat(len(layers), 1)
    rows = []
    for layer in layers:
        generator = _generator(np.random.SeedSequence((seed, step, layer)))
        rows.append(torch.randperm(n_tokens, generator=generator)[:max_tokens].sort().values)
    return torch.stack(rows)


def sample_unmasked(seed: int, step: int, layer: int, mask: Tensor, max_tokens: int | None) -> list[Tensor]:
    """Places of the tokens that the loss uses where some are padding: of each sequence at most `max_tokens`.

    Args:
        mask: [B, N] on the CPU, 0 for tokens to leave out.

    Returns:
        int64 [sequences, tokens] on the CPU, indices into the B * N tokens: sequences with equally many tokens
        together, and none with fewer than 2. A sequence without padding has the tokens of `sample_positions`.
    """
    n_tokens = mask.size(1)
    n_most = n_tokens if max_tokens is None else min(max_tokens, n_tokens)
    order = torch.arange(n_tokens)
    if n_most < n_tokens:
        generator = _generator(np.random.SeedSequence((seed, step, layer)))
        order = torch.randperm(n_tokens, generator=generator)
    by_length: dict[int, list[Tensor]] = {}
    for row, kept in enumerate(mask != 0):
        places = order[kept[order]][:n_most].sort().values + row * n_tokens
        by_length.setdefault(len(places), []).append(places)
    return [torch.stack(rows) for length, rows in sorted(by_length.items()) if length >= 2]


def sample_slices(variant: str, seed: int, step: int, n_features: int) -> Tensor | None:
    """Directions of sigreg for one step, the same for all layers, ranks and micro-batches: float32 [n_features, 64].

    They are drawn by a generator seeded with (seed, step), independent of that of the positions. None for the other
    variants.
    """
    if variant not in SLICED:
        return None
    sequence = np.random.SeedSequence((seed, step), spawn_key=(1,))
    return draw_slices(n_features, _generator(sequence))


def _generator(sequence: np.random.SeedSequence) -> torch.Generator:
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def _warmup(progress: float, warmup_fraction: float) -> float:
    return min(1.0, progress / warmup_fraction)


def _cosine_decay(progress: float, warmup_fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, warmup_fraction: 1.0,
    "warmup": _warmup,
    "cosine": _cosine_decay,
}


def lambda_at(config: DispersionConfig, step: int, total_steps: int) -> float:
    """The weight of the loss at `step` (from 0) of `total_steps`, following the config's schedule."""
    return config.lambda_disp * SCHEDULES[config.schedule](step / total_steps, config.warmup_fraction)
