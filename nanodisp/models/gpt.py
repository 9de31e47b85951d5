"""One decoder with switches: GPT-2 by default, LLaMA, Qwen3 or a bidirectional encoder by other values of its config.

`blocks.py` has the config and the parts. GPT-2 is the model of Radford et al., "Language Models are Unsupervised
Multitask Learners" (2019), whose modules have their own names here (wte, wpe, h, ln_1, c_attn, ...), so a released
checkpoint maps name by name.

Three things differ from the simplest implementation:

- The vocabulary is padded to a multiple of 64, which matrix units need for full speed. The padding
  is never predicted: its logits are -inf, so it gets neither probability nor gradient. Its first row
  is an encoder's mask, the token `vocab_size`.
- A forward pass returns complete hidden states, or only a few tokens of a few layers. A plain
  gather of those would allocate a zero tensor as large as the layer in backward; `TakeTokens`
  adds their gradient to the one that flows through the layer anyway.
- With a key-value cache a new token costs one token's work (`cache.py`). Positions are tensors and
  shapes are few, so that one compiled block is used for every layer and every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodisp.models.blocks import Block, GPTConfig, Linear, build_norm, linear, rotations
from nanodisp.models.cache import KVCache
from nanodisp.models.head import IGNORED, linear_cross_entropy, linear_kl_divergence

VOCAB_MULTIPLE = 64


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
    other_matrices: embeddings and output head; with weight decay.
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


def take_along(x: Tensor, places: Tensor) -> Tensor:
    """x [B, T, C], places [B, N] in each sequence -> [B, N, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.size(-1)))


class GPT(nn.Module):
    """The model.

    Raises ValueError if `config.vocab_size` is not set.
    """

    never_predicted: Tensor  # [V padded], added to the logits
    rotation: Tensor | None  # [2, block_size, head_dim], see `rotations`; None without rotary positions

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: use the tokenizer's")
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_tokens = self.vocab_size + (not config.causal)  # with the mask of an encoder
        padded = math.ceil(self.n_tokens / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = build_norm(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, padded, bias=False)
        never_predicted = torch.zeros(padded)
        never_predicted[self.vocab_size :] = -math.inf
        self.register_buffer("never_predicted", never_predicted, persistent=False)
        rotation = rotations(config) if config.position == "rotary" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.one_token: Callable[..., Tensor] = Block.__call__
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std), zero biases; projections into the residual stream times 1/sqrt(2L), as in GPT-2."""
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # a norm's weight
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
        n_targets: int | None = None,
        return_hidden: bool = False,
        take: tuple[Sequence[int], Tensor] | None = None,
        head: bool = True,
        soft_targets: SoftTargets | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> GPTOutput:
        """Predict the token after each of `idx`; of an encoder, the token at each place.

        Args:
            idx: int64 [B, T], T at most block_size (with `cache`: including the cached tokens).
            targets: int64 [B, T], the tokens to predict (-100 to ignore one): returns `loss`, else `logits`.
            n_targets: with `targets`: each sequence has exactly so many that are not ignored, and the head is computed
                for these alone.
            return_hidden: returns `hidden`, a tuple of n_layer + 1 tensors [B, T, C]: hidden[0] the
                embedding output, hidden[l] after block l, hidden[-1] after ln_f.
            take: (layers, positions), indices into those hidden states in ascending order, and int64
                [len(layers), N]: returns `hidden` as one tensor [len(layers), B, N, C], row i the
                tokens positions[i] of hidden[layers[i]]. N = T takes all in their order, whatever positions says.
            head: False skips the output head: no logits, no loss.
            soft_targets: with `targets`: returns `divergence`, the mean KL divergence of the predictions from these.
            cache: keys and values of earlier tokens, extended in place, without gradients; `logits` of the last token.
            at: bool [B, T], for `logits` of these places alone, [n, V padded] in the order of idx.

        Raises ValueError if the tokens do not fit, or if `take` names a layer that does not exist.
        """
        T, start = idx.size(1), cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        hidden: list[Tensor] = []
        layers, positions = take if take is not None else ((), idx)
        if not set(layers) <= set(range(self.config.n_layer + 1)):
            raise ValueError(f"take has layers {list(layers)}; the model has hidden states 0 to {self.config.n_layer}")

        def visit(layer: int, x: Tensor) -> Tensor:
            """Collect what was requested of hidden[layer]; every hidden state passes through here."""
            if return_hidden or (layer in layers and positions.size(1) == T):
                hidden.append(x)
            elif layer in layers:
                x, taken = TakeTokens.apply(x, positions[layers.index(layer)])
                hidden.append(taken)
            return x

        x = self.wte(idx)  # [B, T, C]
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + T]
        rotation = self.rotation[:, start : start + T] if self.rotation is not None else None
        x = visit(0, F.dropout(x, self.config.dropout, self.training))
        call = self.one_token if cache is not None and T == 1 else Block.__call__
        pasts = cache.append(T) if cache is not None else [None] * self.config.n_layer
        for layer, (block, past) in enumerate(zip(self.h, pasts, strict=True), start=1):
            x = call(block, x, past, rotation)
            if layer < self.config.n_layer:
                x = visit(layer, x)
        x = visit(self.config.n_layer, self.ln_f(x))

        collected = tuple(hidden) if return_hidden else torch.stack(hidden) if take is not None else None
        if not head:
            return GPTOutput(None, None, collected)
        if targets is None:
            x = x[at] if at is not None else x[:, -1:] if cache is not None else x
            logits = linear(x, self.head_weight, self.never_predicted.to(x.dtype))  # [B, T or 1, V padded], or [n, …]
            return GPTOutput(logits, None, collected)
        if n_targets is not None:
            places = (targets == IGNORED).byte().argsort(dim=1, stable=True)[:, :n_targets]  # [B, n_targets]
            x, targets = take_along(x, places), targets.gather(1, places)
            if soft_targets is not None:
                soft_targets = soft_targets._replace(hidden=take_along(soft_targets.hidden, places))
        x, weight, bias = x.flatten(0, 1), self.head_weight, self.never_predicted
        loss, divergence = linear_cross_entropy(x, weight, bias, targets.flatten()), None
        if soft_targets is not None:
            teacher_x = soft_targets.hidden.flatten(0, 1)
            divergence = linear_kl_divergence(x, weight, teacher_x, soft_targets.head, bias, soft_targets.temperature)
        return GPTOutput(None, loss, collected, divergence)

    def hidden_states(self, idx: Tensor) -> tuple[Tensor, ...]:
        """The n_layer + 1 hidden states [B, T, C] of int64 [B, T], embedding output first; see `forward`."""
        return self(idx, return_hidden=True, head=False).hidden

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` sequences, with the device and dtype of the weights.

        Raises ValueError if the model is not causal: its hidden states depend on tokens that are still to come.
        """
        c = self.config
        if not c.causal:
            raise ValueError("a bidirectional model (model.causal=false) cannot use a key-value cache")
        return KVCache(
            n_layer=c.n_layer,
            batch_size=batch_size,
            n_kv_head=c.kv_heads,
            block_size=c.block_size,
            head_dim=c.head_width,
            device=self.device,
            dtype=self.embedding.weight.dtype,
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, each [B, T, C] -> [B, T, C]: the unit of sharding and recomputation."""
        return self.h

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.wte

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output head, [V padded, C]: the token embedding's, unless they are not tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

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
        padded = self.wte.num_embeddings
        padding = padded - self.n_tokens + (0 if self.lm_head is None else padded - self.vocab_size)
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self) -> int:
        """FLOPs per token of a training step (forward and backward) at full context.

        6 per parameter used in a matrix product, and 12 L C T for attention's two products (C: the width of all heads),
        not halved for causality: PaLM, arXiv 2204.02311, appendix B.
        """
        c = self.config
        in_matmuls = sum(p.numel() for part in (self.h, self.ln_f) for p in part.parameters())
        in_matmuls += self.vocab_size * c.n_embd  # the output head
        return 6 * in_matmuls + 12 * c.n_layer * c.n_head * c.head_width * c.block_size
