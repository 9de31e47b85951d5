"""Validation: held-out loss, the figures of every layer, the loss on training text, and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodisp.condensation.layers import figures_from, summed
from nanodisp.data.batches import count_windows, mask_tokens, read_windows, spread_windows
from nanodisp.data.corpus import Corpus
from nanodisp.data.questions import Question
from nanodisp.data.shards import Tokens
from nanodisp.distributed import World, hardware
from nanodisp.models.gpt import GPT
from nanodisp.models.score import loglikelihoods
from nanodisp.training.objective import n_targets

TRAIN_SHARE = 4  # one training window for so many validation windows
LAYER_WINDOWS = 4  # of the validation windows, for the figures between validations
SNAPSHOT_TOKENS = 256  # at most: with the layers and features of a small model, half a megabyte a snapshot
MASKS = (0,)  # the key of an encoder's masks, the same for all runs


class Validation:
    """Measures a model on a fixed set of validation windows, spread evenly over the split and shared among ranks.

    Args:
        corpus: its validation split, and for the loss on training text a quarter as many windows of the other.
        world: the ranks; all of them call every method.
        block_size: tokens per window.
        n_windows: number of windows; None takes all.
        rows: windows of one forward pass on a rank.
        autocast: makes the context of a forward pass.
        compiled: whether the pass goes through torch.compile.
        questions, benchmarks: for `answer`; a benchmark returns figures of a model in eval mode.
    """

    def __init__(
        self,
        corpus: Corpus,
        world: World,
        *,
        block_size: int,
        n_windows: int | None,
        rows: int,
        autocast: Callable[[], AbstractContextManager],
        compiled: bool = False,
        questions: Sequence[Question] = (),
        benchmarks: Callable[[GPT], dict[str, float]] | None = None,
    ) -> None:
        self.corpus, self.world, self.block_size, self.rows, self.autocast = corpus, world, block_size, rows, autocast
        self.windows = spread_windows(count_windows(corpus.val, block_size), n_windows)
        n_train = math.ceil(len(self.windows) / TRAIN_SHARE)
        self.train_windows = spread_windows(count_windows(corpus.train, block_size), n_train)
        self.layer_windows = self.windows[spread_windows(len(self.windows), LAYER_WINDOWS)]
        self.measure = torch.compile(loss_and_figures, dynamic=False) if compiled else loss_and_figures
        self.questions, self.benchmarks = questions, benchmarks

    def __call__(self, model: GPT) -> dict[str, Any]:
        """Loss in nats per token, bits per byte (None where bytes are unknown), the layers' figures, each by layer.

        These are the ones of `condensation/layers.py`. And "train_loss", the loss on training windows, also without
        dropout and noise: the gap to "loss" is what the model has memorised. It costs at most a quarter of the rest.

        Of an encoder "masked_loss" and "train_masked_loss" in nats per masked token, no bits per byte, and the figures
        of its layers for the text without masks. A window has the same masks at every validation of every run.
        """
        model.eval()
        means = self._mean(self.measure, model, self.corpus.val, self.windows)
        loss, train_loss = means[0].item(), self._mean(loss_alone, model, self.corpus.train, self.train_windows).item()
        by_layer = figures_from(means[1:], model.config.n_layer + 1, len(self.windows))
        model.train()
        name, ratio = model.config.loss_name, self.corpus.bytes_per_token
        bpb = {"bpb": loss / math.log(2) / ratio if ratio else None} if model.config.causal else {}
        return {name: loss, **bpb, f"train_{name}": train_loss, **by_layer}

    @torch.no_grad()
    def _mean(self, measure: Callable[..., Tensor], model: GPT, tokens: Tokens, windows: np.ndarray) -> Tensor:
        """The mean over windows of a split of `measure(model, text, x, y)`, a vector: float64."""
        world, n_windows = self.world, len(windows)
        sums: Any = 0.0
        mine = windows[world.rank :: world.size]
        for start in range(0, math.ceil(n_windows / world.size), self.rows):
            chunk = mine[start : start + self.rows]
            read = chunk if len(chunk) else windows[:1]  # none at the end, but FSDP needs every rank at every call
            text, y = read_windows(tokens, read, self.block_size, model.vocab_size)
            x, y = (text, y) if model.config.causal else mask_tokens(text, read, MASKS, model.vocab_size)
            with self.autocast():
                figures = measure(model, *(hardware.send(each, world.device) for each in (text, x, y)))
            sums = sums + len(chunk) * figures.double()
        return world.sum(sums) / n_windows

    @torch.no_grad()
    def layer_figures(self, model: GPT) -> dict[str, list[float]]:
        """The same figures by layer on a few windows: cheap enough to be recorded between validations."""
        x, _ = read_windows(self.corpus.val, self.layer_windows, self.block_size, model.vocab_size)
        model.eval()
        with self.autocast():
            means = summed(model.hidden_states(hardware.send(x, self.world.device)))  # on every rank: FSDP needs all
        model.train()
        return figures_from(means, model.config.n_layer + 1, len(self.layer_windows))

    @torch.no_grad()
    def snapshot(self, model: GPT) -> tuple[Tensor, Tensor]:
        """The first tokens of the split, int64 [T], and what every layer makes of them, [L + 1, T, F] on the CPU.

        Of an encoder without masks. All ranks call it, and get the same.
        """
        text, _ = read_windows(self.corpus.val, self.windows[:1], self.block_size, model.vocab_size)
        text = text[:, :SNAPSHOT_TOKENS]
        model.eval()
        with self.autocast():
            hidden = torch.cat(list(model.hidden_states(hardware.send(text, self.world.device))))
        model.train()
        return text[0], hidden.cpu()

    def answer(self, model: GPT) -> dict[str, float]:
        """The share of questions whose likeliest choice is right, and their number; and the figures of benchmarks.

        The likeliest choice has the lowest mean loss of its tokens, as in llm.c: the `acc_norm` of HellaSwag.
        """
        model.eval()
        figures = self._questions(model) if self.questions else {}
        figures |= self.benchmarks(model) if self.benchmarks is not None else {}
        model.train()
        return figures

    def _questions(self, model: GPT) -> dict[str, float]:
        pairs = [(question.context, choice) for question in self.questions for choice in question.choices]
        with self.autocast():
            totals, _ = loglikelihoods(model, pairs, rank=self.world.rank, n_ranks=self.world.size)
        lengths = torch.tensor([min(len(choice), self.block_size) for _, choice in pairs])  # tokens that were scored
        n_choices = [len(question.choices) for question in self.questions]
        means = (self.world.sum(totals).cpu() / lengths).split(n_choices)
        right = sum(int(mean.argmax()) == asked.label for mean, asked in zip(means, self.questions, strict=True))
        return {"accuracy": right / len(self.questions), "examples": len(self.questions)}


def loss_alone(model: GPT, text: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the targets y for the input x, which is `text` or has masks: [1]."""
    return model(x, y, n_targets=n_targets(model, x)).loss[None]


def loss_and_figures(model: GPT, text: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, then what the figures of every layer are made from: flat."""
    out = model(x, y, n_targets=n_targets(model, x), return_hidden=model.config.causal)
    hidden = out.hidden if model.config.causal else model.hidden_states(text)
    return torch.cat([out.loss[None], summed(hidden)])
