"""LLaMA and Qwen3 as Hugging Face stores them: fields of config.json, and tensors by name.

Qwen3 is LLaMA with RMSNorm of each head's queries and keys (`qk_norm`). Queries, keys and values are one matrix here,
and gate and up of the MLP another. LLaMA has biases in all linear layers or in none; Qwen3 has none here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanodisp.hf.weights import blank, check_fixed, integers
from nanodisp.models.gpt import GPTConfig

PREFIX, EMBEDDING = "model.", "model.embed_tokens.weight"
BUFFERS: tuple[str, ...] = (".rotary_emb.inv_freq",)  # in older files
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
OPTIONAL = {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim"}
OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
# of a block: our module -> theirs, whose rows ours has one after another
IN_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """Fields of config.json; `dropout` becomes that of attention, the only one of LLaMA."""
    kind = "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and config.n_embd % config.n_head != 0:  # which transformers demands, whatever head_dim is
        raise ValueError(f"LLaMA needs model.n_embd={config.n_embd} divisible by model.n_head={config.n_head}")
    shape = config.shape()
    return {
        "architectures": [ARCHITECTURES[kind]],
        **{theirs: shape[ours] for theirs, ours in {**SIZES, **OPTIONAL}.items()},
        **{"hidden_act": "silu", "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings},
        "rope_theta": config.rope_theta,  # of transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **{"attention_bias": config.bias, "attention_dropout": config.dropout},
        **({"mlp_bias": config.bias} if kind == "llama" else {"use_sliding_window": False}),
    }


def config_from_hf(theirs: dict[str, Any]) -> GPTConfig:
    """Our config of config.json; raises ValueError if our GPT cannot compute the same function."""
    is_qwen3 = theirs["model_type"] == "qwen3"
    check_fixed(theirs, {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)})
    bias = theirs.get("attention_bias", False)
    check_fixed(theirs, {"attention_bias": (False,)} if is_qwen3 else {"mlp_bias": (bias,), "attention_bias": (bias,)})
    if others := sorted(set(theirs.get("layer_types") or ()) - {"full_attention"}):
        raise ValueError(f"its layer_types have {', '.join(others)}: attention over a window is not supported")
    if is_qwen3:
        theirs = {"head_dim": 128, **theirs}
    given = {name: ours for name, ours in OPTIONAL.items() if theirs.get(name) is not None}
    return GPTConfig(
        **integers(theirs, {**SIZES, **given}),
        bias=bias,
        dropout=float(theirs.get("attention_dropout", 0.0)),
        norm="rmsnorm",
        norm_eps=float(theirs.get("rms_norm_eps", 1e-6)),
        position="rotary",
        rope_theta=rope_theta(theirs),
        mlp="swiglu",
        qk_norm=is_qwen3,
        tie_embeddings=theirs.get("tie_word_embeddings", False),
    )


def rope_theta(theirs: dict[str, Any]) -> float:
    """The base of the rotations; raises ValueError if they are scaled for longer contexts, or of a part of a head."""
    found = theirs
    for rope in (theirs.get("rope_scaling"), theirs.get("rope_parameters")):  # of transformers 4 and 5
        found = {**found, **(rope or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
        raise ValueError(f"its rotary positions are scaled ({kind}), which gives other angles than rope_theta alone")
    check_fixed(found, {"partial_rotary_factor": (1.0,)})
    return float(found.get("rope_theta", 10_000.0))


def theirs_of(ours: str) -> list[str]:
    """Hugging Face's names of the parts of one of our tensors."""
    module, _, kind = ours.rpartition(".")
    if module in OUTSIDE:
        return [f"{OUTSIDE[module]}.{kind}"]
    _, layer, part = module.split(".", 2)
    return [f"model.layers.{layer}.{each}.{kind}" for each in IN_BLOCK[part]]


def weights_to_hf(config: GPTConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names."""
    heads = [n * config.head_width for n in (config.n_head, config.kv_heads, config.kv_heads)]
    tensors: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        rows = heads if ".c_attn." in name else [config.mlp_width] * 2 if ".c_fc." in name else [len(tensor)]
        tensors |= zip(theirs_of(name), tensor.split(rows), strict=True)
    return tensors


def weights_from_hf(config: GPTConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors, of the names and shapes of `weights_to_hf`, under our names."""
    return {name: torch.cat([theirs[part] for part in theirs_of(name)]) for name in blank(config)}
