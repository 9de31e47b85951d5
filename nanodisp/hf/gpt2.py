"""GPT-2 as Hugging Face stores it: fields of config.json, and tensors by name.

- Its linear layers in the blocks ("Conv1D") are transposed.
- GPT-2 has biases: a model without biases is exported with biases of zero, which is the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanodisp.data.tokenizer import GPT2_VOCAB_SIZE
from nanodisp.hf.weights import check_fixed, integers
from nanodisp.models.gpt import GPTConfig

PREFIX, EMBEDDING = "transformer.", "transformer.wte.weight"
BUFFERS: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")  # the causal mask, in older files
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# config.json fields that we hard-code, with accepted values (default first)
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
DEFAULTS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": GPT2_VOCAB_SIZE}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """Fields of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in FIXED.items()},
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.d_ff,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(DROPOUTS, config.dropout),
    }


def config_from_hf(theirs: dict[str, Any]) -> GPTConfig:
    """Our config of config.json; raises ValueError if our GPT cannot compute the same function."""
    check_fixed(theirs, FIXED)
    dropouts = {key: theirs.get(key, 0.1) for key in DROPOUTS}
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"its dropouts differ, {dropouts}")
    sizes = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}
    return GPTConfig(
        **integers({**DEFAULTS, **theirs}, {**sizes, "vocab_size": "vocab_size"}),
        d_ff=integers(theirs, {"n_inner": "d_ff"})["d_ff"] if theirs.get("n_inner") is not None else None,
        dropout=dropouts["resid_pdrop"],
        norm_eps=float(theirs.get("layer_norm_epsilon", 1e-5)),
        tie_embeddings=theirs.get("tie_word_embeddings", True),
    )


def weights_to_hf(config: GPTConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names, with zeros for missing biases."""
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in ours.items()}
    for name, tensor in list(tensors.items()) if not config.bias else ():
        if not name.startswith(("wte.", "wpe.", "lm_head.")):  # [in, out], or a LayerNorm's [out]
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.size(-1))
    return {name if name.startswith("lm_head.") else PREFIX + name: tensor for name, tensor in tensors.items()}


def weights_from_hf(config: GPTConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors, of the names and shapes of `weights_to_hf`, under our names."""
    return {
        name.removeprefix(PREFIX): tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in theirs.items()
    }
