"""Texts to vectors, one per layer and pooling: [layers, poolings, texts, F].

    embedder = open_embedder("out/<run>")                      # or a Hugging Face folder, or hf:<id>
    vectors = embed(embedder, texts, layers=[-1], poolings=["mean"]).vectors[0, 0]      # [n_texts, F]

A text gets one forward pass for all layers and poolings. Texts of equally many tokens share a batch, so nothing is
padded and no model needs an attention mask: a vector does not depend on the texts beside it. The vectors of all texts
are in memory (float32), the hidden states of one batch at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.condensation.measure import hidden_states
from nanodisp.errors import UserError
from nanodisp.hf.open import Measurable, load_their_tokenizer, open_for_measuring

TOKENS_AT_ONCE = 4096  # per forward pass; a single text may have more


def mean(z: Tensor) -> Tensor:
    """The mean of the tokens: [B, T, F] -> [B, F]."""
    return z.mean(dim=1)


def last(z: Tensor) -> Tensor:
    """The last token, the only one that has seen all of a decoder's text: [B, T, F] -> [B, F]."""
    return z[:, -1]


def weighted(z: Tensor) -> Tensor:
    """The mean weighted by position, token t of 1 to T by t: Muennighoff, "SGPT", arXiv 2202.08904, section 4.1.

    [B, T, F] -> [B, F].
    """
    weight = torch.arange(1, z.size(1) + 1, dtype=z.dtype, device=z.device)
    return (weight / weight.sum()) @ z


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": mean, "last": last, "weighted": weighted}


@dataclass
class Embedder:
    """A model in eval mode on its device, and how it reads text.

    tokenise: text -> its tokens, cut to the context and with the special tokens that a Hugging Face model's tokenizer
        adds, and how many it had before it was cut.
    """

    subject: Measurable
    model: nn.Module
    device: torch.device
    tokenise: Callable[[str], tuple[list[int], int]]


@dataclass
class Embeddings:
    """Vectors of texts.

    vectors: float32 [layers, poolings, texts, F], on the CPU; layer 0 is the embedding.
    n_cut: how many texts were longer than the model's context and lost their end.
    share: of the texts' tokens that are left.
    """

    vectors: Tensor
    n_cut: int
    share: float


def open_embedder(name: str, tokenizer: str | None = None, device: torch.device | None = None) -> Embedder:
    """A run (with the tokenizer of a spec, if its own is not available) or a Hugging Face model, by name.

    Raises UserError without a model, or without a tokenizer that fits.
    """
    device = device or torch.device("cpu")
    subject = open_for_measuring(name, tokenizer)
    if subject.load_tokenizer is None:
        tokenise = _their_tokens(load_their_tokenizer(name.removeprefix("hf:")), subject.context)
    else:
        ours = subject.load_tokenizer()

        def tokenise(text: str) -> tuple[list[int], int]:
            tokens = ours.encode(text).tolist()
            return tokens[: subject.context], len(tokens)

    return Embedder(subject, subject.model.to(device).eval(), device, tokenise)


def _their_tokens(tokenizer: Any, context: int) -> Callable[[str], tuple[list[int], int]]:
    """A transformers tokenizer that cuts to the context, and keeps its special tokens at both ends when it does."""

    def tokenise(text: str) -> tuple[list[int], int]:
        tokens = tokenizer(text, verbose=False).input_ids
        if len(tokens) <= context:
            return tokens, len(tokens)
        return tokenizer(text, truncation=True, max_length=context).input_ids, len(tokens)

    return tokenise


@torch.inference_mode()
def embed(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    poolings: Sequence[str] = tuple(POOLINGS),
) -> Embeddings:
    """The vectors of texts.

    Args:
        texts: at least one; `is_empty` of none.
        layers: indices of hidden states, such as [-1] for the last; None for all.
        poolings: names of `POOLINGS`.

    Raises UserError for a text without tokens, a token, layer or pooling that there is not, or a layer that gives NaN.
    """
    if unknown := set(poolings) - set(POOLINGS):
        raise UserError(f"pooling={unknown.pop()} is unknown; choose one of {', '.join(POOLINGS)}")
    alike: dict[int, list[int]] = defaultdict(list)  # number of tokens -> texts
    rows, n_cut, n_all = [], 0, 0
    for number, text in enumerate(texts):
        tokens, before = embedder.tokenise(text)
        if not tokens:
            raise UserError(f"text {number} has no tokens ({text[:40]!r}): leave empty texts out")
        if max(tokens) >= embedder.subject.vocab_size:
            raise UserError(
                f"the tokenizer of {embedder.subject.name} gives token {max(tokens)}, the model has "
                f"{embedder.subject.vocab_size}"
            )
        alike[len(tokens)].append(number)
        rows.append(np.array(tokens, dtype=np.int64))
        n_cut += before > len(tokens)
        n_all += before
    vectors: Tensor | None = None
    for length, numbers in sorted(alike.items(), reverse=True):  # the longest first: memory runs out at once or never
        at_once = max(1, TOKENS_AT_ONCE // length)
        for batch in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
            idx = torch.from_numpy(np.stack([rows[number] for number in batch])).to(embedder.device)  # [B, T]
            states = list(enumerate(hidden_states(embedder.model, idx)))
            if wrong := [layer for layer in layers or () if not -len(states) <= layer < len(states)]:
                raise UserError(f"layer={wrong[0]}: {embedder.subject.name} has hidden states 0 to {len(states) - 1}")
            pooled = torch.stack(
                [
                    torch.stack([POOLINGS[name](z.float()) for name in poolings])
                    for _, z in (states if layers is None else [states[layer] for layer in layers])
                ]
            )  # [layers, poolings, B, F]
            if not pooled.isfinite().all():
                raise UserError(_not_finite(embedder.subject.name, states))
            if vectors is None:
                vectors = torch.empty(*pooled.shape[:2], len(rows), pooled.size(-1))
            vectors[:, :, batch] = pooled.cpu()
    assert vectors is not None, "no texts"
    return Embeddings(vectors, n_cut, sum(map(len, rows)) / n_all)


def _not_finite(name: str, states: list[tuple[int, Tensor]]) -> str:
    """Which layer is the first that is not finite."""
    layer = next((layer for layer, z in states if not z.isfinite().all()), len(states) - 1)
    return f"layer {layer} of {name} gives NaN or infinite values: its weights are damaged, or overflow their precision"


def is_empty(text: str) -> bool:
    """Whether a text has nothing but white space: such texts have no vector."""
    return not text.strip()
