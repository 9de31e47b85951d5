"""GPT-2, as published: learned positions, pre-LayerNorm, tanh-approximated GELU, tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Modules have
GPT-2's own names (wte, wpe, h, ln_1, c_attn, ...), so a released checkpoint maps name by name.

Three things differ from the simplest implementation:

- The vocabulary is padded to a multiple of 64, which matrix units need for full speed. The padding
  is never predicted: its logits are -inf, so it gets neither probability nor gradient.
- A forward pass returns complete hidden states, or only a few tokens of a few layers. A plain
  gather of those would allocate a zero tensor as large as the layer in backward; `TakeTokens`
  adds their gradient to the one that flows through the layer anyway.
- With a key-value cache a new token costs one token's work (`cache.py`). Positions are tensors and
  shapes are few, so that one compiled block is used for every layer and every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodisp.models.cache import KVCache, Past
from nanodisp.models.head import linear_cross_entropy, linear_kl_divergence

VOCAB_MULTIPLE = 64
INIT_STD = 0.02
HAS_AMX = torch.cpu._is_amx_tile_supported()
AMX_FROM = 512  # tokens: attention over shorter sequences is slower in bfloat16 than in float32 even with AMX


@dataclass
class GPTConfig:
    """The shape of a model.

    n_layer, n_head, n_embd: blocks, attention heads, width (a multiple of n_head).
    block_size: maximum context length in tokens.
    d_ff: width of the MLP's hidden layer; null means 4 * n_embd.
    vocab_size: null means the tokenizer's.
    bias: whether linear layers and LayerNorms have biases, as in GPT-2.
    dropout: probability, for embeddings, attention weights and residual branches.
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
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")


class GPTOutput(NamedTuple):
    """The result of a forward pass; None for what was not requested.

    logits: [B, T, V padded], only without targets (and with the head), -inf for the padding. With a
        cache [B, 1, V padded], for the last token.
    loss: scalar, mean cross-entropy in nats per token, only with targets.
    hidden: see `GPT.forward`.
    divergence: scalar, only with targets and soft targets.
    """

    logits: Tensor | None
    loss: Tensor | None
    hidden: tuple[Tensor, ...] | Tensor | None
    divergence: Tensor | None = None


class SoftTargets(NamedTuple):
    """A teacher's predictions, as the input and the weight of its output head.

    hidden: [B, T, C of the teacher], after its ln_f.
    head: [V padded, C of the teacher].
    temperature: divides the logits of both teacher and student.
    """

    hidden: Tensor
    head: Tensor
    temperature: float


class ParameterGroups(NamedTuple):
    """A model's trained parameters, grouped for the optimizer.

    block_matrices: weight matrices of the blocks; with weight decay, and updated by Muon if it is used.
    other_matrices: embeddings; with weight decay.
    vectors: biases and norms; without weight decay.
    """

    block_matrices: list[nn.Parameter]
    other_matrices: list[nn.Parameter]
    vectors: list[nn.Parameter]


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but as matrix times vector for a single bfloat16 row on a CPU, which is faster."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() == x.size(-1):
        y = weight @ x.flatten() if bias is None else torch.addmv(bias, weight, x.flatten())
        return y.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, n_head, T, head_dim]
        dropout = self.dropout if self.training else 0.0
        dtype, mask = q.dtype, None
        if past is not None:
            q, mask = q.to(past.keys.dtype), past.mask
            k = past.keys.index_copy_(2, past.positions, k.to(q.dtype))
            v = past.values.index_copy_(2, past.positions, v.to(q.dtype))
        elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and not (HAS_AMX and T >= AMX_FROM):
            q, k, v = q.float(), k.float(), v.float()  # backward in bfloat16 is several times slower on a CPU
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C).to(dtype)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model. Its output head is the transposed token embedding.

    Raises ValueError if `config.vocab_size` is not set.
    """

    never_predicted: Tensor  # [V padded], added to the logits

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: use the tokenizer's")
        self.config = config
        self.vocab_size = config.vocab_size
        padded = math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        never_predicted = torch.zeros(padded)
        never_predicted[self.vocab_size :] = -math.inf
        self.register_buffer("never_predicted", never_predicted, persistent=False)
        self.one_token: Callable[..., Tensor] = Block.__call__
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), zero biases; projections into the residual stream times 1/sqrt(2L)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # a LayerNorm's weight
                nn.init.ones_(parameter)

    def compile_one_token(self) -> None:
        """Compile the blocks' forward pass for one new token with a cache.

        One block is compiled for all layers, once per span and batch size: compiling 12 layers as one graph takes
        twelve times as long. Longer inputs come in many lengths and stay eager.
        """
        self.one_token = torch.compile(Block.forward, dynamic=False)

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
            idx: int64 [B, T], T at most block_size (with `cache`: including the cached tokens).
            targets: int64 [B, T], the next tokens (-100 to ignore one): returns `loss`, else `logits`.
            return_hidden: returns `hidden`, a tuple of n_layer + 1 tensors [B, T, C]: hidden[0] the
                embedding output, hidden[l] after block l, hidden[-1] after ln_f.
            take: (layers, positions), indices into those hidden states in ascending order, and int64
                [len(layers), N]: returns `hidden` as one tensor [len(layers), B, N, C], row i the
                tokens positions[i] of hidden[layers[i]].
            head: False skips the output head: no logits, no loss.
            soft_targets: with `targets`: returns `divergence`, the mean KL divergence of the predictions from these.
            cache: keys and values of earlier tokens, extended in place, without gradients; `logits` are then those
                of the last token only.

        Raises ValueError if the tokens do not fit, or if `take` names a layer that does not exist.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        hidden: list[Tensor] = []
        layers, positions = take if take is not None else ((), idx)
        if not set(layers) <= set(range(self.config.n_layer + 1)):
            raise ValueError(f"take has layers {list(layers)}; the model has hidden states 0 to {self.config.n_layer}")

        def visit(layer: int, x: Tensor) -> Tensor:
            """Collect what was requested of hidden[layer]; every hidden state passes through here."""
            if return_hidden:
                hidden.append(x)
            elif layer in layers:
                x, taken = TakeTokens.apply(x, positions[layers.index(layer)])
                hidden.append(taken)
            return x

        x = self.wte(idx) + self.wpe.weight[start : start + T]  # [B, T, C]
        x = visit(0, F.dropout(x, self.config.dropout, self.training))
        call = self.one_token if cache is not None and T == 1 else Block.__call__
        pasts = cache.append(T) if cache is not None else [None] * self.config.n_layer
        for layer, (block, past) in enumerate(zip(self.h, pasts, strict=True), start=1):
            x = call(block, x, past)
            if layer < self.config.n_layer:
                x = visit(layer, x)
        x = visit(self.config.n_layer, self.ln_f(x))

        collected = tuple(hidden) if return_hidden else torch.stack(hidden) if take is not None else None
        if not head:
            return GPTOutput(None, None, collected)
        if targets is None:
            x = x[:, -1:] if cache is not None else x
            logits = linear(x, self.wte.weight, self.never_predicted.to(x.dtype))  # [B, T or 1, V padded]
            return GPTOutput(logits, None, collected)
        x, weight, bias = x.flatten(0, 1), self.wte.weight, self.never_predicted
        loss, divergence = linear_cross_entropy(x, weight, bias, targets.flatten()), None
        if soft_targets is not None:
            teacher_x = soft_targets.hidden.flatten(0, 1)
            divergence = linear_kl_divergence(x, weight, teacher_x, soft_targets.head, bias, soft_targets.temperature)
        return GPTOutput(None, loss, collected, divergence)

    def hidden_states(self, idx: Tensor) -> tuple[Tensor, ...]:
        """The n_layer + 1 hidden states [B, T, C] of int64 [B, T], embedding output first; see `forward`."""
        return self(idx, return_hidden=True, head=False).hidden

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` sequences, with the device and dtype of the weights."""
        c = self.config
        return KVCache(
            n_layer=c.n_layer,
            batch_size=batch_size,
            n_head=c.n_head,
            block_size=c.block_size,
            head_dim=c.n_embd // c.n_head,
            device=self.device,
            dtype=self.embedding.weight.dtype,
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, each [B, T, C] -> [B, T, C]: the unit of sharding and recomputation."""
        return self.h

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding; its transpose is the output head."""
        return self.wte

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def parameter_groups(self) -> ParameterGroups:
        """The trained parameters in groups for the optimizer, each in exactly one group."""
        in_blocks = {id(p) for p in self.h.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() >= 2]
        return ParameterGroups(
            block_matrices=[p for p in matrices if id(p) in in_blocks],
            other_matrices=[p for p in matrices if id(p) not in in_blocks],
            vectors=[p for p in trained if p.dim() < 2],
        )

    def num_parameters(self) -> int:
        """The number of parameters, without the vocabulary's padding."""
        padding = self.wte.num_embeddings - self.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self) -> int:
        """FLOPs per token of a training step (forward and backward) at full context.

        6 per parameter used in a matrix product, and 12 L C T for attention's two products,
        not halved for causality: PaLM, arXiv 2204.02311, appendix B.
        """
        c = self.config
        in_matmuls = self.num_parameters() - self.wpe.weight.numel()
        return 6 * in_matmuls + 12 * c.n_layer * c.n_embd * c.block_size
