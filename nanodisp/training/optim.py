"""Parameter groups, optimizers and the learning-rate schedule.

AdamW decays matrices only. Muon (Jordan et al. 2024, PyTorch's implementation) takes the matrices of the blocks and
leaves embeddings, biases and LayerNorms to AdamW. Under FSDP its matrix products run over all ranks, so that full
matrices are orthogonalised there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nanodisp.distributed.layout import is_shard, whole
from nanodisp.models.gpt import GPT

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class OptimConfig:
    """The optimizer and the learning-rate schedule.

    name: "adamw", or "muon" for the matrices of the blocks and AdamW for the rest.
    lr: AdamW's peak learning rate; null takes `lr_for_width`, or beside Muon 7 times that.
    muon_lr: Muon's, scaled to match AdamW's update size (`match_rms_adamw`); null takes `lr_for_width`.
    weight_decay: decoupled, on matrices only.
    beta1, beta2: of AdamW.
    muon_momentum: of Muon.
    schedule: after warm-up "cosine" or "linear" down to `min_lr_fraction` of the peak, or "constant".
    warmup_steps: the rate rises linearly over this many steps, at most a tenth of the run.
    warmup_fraction: or, overriding it, over this fraction of the run.
    decay_fraction: the rate decays over this last fraction of the run and stays at its peak until then: 1 is the usual
        cosine, "linear" with 0.2 is warm-up-stable-decay (WSD).
    min_lr_fraction: the rate at the end, as a fraction of the peak.
    grad_clip: maximum norm of the gradient; null never clips.
    """

    name: str = "adamw"
    lr: float | None = None
    muon_lr: float | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    schedule: str = "cosine"
    warmup_steps: int = 100
    warmup_fraction: float | None = None
    decay_fraction: float = 1.0
    min_lr_fraction: float = 0.1
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name={self.name} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule={self.schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        for name in ("lr", "muon_lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be a positive number")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("decay_fraction", "min_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1]")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"optim.warmup_fraction={self.warmup_fraction} must be in [0, 1); null for warmup_steps")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"optim.grad_clip={self.grad_clip} must be positive; null never clips")


def lr_for_width(n_embd: int) -> float:
    """A default peak learning rate, inversely proportional to the width: 3e-3 at 128, 1e-3 at 384, 5e-4 at 768.

    The proportionality is that of Adam on hidden matrices in "Tensor Programs V", arXiv 2203.03466; the constant was
    chosen on `nano`.
    """
    return 0.384 / n_embd


def with_rates(config: OptimConfig, n_embd: int) -> OptimConfig:
    """`config` with peak rates for this width where it leaves them open.

    Beside Muon, AdamW has embeddings, output head and norms alone, which learn best at a higher rate: the factor of 7
    was chosen on `modern`.
    """
    base = lr_for_width(n_embd)
    if config.name != "muon":
        return replace(config, lr=config.lr or base)
    return replace(config, lr=config.lr or 7 * base, muon_lr=config.muon_lr or base)


def build_optimizers(model: GPT, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together update all of `model`. Each group stores its peak rate as "peak_lr".

    Raises ValueError when a rate is not set.
    """
    use_muon = config.name == "muon"
    lr, muon_lr = config.lr, config.muon_lr if use_muon else 0.0
    if lr is None or muon_lr is None:
        raise ValueError("optim.lr or optim.muon_lr is not set: use with_rates")
    block_matrices, other_matrices, vectors = model.parameter_groups()
    decayed = other_matrices if use_muon else [*other_matrices, *block_matrices]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True)
    ]
    if use_muon:
        optimizers.append(
            torch.optim.Muon(
                block_matrices,
                lr=muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_scale(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate at `step` (from 0) of `total_steps`, as a fraction of its peak."""
    if config.warmup_fraction is not None:
        warmup_steps = round(config.warmup_fraction * total_steps)
    else:
        warmup_steps = min(config.warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    decay_start = max(warmup_steps, round(total_steps * (1 - config.decay_fraction)))
    if config.schedule == "constant" or step < decay_start:
        return 1.0
    progress = (step - decay_start) / max(1, total_steps - decay_start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * shape


def set_lr(optimizers: list[torch.optim.Optimizer], config: OptimConfig, step: int, total_steps: int) -> None:
    scale = lr_scale(config, step, total_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def clip_gradients(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    max_norm: float | None,
) -> Tensor:
    """Undo float16's loss scale, then scale all gradients so that their total norm is at most `max_norm`.

    None never scales. Returns the norm before clipping, a scalar on the device. If it is not finite the gradients are
    left unchanged, so that one can see where it came from.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0, posinf=1.0)
        torch._foreach_mul_(gradients, factor.where(norm.isfinite(), 1.0))
    return norm


def update(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, grad_norm: Tensor) -> Tensor:
    """One step of each optimizer, or none when the gradient's norm is not finite.

    On a GPU nothing waits to know it, but in float16. Fused optimizers check it on the device, through the attribute
    that PyTorch's scaler sets for them; the step of another one is taken back.

    Returns: whether the step was bad, bool scalar on the device. A float16 overflow is not bad: the scaler handles it.
    """
    bad = ~grad_norm.isfinite()
    for optimizer in optimizers:
        if optimizer.defaults.get("fused") and not scaler.is_enabled():
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bad.is_cuda and not scaler.is_enabled():
            step_unless(bad, optimizer)
        elif not bad:
            scaler.step(optimizer)
    if scaler.is_enabled() and scaler.get_scale() > 1:
        bad = torch.zeros_like(bad)
    scaler.update()
    return bad


@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where `bad`, a bool scalar, its weights and states are put back as they were."""

    def local() -> dict[tuple[int, str], Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = {(id(p), what): t for p in parameters for what, t in {"": p, **optimizer.state.get(p, {})}.items()}
        return {key: t.to_local() if is_shard(t) else t for key, t in found.items() if isinstance(t, Tensor)}

    before = {key: t.clone() for key, t in local().items()}
    optimizer.step()
    for key, t in local().items():
        t.copy_(torch.where(bad, before.get(key, torch.zeros_like(t)), t))  # a new state begins with zeros


@torch.no_grad()
def first_not_finite(model: GPT, idx: Tensor) -> str:
    """The origin of a NaN or an infinity: the first such hidden state of the model on int64 [B, T], or, if all are
    finite, the parameter nearest to the loss with such a gradient."""
    for layer, hidden in enumerate(model.hidden_states(idx)):
        if not hidden.isfinite().all():
            return f"hidden state {layer}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    local = {name: grad.to_local() if is_shard(grad) else grad for name, grad in gradients.items()}
    bad = [name for name, grad in local.items() if not grad.isfinite().all()]
    return f"the gradient of {bad[-1]}" if bad else "the loss"


# --- optimizer state by parameter name, for checkpoints ----------------------------------


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every optimizer's state as {"<parameter>/<what>": tensor}, independent of the groups' order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{what}": value if isinstance(value, Tensor) else torch.tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for what, value in state.items()
    }


def load_state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Load what `state_tensors` returned.

    Raises KeyError for a parameter that the optimizers do not have.
    """
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, what = key.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW counts its steps in a tensor beside the parameter, in float32 whatever the parameter's dtype
        dtype = parameter.dtype if value.dim() > 0 else value.dtype
        owner[id(parameter)].state[parameter][what] = value.to(parameter.device, dtype)
