"""Baselines for the dispersion loss: three interventions from the literature.

Each is off by default and can be combined with the others and with dispersion:

- noisy embeddings: uniform noise on the token embeddings in training (NEFTune; Jain et al., arXiv 2310.05914);
- active forgetting: the token embeddings are reset at regular intervals (Chen et al., arXiv 2307.01163);
- distillation: a teacher's predictions as additional targets (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanodisp.distributed import layout
from nanodisp.models.gpt import GPT, SoftTargets


@dataclass
class InterventionConfig:
    """The baselines; null turns one off.

    noise_alpha: noisy embeddings: uniform noise in [-1, 1] * noise_alpha / sqrt(T * C) for T tokens of width C.
    forget_interval: active forgetting: steps between resets of the token embeddings.
    teacher: distillation: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<folder or id>; it must
        have the run's vocabulary and at least its context.
    distillation_alpha: weight of distillation in the loss; cross-entropy has 1 - distillation_alpha. With a teacher,
        null means 0.5.
    distillation_temperature: divides both models' logits. With a teacher, null means 2.
    """

    noise_alpha: float | None = None
    forget_interval: int | None = None
    teacher: str | None = None
    distillation_alpha: float | None = None
    distillation_temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("noise_alpha", "distillation_temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"intervention.{name}={getattr(self, name)} must be a positive number, or null")
        if self.forget_interval is not None and self.forget_interval < 1:
            raise ValueError(f"intervention.forget_interval={self.forget_interval} must be at least 1, or null")
        if self.distillation_alpha is not None and not 0 < self.distillation_alpha <= 1:
            raise ValueError(f"intervention.distillation_alpha={self.distillation_alpha} must be in (0, 1], or null")
        if self.teacher is not None:
            self.distillation_alpha = 0.5 if self.distillation_alpha is None else self.distillation_alpha
            self.distillation_temperature = self.distillation_temperature or 2.0
        for name in ("distillation_alpha", "distillation_temperature"):
            if self.teacher is None and getattr(self, name) is not None:
                raise ValueError(f"intervention.{name} needs a teacher: give intervention.teacher=<run or model>")

    def forgets_at(self, step: int) -> bool:
        """Whether the embeddings are reset before update number `step` (from 0)."""
        return self.forget_interval is not None and step > 0 and step % self.forget_interval == 0

    def loss_weights(self) -> tuple[float, float]:
        """Weights of cross-entropy and of distillation, whose gradient is proportional to 1 / temperature^2."""
        if self.distillation_alpha is None or self.distillation_temperature is None:
            return 1.0, 0.0
        return 1 - self.distillation_alpha, self.distillation_alpha * self.distillation_temperature**2


def apply(model: GPT, config: InterventionConfig) -> None:
    """Change the model itself, once, before training."""
    if config.noise_alpha is not None:
        add_noise(model, config.noise_alpha)


def before_step(
    model: GPT, optimizers: list[torch.optim.Optimizer], config: InterventionConfig, step: int, seed: int
) -> None:
    """Act before update number `step` (from 0), with the step's `seed`. All ranks call it."""
    if config.forgets_at(step):
        forget(model, optimizers, seed)


def add_noise(model: GPT, alpha: float) -> None:
    """Noisy embeddings, in training mode only: uniform in [-1, 1] * alpha / sqrt(T * C), from the global generator."""

    def noisy(embedding: nn.Module, _: Any, x: Tensor) -> Tensor:
        if not embedding.training:
            return x
        n_tokens, n_features = x.shape[1:]
        return x + (2 * torch.rand_like(x) - 1) * (alpha / math.sqrt(n_tokens * n_features))

    model.embedding.register_forward_hook(noisy)


@torch.no_grad()
def forget(model: GPT, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    """Reinitialise the token embeddings from `seed` and drop their optimizer state.

    An output head that is tied to them is reset with them. All ranks call it.
    """
    state = model.state_dict()  # shards again what an evaluation has gathered
    name = next(name for name, parameter in model.named_parameters() if parameter is model.embedding.weight)
    fresh = torch.empty(state[name].shape)
    nn.init.normal_(fresh, std=model.config.init_std, generator=torch.Generator().manual_seed(seed))
    state[name].copy_(layout.scatter({name: fresh}, model)[name])
    for optimizer in optimizers:
        optimizer.state.pop(model.embedding.weight, None)


@torch.no_grad()
def soft_targets(teacher: GPT, x: Tensor, temperature: float) -> SoftTargets:
    """The teacher's predictions for int64 [B, T], as hidden states and head instead of logits."""
    last, everywhere = [teacher.config.n_layer], torch.arange(x.size(1), device=x.device)[None]
    hidden = teacher(x, take=(last, everywhere), head=False).hidden
    return SoftTargets(hidden[0], teacher.head_weight, temperature)
