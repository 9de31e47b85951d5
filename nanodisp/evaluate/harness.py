"""A GPT and its tokenizer for EleutherAI's lm-evaluation-harness, as a `TemplateLM`.

It does what the harness's own `hf` model does: an empty context becomes end-of-text, a sequence longer than the
model's context is cut at the beginning, and a long text is scored window by window. The one difference is that a text
never encodes to end-of-text. Imported only where benchmarks are run, because the harness is an optional package.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from nanodisp.data.tokenizer import Tokenizer
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.models.generate import generate
from nanodisp.models.gpt import GPT
from nanodisp.models.score import loglikelihoods

MAX_NEW_TOKENS = 256  # for tasks that do not set it


class HarnessModel(TemplateLM):
    """A GPT in eval mode, on its device.

    Args:
        batch_size: sequences of full context per forward pass; of shorter ones it takes more.
        world: the ranks that share the log-likelihoods; each gets all of them. None is a single process.
        invalid: what to do with NaN: raise a UserError, or return it (True).

    Attributes:
        label: what the progress line says.
        cut: how many texts were longer than the context so far, and lost their beginning.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, batch_size: int, world: World | None = None, invalid: bool = False
    ) -> None:
        super().__init__()
        self.model, self.text, self.batch_size = model, tokenizer, batch_size
        self._device, self.world, self.invalid = model.device, world or World(0, 1, model.device), invalid
        self.label, self.cut = "log-likelihoods", 0

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for request in requests:
            if not request.args[1]:
                raise UserError(f"item {request.doc_id} of {request.task_name} has an empty text: mend the task's data")
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests are (texts, context, continuation)."""
        pairs = [(context or [self.text.eot], continuation) for _, context, continuation in requests]
        self.cut += sum(len(context) + len(answer) > self.model.config.block_size + 1 for context, answer in pairs)
        totals, greedy = loglikelihoods(
            self.model,
            pairs,
            tokens_at_once=self.batch_size * self.model.config.block_size,
            rank=self.world.rank,
            n_ranks=self.world.size,
            progress=lambda batches: tqdm(batches, self.label, disable=disable_tqdm or not self.world.is_main),
        )
        totals, greedy = self.world.sum(totals), self.world.sum(greedy.int()) > 0
        if totals.isnan().any() and not self.invalid:
            raise UserError(
                f"the model gives NaN for {int(totals.isnan().sum()):,} of {len(pairs):,} texts: its weights are "
                "damaged, or its training diverged; give an earlier checkpoint"
            )
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of full texts: every token once, after as much of the text as fits into one window."""
        block_size, of_text, windows = self.model.config.block_size, [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.text.eot, block_size, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                of_text.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(of_text, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests are (context, settings); those of equal length and settings share a batch."""
        alike: dict[tuple[int, str], list[int]] = defaultdict(list)
        contexts = []
        for number, request in enumerate(requests):
            text, settings = request.args
            room = self.model.config.block_size - normalize_gen_kwargs(settings, MAX_NEW_TOKENS)["max_gen_toks"]
            tokens = self.tok_encode(text) or [self.text.eot]
            room = max(room, self.model.config.block_size // 2)  # then the answer goes on beyond the context
            self.cut += len(tokens) > room
            contexts.append(tokens[-room:])
            alike[len(contexts[-1]), repr(settings)].append(number)
        answers = [""] * len(requests)
        batches = [
            group[i : i + self.batch_size] for group in alike.values() for i in range(0, len(group), self.batch_size)
        ]
        for batch in tqdm(batches, "generating", disable=disable_tqdm):
            idx = torch.tensor([contexts[number] for number in batch], device=self._device)
            for number, answer in zip(batch, self._continue(idx, requests[batch[0]].args[1]), strict=True):
                answers[number] = answer
        return answers

    def _continue(self, idx: Tensor, settings: dict[str, Any]) -> Iterator[str]:
        """Continuations of idx [B, T], each up to end-of-text or to the first of `until` in it."""
        settings = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        options: Any = {"top_k": settings.get("top_k"), "top_p": settings.get("top_p") or 1.0}
        rows: list[list[int]] = [[] for _ in idx]
        unfinished = set(range(len(rows)))
        for tokens in generate(self.model, idx, settings["max_gen_toks"], temperature=temperature, **options):
            for b, token in enumerate(tokens.tolist()):
                if b in unfinished:
                    rows[b].append(token)
                    if token == self.text.eot or self._cut(rows[b], settings["until"])[1]:
                        unfinished.remove(b)
            if not unfinished:
                break
        return (self._cut(row, settings["until"])[0] for row in rows)

    def _cut(self, tokens: list[int], until: Sequence[str]) -> tuple[str, bool]:
        """The text before the first of `until`, and whether it has one."""
        text = self.text.decode_bytes(tokens).decode("utf-8", errors="replace")
        ends = [end for stop in until if stop and (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text, bool(ends)
