"""The harness's own `hf` model, for models of transformers, with the checks that its logs would leave to the reader.

Imported only by `__main__.py`, because the harness is an optional package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from nanodisp.errors import UserError
from nanodisp.hf.open import check_complete

DECODERS = "GPT-2, LLaMA, Qwen or OPT"


class HuggingFaceModel(HFLM):
    """Raises UserError for an encoder-decoder, for incomplete weights, and for a model that sees what it predicts.

    cut: how many texts were longer than the context so far, and lost their beginning.
    """

    _model: Any
    cut = 0

    def _loglikelihood_tokens(self, requests: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        self.cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: Sequence[Any], *arguments: Any, **options: Any) -> list[str]:
        for request in requests:
            text, settings = request.args
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            self.cut += len(self.tok_encode(text)) > room
        return super().generate_until(requests, *arguments, **options)

    def _create_model(self, pretrained: str, *arguments: Any, **options: Any) -> None:
        if self.backend != "causal":
            kind = f"an encoder-decoder ({self.config.model_type})"
            raise UserError(f"{pretrained} is {kind}: give a decoder, such as {DECODERS}")
        super()._create_model(pretrained, *arguments, output_loading_info=True, **options)
        self._model, loaded = self._model
        check_complete(pretrained, self._model, loaded)
        check_causal(pretrained, self._model)


def check_causal(name: str, model: Any) -> None:
    """Raises UserError if the logits of a position are not finite or change with the tokens after it, as BERT's do."""
    with torch.inference_mode():
        pair = torch.tensor([[0, 1, 2], [0, 1, 3]], device=model.device)
        logits = model.eval()(pair).logits.float()
    if not logits.isfinite().all():
        raise UserError(f"{name} gives NaN or infinite logits: its weights are damaged, or overflow their precision")
    change = (logits[0] - logits[1]).abs().amax(dim=-1)  # [3]: only the last token differs
    if change[:2].max() > 1e-3 * change[2]:
        raise UserError(
            f"{name} ({type(model).__name__}) sees the tokens that it should predict, so it is an encoder: "
            f"give a decoder, such as {DECODERS}"
        )
