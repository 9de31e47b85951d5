"""For the tests of `attach`: models in plain torch, and the gradients of the explicit sum to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import sample_positions, sample_slices

V, C, LAYERS = 17, 8, 3
LAMBDA = 0.7
RECOMPUTED = pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.norm(x))
        return x + self.out(torch.tanh(mixed + mixed.cumsum(dim=1)))


class Decoder(nn.Module):
    """Logits [B, T, V]; `recompute` is None or checkpoint's use_reentrant."""

    def __init__(self, recompute: bool | None = None, blocks: Any = nn.ModuleList) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        made = [Block() for _ in range(LAYERS)]
        self.layers = blocks(made) if blocks is not nn.ModuleDict else blocks({str(i): b for i, b in enumerate(made)})
        self.norm, self.head, self.recompute = nn.LayerNorm(C), nn.Linear(C, V), recompute

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, states: list[Tensor] | None = None) -> Tensor:
        x = self.embed(idx)
        passed = [x]
        for block in self.layers.children():
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
            passed.append(x)
        x = passed[-1] = self.norm(x)
        if states is not None:
            states.extend(passed)
        return self.head(x)


class WithLoss(nn.Module):
    """Returns its loss, as the models of transformers do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = Decoder(**settings)

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), idx), None


def cross_entropy(logits: Tensor, idx: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


def made(kind: Callable[..., Any] = Decoder, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**settings).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def tokens(n: int = 4, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def dispersions(
    model: Decoder, idx: Tensor, variant: str = "angular", n_tokens: int = 0, step: int = 1
) -> list[Tensor]:
    """That of each layer, of all tokens or of those that the pass with this number draws."""
    states: list[Tensor] = []
    model(idx, states=states)
    layers = range(1, LAYERS + 1)
    positions = sample_positions(0, step, layers, idx.size(1), n_tokens or None)
    slices = sample_slices(variant, 0, step, C)
    drawn = () if slices is None else (slices,)
    return [DispersionLoss(variant)(states[i][:, positions[i - 1]], *drawn) for i in layers]


def explicit(idx: Tensor, *, times: float = 1.0, model: Any = None, **settings: Any) -> list[Tensor]:
    """The gradients of times * (cross-entropy + lambda * dispersion), written down."""
    model = model or made()
    dispersion = torch.stack(dispersions(model, idx, **settings)).mean()
    (times * (cross_entropy(model(idx), idx) + LAMBDA * dispersion)).backward()
    return gradients(model)


def assert_equal(found: list[Tensor], right: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_differ(found: list[Tensor], other: list[Tensor]) -> None:
    assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, other, strict=True))


class WithMask(WithLoss):
    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), idx), None


def masked(model: Decoder, idx: Tensor, mask: Tensor, n_tokens: int, step: int = 1) -> Tensor:
    """The mean over layers and sequences, each without its padding, its tokens the first of the drawn order."""
    states: list[Tensor] = []
    model(idx, states=states)
    values = []
    for layer in range(1, LAYERS + 1):
        allowed = [row.nonzero()[:, 0].tolist() for row in mask]
        sizes = range(2, idx.size(1) + 1)
        order = next_tokens(step, layer, idx.size(1), sizes, n_tokens)
        of_layer = []
        for row, kept in enumerate(allowed):
            chosen = sorted([place for place in order if place in kept][:n_tokens])
            if len(chosen) > 1:
                of_layer.append(DispersionLoss()(states[layer][row : row + 1, chosen]))
        values.append(torch.stack(of_layer).mean())
    return torch.stack(values).mean()


def next_tokens(step: int, layer: int, n: int, sizes: range, n_tokens: int) -> list[int]:
    """The order in which tokens are drawn: what each further one of `sample_positions` adds."""
    if n_tokens >= n:
        return list(range(n))
    order: list[int] = []
    for size in range(1, n):
        drawn = sample_positions(0, step, [layer], n, size)[0].tolist()
        order += [place for place in drawn if place not in order]
    return order + [place for place in range(n) if place not in order]


class Wrapped(nn.Module):
    """As DDP is: its arguments have no names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class WithLabels(WithLoss):
    def forward(self, idx: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), labels), None


def plain(idx: Tensor) -> list[Tensor]:
    model = made()
    cross_entropy(model(idx), idx).backward()
    return gradients(model)
