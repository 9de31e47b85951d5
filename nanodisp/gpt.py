"""GPT-2, as published: learned positions, pre-LayerNorm, GELU in its tanh form, tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Modules carry
GPT-2's own names (wte, wpe, h, ln_1, c_attn, ...), so a released checkpoint maps name by name.

Three things differ from the plainest way to write it:

- The vocabulary is padded to a multiple of 64, which matrix units like, and the padding can
  not be predicted: its logits are -inf, so it gets neither probability nor gradient.
- Hidden states can be asked for whole, or for a few tokens of a few layers only. A plain
  gather of those would write a zero tensor as large as the layer in backward; `TakeTokens`
  adds their gradient to the one that passes by anyway.
- `generate` keeps keys and values, so a new token costs one token's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodisp.cross_entropy import linear_cross_entropy, linear_kl_divergence

VOCAB_MULTIPLE = 64
INIT_STD = 0.02


@dataclass
class GPTConfig:
    """The shape of a model.

    n_layer, n_head, n_embd: blocks, attention heads, width (a multiple of n_head).
    block_size: the longest context, in tokens.
    d_ff: width of the MLP's inner layer; null means 4 * n_embd.
    vocab_size: null takes the tokenizer's.
    bias: biases in linear layers and LayerNorms, as GPT-2 has them.
    dropout: probability, after embeddings, attention weights and residual branches.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    d_ff: int | None = None
    vocab_size: int | None = None
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("d_ff", "vocab_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1, or null")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must lie in [0, 1)")


class GPTOutput(NamedTuple):
    """What a forward pass gives; None where it was not asked for.

    logits: [B, T, V padded], only without targets (and with the head); the padding's are -inf.
    loss: scalar, mean cross-entropy in nats per token, only with targets.
    hidden: see `GPT.forward`.
    divergence: scalar, only with targets and soft targets.
    """

    logits: Tensor | None
    loss: Tensor | None
    hidden: tuple[Tensor, ...] | Tensor | None
    divergence: Tensor | None = None


class SoftTargets(NamedTuple):
    """A teacher's predictions, as what its head makes logits of.

    hidden: [B, T, C of the teacher], after its ln_f.
    head: [V padded, C of the teacher].
    temperature: what the logits of both are divided by.
    """

    hidden: Tensor
    head: Tensor
    temperature: float


class TakeTokens(torch.autograd.Function):
    """x [B, T, C], positions [N] -> x itself, x[:, positions] [B, N, C]."""

    @staticmethod
    def forward(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.index_select(1, positions)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_taken: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return grad_x.index_add(1, positions, grad_taken), None


class KVCache:
    """Keys and values of the tokens seen so far, for all layers: two [L, B, n_head, block_size, head_dim]."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens that every layer holds

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new [B, n_head, t, head_dim]; returns all of it so far."""
        end = self.length + key.size(2)
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, n_head, T, head_dim]
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()  # on CPUs the backward in bfloat16 is several times slower
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=k.size(2) == T)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, d_ff, bias=config.bias)
        self.c_proj = nn.Linear(d_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model. Its output head is the token embedding, transposed.

    Raises ValueError when `config.vocab_size` is not set.
    """

    never_predicted: Tensor  # [V padded], added to the logits

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: take the tokenizer's")
        self.config = config
        self.vocab_size = config.vocab_size
        padded = math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        never_predicted = torch.zeros(padded)
        never_predicted[self.vocab_size :] = -math.inf
        self.register_buffer("never_predicted", never_predicted, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), zero biases; branches into the residual stream by 1/sqrt(2L) less."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # a LayerNorm's weight
                nn.init.ones_(parameter)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        return_hidden: bool = False,
        take: tuple[Sequence[int], Tensor] | None = None,
        head: bool = True,
        soft_targets: SoftTargets | None = None,
        cache: KVCache | None = None,
    ) -> GPTOutput:
        """Predict the token after each of `idx`.

        Args:
            idx: int64 [B, T], T at most block_size (with `cache`: together with what it holds).
            targets: int64 [B, T], the next tokens (-100 to leave one out): gives `loss`, else `logits`.
            return_hidden: gives `hidden`, a tuple of n_layer + 1 tensors [B, T, C]: hidden[0] the
                embedding output, hidden[l] after block l, hidden[-1] after ln_f.
            take: (layers, positions), indices into those hidden states and int64
                [len(layers), N]: gives `hidden` as one tensor [len(layers), B, N, C], row i the
                tokens positions[i] of hidden[layers[i]]. Layers ascend.
            head: False leaves out the output head, and so logits and loss.
            soft_targets: beside `targets`: gives `divergence`, the mean KL divergence of the predictions from these.
            cache: keys and values of earlier tokens, extended by these; once it holds any, T is 1.

        Raises ValueError when the tokens do not fit, or when `take` names a layer that there is not.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        if start > 0 and T > 1:
            raise ValueError(f"a cache that holds tokens is extended by 1 at a time, not {T}")
        hidden: list[Tensor] = []
        layers, positions = take if take is not None else ((), idx)
        if not set(layers) <= set(range(self.config.n_layer + 1)):
            raise ValueError(f"take names layers {list(layers)}; there are hidden states 0 to {self.config.n_layer}")

        def visit(layer: int, x: Tensor) -> Tensor:
            """Note what was asked for of hidden[layer]; every hidden state passes through here."""
            if return_hidden:
                hidden.append(x)
            elif layer in layers:
                x, taken = TakeTokens.apply(x, positions[layers.index(layer)])
                hidden.append(taken)
            return x

        x = self.wte(idx) + self.wpe.weight[start : start + T]  # [B, T, C]
        x = visit(0, F.dropout(x, self.config.dropout, self.training))
        for layer, block in enumerate(self.h, start=1):
            x = block(x, cache)
            if layer < self.config.n_layer:
                x = visit(layer, x)
        x = visit(self.config.n_layer, self.ln_f(x))
        if cache is not None:
            cache.length += T

        collected = tuple(hidden) if return_hidden else torch.stack(hidden) if take is not None else None
        if not head:
            return GPTOutput(None, None, collected)
        if targets is None:
            logits = F.linear(x, self.wte.weight, self.never_predicted.to(x.dtype))  # [B, T, V padded]
            return GPTOutput(logits, None, collected)
        x, weight, bias = x.flatten(0, 1), self.wte.weight, self.never_predicted
        loss, divergence = linear_cross_entropy(x, weight, bias, targets.flatten()), None
        if soft_targets is not None:
            theirs = soft_targets.hidden.flatten(0, 1)
            divergence = linear_kl_divergence(x, weight, theirs, soft_targets.head, bias, soft_targets.temperature)
        return GPTOutput(None, loss, collected, divergence)

    def num_parameters(self) -> int:
        """Parameters, counted with the vocabulary as it is, not padded."""
        padding = self.wte.num_embeddings - self.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self) -> int:
        """Of a training step (forward and backward), at full context.

        6 per parameter that takes part in a matrix product, and 12 L C T for attention's two
        products, not halved for causality: PaLM, arXiv 2204.02311, appendix B.
        """
        c = self.config
        in_matmuls = self.num_parameters() - self.wpe.weight.numel()
        return 6 * in_matmuls + 12 * c.n_layer * c.n_embd * c.block_size


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue `idx` (int64 [B, T], T >= 1), yielding one int64 [B] after the other.

    Positions are learned, so a full context can not slide: when it is full, the last half
    of it is read anew and generation goes on from there.

    Args: temperature (0 is greedy), top_k (only the k likeliest tokens), top_p (only the
    likeliest that together reach this probability), generator on the model's device.
    """
    block_size = model.config.block_size
    context = idx[:, -block_size:]
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length == block_size:
            if cache is not None:
                context = context[:, -max(1, block_size // 2) :]
            cache = KVCache(model.config, idx.size(0), idx.device, model.wte.weight.dtype)
            logits = model(context, cache=cache).logits
        else:
            logits = model(context[:, -1:], cache=cache).logits
        token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
        yield token
        context = torch.cat([context, token[:, None]], dim=1)[:, -block_size:]


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw from logits [B, V]: int64 [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        likeliest, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = likeliest.cumsum(dim=-1) - likeliest >= top_p  # all that comes after top_p is reached
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
