"""The shape of a model, and the parts that it is built from.

`GPTConfig` names every choice, and its defaults are GPT-2. LLaMA and Qwen3 are other choices of the same parts:

| key | values |
| --- | --- |
| norm | LayerNorm (GPT-2), RMSNorm (LLaMA, Qwen3) |
| position | learned embeddings (GPT-2), rotations of queries and keys (LLaMA, Qwen3), none |
| mlp | GELU (GPT-2), SwiGLU (LLaMA, Qwen3), squared ReLU |
| qk_norm | RMSNorm of each head's queries and keys (Qwen3) |
| n_kv_head | heads of keys and values that several query heads share (LLaMA, Qwen3) |

Modules have GPT-2's own names (c_attn, c_proj, ln_1, ...) in every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodisp.models.cache import Past

HAS_AMX = torch.cpu._is_amx_tile_supported()
AMX_FROM = 512  # tokens: attention over shorter sequences is slower in bfloat16 than in float32 even with AMX


# Fields whose defaults are GPT-2's and that other families set.
SWITCHES = [
    "norm",
    "norm_eps",
    "position",
    "rope_theta",
    "mlp",
    "qk_norm",
    "n_kv_head",
    "head_dim",
    "tie_embeddings",
    "causal",
    "init_std",
]


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2's.

    n_layer, n_head, n_embd: blocks, attention heads, width.
    block_size: maximum context length in tokens.
    d_ff: width of the MLP's hidden layer; null means 4 * n_embd, or with mlp=swiglu (three matrices) 8/3 * n_embd
        to the nearest multiple of 16.
    vocab_size: null means the tokenizer's.
    bias: whether linear layers and LayerNorms have biases, as in GPT-2.
    dropout: probability, for embeddings, attention weights and residual branches.
    norm: "layernorm", or "rmsnorm" (without mean and bias).
    norm_eps: added to the variance in norms.
    position: "learned" (an embedding per position), "rotary" (rotates queries and keys), or "none".
    rope_theta: base of the rotary wavelengths, 2 pi to about 2 pi * rope_theta tokens.
    mlp: activation: "gelu" (tanh approximation), "swiglu" (gated) or "relu2" (squared ReLU).
    qk_norm: RMSNorm of each head's queries and keys before they are rotated, as in Qwen3.
    n_kv_head: heads of keys and values, a divisor of n_head (grouped-query attention); null means n_head.
    head_dim: width of a head; null means n_embd / n_head.
    tie_embeddings: whether the output head is the transposed token embedding.
    causal: whether a token attends to earlier tokens and itself only; false makes an encoder, which has one more token
        than the vocabulary, the mask.
    init_std: standard deviation of initial weights; projections into the residual stream have it / sqrt(2 n_layer).
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    d_ff: int | None = None
    vocab_size: int | None = None
    bias: bool = True
    dropout: float = 0.0
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_theta: float = 10000.0
    mlp: str = "gelu"
    qk_norm: bool = False
    n_kv_head: int | None = None
    head_dim: int | None = None
    tie_embeddings: bool = True
    causal: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("d_ff", "vocab_size", "n_kv_head", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1, or null")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)} must be positive")
        for name, choices in (("norm", NORMS), ("position", POSITIONS), ("mlp", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)} is unknown; choose one of {', '.join(choices)}")
        if self.head_dim is None and self.n_embd % self.n_head != 0:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}: change one, "
                "or give model.head_dim"
            )
        if self.n_head % self.kv_heads != 0:
            raise ValueError(f"model.n_head={self.n_head} is not divisible by model.n_kv_head={self.n_kv_head}")
        if self.position == "rotary" and self.head_width % 2 != 0:
            raise ValueError(f"model.position=rotary rotates pairs, but a head has {self.head_width} features")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")

    def shape(self) -> dict[str, Any]:
        """What decides the names, shapes and use of the weights, with nulls resolved: not dropout, not init_std."""
        resolved = {"d_ff": self.mlp_width, "n_kv_head": self.kv_heads, "head_dim": self.head_width}
        return {k: v for k, v in {**vars(self), **resolved}.items() if k not in ("dropout", "init_std")}

    @property
    def loss_name(self) -> str:
        """What its loss is called in records: losses of decoders and encoders cannot be compared."""
        return "loss" if self.causal else "masked_loss"

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return max(1, round(self.n_embd / 6)) * 16 if self.mlp == "swiglu" else 4 * self.n_embd


GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "qk_norm": False,
    "bias": True,
    "n_kv_head": None,
    "tie_embeddings": True,
    "causal": True,
}
LLAMA = {**GPT2, "norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False}
QWEN3 = {**LLAMA, "qk_norm": True, "n_kv_head": "fewer"}
ARCHITECTURES = {"GPT-2": GPT2, "Qwen3": QWEN3, "LLaMA": LLAMA}


def architecture(config: GPTConfig) -> str:
    """The nearest of `ARCHITECTURES`, and the switches that differ from it: "GPT-2", "Qwen3, norm=layernorm"."""
    ours = {key: getattr(config, key) for key in GPT2}
    ours["n_kv_head"] = "fewer" if config.kv_heads < config.n_head else None
    differing = {name: [key for key in GPT2 if ours[key] != family[key]] for name, family in ARCHITECTURES.items()}
    nearest = min(differing, key=lambda name: len(differing[name]))
    values = {**ours, "n_kv_head": config.kv_heads}
    return ", ".join([nearest, *(f"{key}={str(values[key]).lower()}" for key in differing[nearest])])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but as matrix times vector for a single bfloat16 row on a CPU, which is faster."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() == x.size(-1):
        y = weight @ x.flatten() if bias is None else torch.addmv(bias, weight, x.flatten())
        return y.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# --- norms ----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32: Zhang & Sennrich, arXiv 1910.07467."""

    def __init__(self, n_features: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_features)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


NORMS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config: RMSNorm(config.n_embd, config.norm_eps),
}


def build_norm(config: GPTConfig) -> nn.Module:
    """A norm of the residual stream, [..., n_embd] -> [..., n_embd]."""
    return NORMS[config.norm](config)


# --- positions ------------------------------------------------------------------------------

POSITIONS = ("learned", "rotary", "none")


def rotations(config: GPTConfig) -> Tensor:
    """cos and sin of the angle of every position and feature, float32 [2, block_size, head_dim].

    RoPE, arXiv 2104.09864. Feature i is paired with feature i + head_dim / 2, as in LLaMA's released weights; the angle
    of pair i at position t is t / rope_theta^(2i / head_dim).
    """
    frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_width, 2).float() / config.head_width)
    angle = torch.arange(config.block_size).float()[:, None] * frequency  # [T, head_dim / 2]
    angle = torch.cat([angle, angle], dim=1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs of features of x [B, heads, T, head_dim] by `rotation` [2, T, head_dim]."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


# --- attention and MLP ----------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention; with fewer heads of keys and values, each is shared by consecutive query heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout, self.causal, self.head_dim = config.dropout, config.causal, config.head_width
        self.heads = [config.n_head, config.kv_heads, config.kv_heads]  # of queries, keys, values
        self.c_attn = Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=config.bias)
        self.c_proj = Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, past: Past | None, rotation: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.heads, dim=2))  # [B, heads, T, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        dtype, mask = q.dtype, None
        if past is not None:
            q, mask = q.to(past.keys.dtype), past.mask
            k = past.keys.index_copy_(2, past.positions, k.to(q.dtype))
            v = past.values.index_copy_(2, past.positions, v.to(q.dtype))
        elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and not (HAS_AMX and T >= AMX_FROM):
            q, k, v = q.float(), k.float(), v.float()  # backward in bfloat16 is several times slower on a CPU
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.causal and mask is None,
                enable_gqa=k.size(1) != q.size(1),
            )
        y = y.transpose(1, 2).reshape(B, T, -1).to(dtype)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 d_ff], the gate's half first, -> [..., d_ff]: Shazeer, arXiv 2002.05202."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU: So et al., "Primer", arXiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {"gelu": gelu, "swiglu": swiglu, "relu2": relu2}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout, self.activation = config.dropout, ACTIVATIONS[config.mlp]
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = Linear(config.n_embd, gates * config.mlp_width, bias=config.bias)
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """One layer, with norms before attention and MLP: [B, T, C] -> [B, T, C].

    past: of the layer, with a key-value cache.
    rotation: [2, T, head_dim], see `rotations`; None without rotary positions.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = Attention(config)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None = None, rotation: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past, rotation)
        return x + self.mlp(self.ln_2(x))
