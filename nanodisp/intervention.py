"""What else may be done to training, so that the dispersion loss has something to be compared with.

Three interventions from the literature, each off by default, free to be combined with each other and with dispersion:

- noisy embeddings: uniform noise on the token embeddings while training (NEFTune; Jain et al., arXiv 2310.05914);
- active forgetting: every so many steps the token embeddings begin anew (Chen et al., arXiv 2307.01163);
- distillation: a teacher's predictions are targets too (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanodisp import distributed, hf
from nanodisp.errors import UserError
from nanodisp.gpt import GPT, INIT_STD, GPTConfig, SoftTargets


@dataclass
class InterventionConfig:
    """What is done to training beside dispersion; null leaves each out.

    noise_alpha: noisy embeddings: noise of [-1, 1] * noise_alpha / sqrt(T * C) for T tokens of width C.
    forget_interval: active forgetting: the token embeddings begin anew, in steps.
    teacher: distillation: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<folder or id>; its
        vocabulary is the run's, its context as long at least.
    distillation_alpha: share of distillation in the loss, which has 1 - distillation_alpha of cross-entropy; with a
        teacher null means 0.5.
    distillation_temperature: logits of both are divided by it; with a teacher null means 2.
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
            raise ValueError(
                f"intervention.distillation_alpha={self.distillation_alpha} must lie in (0, 1], or be null"
            )
        if self.teacher is not None:
            self.distillation_alpha = 0.5 if self.distillation_alpha is None else self.distillation_alpha
            self.distillation_temperature = self.distillation_temperature or 2.0
        for name in ("distillation_alpha", "distillation_temperature"):
            if self.teacher is None and getattr(self, name) is not None:
                raise ValueError(f"intervention.{name} needs a teacher: give intervention.teacher=<run or model>")

    def forgets_at(self, step: int) -> bool:
        """Whether embeddings begin anew after `step` updates, of which there are more to come."""
        return self.forget_interval is not None and step > 0 and step % self.forget_interval == 0

    def loss_weights(self) -> tuple[float, float]:
        """Of cross-entropy, and of the divergence from the teacher, whose gradient falls with 1 / temperature^2."""
        if self.distillation_alpha is None or self.distillation_temperature is None:
            return 1.0, 0.0
        return 1 - self.distillation_alpha, self.distillation_alpha * self.distillation_temperature**2


def add_noise(model: GPT, alpha: float) -> None:
    """Noisy embeddings, in training mode alone: uniform in [-1, 1] * alpha / sqrt(T * C), torch's own generator's."""

    def noisy(wte: nn.Module, _: Any, x: Tensor) -> Tensor:
        if not wte.training:
            return x
        n_tokens, n_features = x.shape[1:]
        return x + (2 * torch.rand_like(x) - 1) * (alpha / math.sqrt(n_tokens * n_features))

    model.wte.register_forward_hook(noisy)


@torch.no_grad()
def forget(model: GPT, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    """Token embeddings as at the beginning of a run, drawn from `seed`, and nothing left of their optimizer state.

    The output head is the token embedding, so it forgets too. All ranks call it.
    """
    weight = model.state_dict()["wte.weight"]  # it shards again what an evaluation has put together
    fresh = torch.empty(weight.shape)
    nn.init.normal_(fresh, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
    weight.copy_(distributed.scatter({"wte.weight": fresh}, model)["wte.weight"])
    for optimizer in optimizers:
        optimizer.state.pop(model.wte.weight, None)


def load_teacher(name: str, student: GPTConfig, tokenizer: str) -> GPT:
    """The teacher, frozen and in eval mode, on the CPU.

    Args:
        name: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<folder or id>.
        student, tokenizer: the run's.

    Raises UserError when there is no such source, or it can not teach this student.
    """
    source = hf.open_source(name)
    vocab_size, context = source.config.vocab_size, source.config.block_size
    if vocab_size != student.vocab_size:
        raise UserError(
            f"intervention.teacher={name} has a vocabulary of {vocab_size} tokens, the run {student.vocab_size}: "
            "choose a teacher of the run's tokenizer, or give the teacher's as data.tokenizer"
        )
    if context < student.block_size:
        raise UserError(
            f"intervention.teacher={name} has a context of {context} tokens: give model.block_size={context} or less"
        )
    hf.check_tokenizer(f"intervention.teacher={name}", source, tokenizer)
    return hf.build(source).eval().requires_grad_(False)


@torch.no_grad()
def soft_targets(teacher: GPT, x: Tensor, config: InterventionConfig) -> SoftTargets:
    """What the teacher makes of int64 [B, T], short of its logits."""
    assert config.distillation_temperature is not None
    last, everywhere = [teacher.config.n_layer], torch.arange(x.size(1), device=x.device)[None]
    hidden = teacher(x, take=(last, everywhere), head=False).hidden
    return SoftTargets(hidden[0], teacher.wte.weight, config.distillation_temperature)
