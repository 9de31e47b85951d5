"""What a training step minimises: the terms of the loss by name, and their weights.

To add a term, compute it in `Terms.forward` under a new name and give that name a weight in `Objective.weights_at`.
Records, terminal, W&B, TensorBoard and the report pick it up by its name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanodisp.data.batches import count_masked
from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import (
    DispersionConfig,
    lambda_at,
    sample_positions,
    sample_slices,
    select_layers,
)
from nanodisp.distributed import World, hardware, layout
from nanodisp.models.gpt import GPT, SoftTargets
from nanodisp.training.compiled import keep_compiled
from nanodisp.training.interventions import InterventionConfig, soft_targets


class Terms(nn.Module):
    """The terms of a micro-batch as one module: what torch.compile, DDP and FSDP wrap."""

    def __init__(self, model: GPT, dispersion: DispersionLoss, layers: list[int]) -> None:
        super().__init__()
        self.model, self.dispersion, self.layers = model, dispersion, layers

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        positions: Tensor | None = None,
        taught: SoftTargets | None = None,
        slices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms, scalars by name.

        Args:
            x, y: int64 [B, T], tokens and their targets; an encoder's from `mask_tokens`.
            positions: int64 [len(layers), N], the tokens to disperse; None for no dispersion.
            taught: a teacher's predictions for x; None for no distillation.
            slices: float32 [C, any number], the directions of the dispersion formulas that project on random ones.
        """
        take = (self.layers, positions) if positions is not None else None
        out = self.model(x, y, n_targets=n_targets(self.model, x), take=take, soft_targets=taught)
        terms = {self.model.config.loss_name: out.loss}
        if positions is not None:
            hidden = out.hidden.flatten(0, 1)  # [layers, B, N, C] -> [layers * B, N, C]
            terms["dispersion"] = self.dispersion(hidden, slices)
        if taught is not None:
            terms["distillation"] = out.divergence
        return terms


def n_targets(model: GPT, x: Tensor) -> int | None:
    """Of each sequence of x [B, T], for `GPT.forward`: an encoder's masked tokens, None (all) of a decoder."""
    return None if model.config.causal else count_masked(x.size(1))


class Objective:
    """The weighted sum of the terms, whose weights follow the step.

    Args:
        model: the model in training.
        dispersion, intervention: sections of the configuration.
        seed: of the run; together with the step it decides which tokens are dispersed, and along which directions.
        total_steps: of the run, for lambda's schedule.
        teacher: for distillation, frozen. It stays outside `terms`, so that it is not trained, sharded or saved.

    terms: the module that computes them, as `place` left it.
    """

    def __init__(
        self,
        model: GPT,
        dispersion: DispersionConfig,
        intervention: InterventionConfig,
        *,
        seed: int,
        total_steps: int,
        teacher: GPT | None = None,
    ) -> None:
        layers = select_layers(dispersion.layers, model.config.n_layer)
        loss = DispersionLoss(dispersion.variant, dispersion.tau, dispersion.backend, dispersion.clamp)
        self.terms: nn.Module = Terms(model, loss, layers)
        self.model, self.teacher, self.layers = model, teacher, layers
        self.dispersion, self.intervention = dispersion, intervention
        self.seed, self.total_steps = seed, total_steps
        self.block_size, self.device = model.config.block_size, model.device
        self.weights: dict[str, float] = {}
        self.positions: Tensor | None = None
        self.slices: Tensor | None = None

    def place(self, world: World, *, parallel: str, compiled: bool, recomputed: bool) -> None:
        """Compile and distribute terms and model, see `layout.place`; a teacher is compiled too."""
        if compiled:
            keep_compiled()
        self.terms = layout.place(
            self.terms, self.model, world, parallel=parallel, compiled=compiled, recomputed=recomputed
        )
        if compiled and self.teacher is not None:
            self.teacher.compile(dynamic=False)

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of each term at `step` (from 0)."""
        cross_entropy, distillation = self.intervention.loss_weights()
        dispersion = lambda_at(self.dispersion, step, self.total_steps)
        name = self.model.config.loss_name
        return {name: cross_entropy, "dispersion": dispersion, "distillation": distillation}

    def begin(self, step: int) -> None:
        """Set the weights of a step and draw what its dispersion needs, the same for all micro-batches and ranks."""
        self.weights, self.positions, self.slices = self.weights_at(step), None, None
        if self.dispersion.lambda_disp > 0:
            drawn = sample_positions(self.seed, step, self.layers, self.block_size, self.dispersion.max_tokens)
            self.positions = hardware.send(drawn, self.device)
            slices = sample_slices(self.dispersion.variant, self.seed, step, self.model.config.n_embd)
            self.slices = None if slices is None else hardware.send(slices, self.device)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, int64 [B, T] each, and its terms by name."""
        taught = None
        if self.teacher is not None:
            assert self.intervention.distillation_temperature is not None
            taught = soft_targets(self.teacher, x, self.intervention.distillation_temperature)
        terms = self.terms(x, y, self.positions, taught, self.slices)
        loss = sum(self.weights[name] * term for name, term in terms.items())
        assert isinstance(loss, Tensor)
        return loss, terms


def add_up(sums: dict[str, Tensor], terms: dict[str, Tensor], n: int) -> None:
    """Add 1 / n of each term to `sums`, detached: the mean over n micro-batches."""
    for name, term in terms.items():
        sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / n
