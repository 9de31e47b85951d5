"""The one place that chooses a family: of Hugging Face's by its model_type, for a model of ours by its switches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, equal

from nanodisp.cli import as_typed
from nanodisp.errors import UserError, first_line
from nanodisp.hf import gpt2, llama
from nanodisp.hf.weights import Weights, blank, check_tensors, padded, read_config, read_tensors, unpadded
from nanodisp.models.gpt import GPTConfig

HEAD = "lm_head.weight"


class Family(Protocol):
    """A module that maps config.json and tensors.

    PREFIX: of the names, which some files leave out.
    EMBEDDING: the name of the token embedding.
    BUFFERS: ends of names that are not weights.
    """

    PREFIX: str
    EMBEDDING: str
    BUFFERS: tuple[str, ...]

    def config_to_hf(self, config: GPTConfig) -> dict[str, Any]: ...
    def config_from_hf(self, theirs: dict[str, Any]) -> GPTConfig: ...
    def weights_to_hf(self, config: GPTConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def weights_from_hf(self, config: GPTConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]: ...


FAMILIES: Mapping[str, Family] = {"gpt2": gpt2, "llama": llama, "qwen3": llama}
TITLES = {"gpt2": "GPT-2", "llama": "LLaMA", "qwen3": "Qwen3"}
LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "causal": True}


def switches(kind: str, config: GPTConfig) -> dict[str, Any]:
    """The values that `config.shape()` must have for a family."""
    heads = {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}
    return {
        "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu", "causal": True, "qk_norm": False, **heads},
        "llama": {**LLAMA, "qk_norm": False},
        "qwen3": {**LLAMA, "qk_norm": True, "bias": False},
    }[kind]


def kind_of(config: GPTConfig) -> str:
    """The model_type of a model of ours; raises UserError naming the switches that the nearest family does not have."""
    differing = {
        kind: {name: value for name, value in switches(kind, config).items() if config.shape()[name] != value}
        for kind in FAMILIES
    }
    nearest = min(differing, key=lambda kind: len(differing[kind]))
    if differing[nearest]:
        ours = ", ".join(f"model.{name}={as_typed(config.shape()[name])}" for name in differing[nearest])
        theirs = ", ".join(f"{name}={as_typed(value)}" for name, value in differing[nearest].items())
        raise UserError(
            f"{ours} has no counterpart in transformers, with the model's other switches: the nearest, "
            f"{TITLES[nearest]}, has {theirs}; only {', '.join(TITLES.values())} can be exported"
        )
    return nearest


def to_hf(source: Weights, eot: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json and model.safetensors; raises UserError if no family computes the same function."""
    kind = kind_of(source.config)
    family = FAMILIES[kind]
    try:
        config = family.config_to_hf(source.config)
    except ValueError as error:
        raise UserError(f"the model cannot be exported: {error}") from error
    config |= {"model_type": kind, "bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32"}
    tensors = family.weights_to_hf(source.config, unpadded(source))
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_folder(folder: Path) -> Weights:
    """The model of a folder with config.json and model.safetensors, in one file or sharded.

    Raises UserError if it is missing, or if our GPT cannot compute the same function, with the first reason.
    """
    theirs = read_config(folder)
    kind = str(theirs.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{folder} is of the model_type {kind}: supported are {', '.join(FAMILIES)}")
    if theirs.get("quantization_config"):
        raise UserError(f"{folder} is quantized (quantization_config): give the model in full precision")
    family, what = FAMILIES[kind], f"{folder} cannot be read as a {TITLES[kind]}"
    try:
        config = family.config_from_hf(theirs)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{what}: {first_line(error)}") from error
    found = {
        name if name.startswith((family.PREFIX, HEAD)) else family.PREFIX + name: tensor
        for name, tensor in read_tensors(folder).items()
        if not name.endswith(family.BUFFERS)
    }
    expected = family.weights_to_hf(config, unpadded(Weights(config, blank(config))))
    head = found.pop(HEAD, None) if config.tie_embeddings else None
    if head is not None and not equal(head, found.get(family.EMBEDDING, head)):
        raise UserError(f"{what}: its output head is not its token embedding, although tie_word_embeddings is true")
    check_tensors(folder, found, expected)
    return Weights(config, padded(family.weights_from_hf(config, found)))
