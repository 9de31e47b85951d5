"""Hugging Face models: read from safetensors alone, and without code of their authors.

Needs transformers: pip install 'nanodisp[eval]'.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from nanodisp.errors import UserError


def load_body(name: str) -> tuple[nn.Module, Callable[[str], np.ndarray]]:
    """A model without its head, in float32, and how its tokenizer encodes text (int64 [n]).

    Args:
        name: a folder, or an id on the hub.

    Raises UserError when transformers is missing, or the model is not there or not in safetensors.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError("Hugging Face models need transformers: pip install 'nanodisp[eval]'") from error
    try:
        model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).float()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} can not be loaded: " + str(error).strip().split("\n")[0]) from error

    def encode(text: str) -> np.ndarray:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return np.asarray(tokenizer(text).input_ids, dtype=np.int64)

    return model, encode
