"""GPT-2 as Hugging Face stores it: config.json and model.safetensors, read and written.

- Its linear layers in the blocks ("Conv1D") are transposed, and its vocabulary is not padded.
- GPT-2 has biases: a model without biases is exported with biases of zero, which is the same function.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nanodisp.data.tokenizer import GPT2_VOCAB_SIZE
from nanodisp.errors import UserError, first_line
from nanodisp.models.gpt import GPT, VOCAB_MULTIPLE, GPTConfig

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# config.json fields that we hard-code, with accepted values (default first)
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": GPT2_VOCAB_SIZE}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class Weights(NamedTuple):
    """A model's shape, and its tensors under our names (float32, the vocabulary padded)."""

    config: GPTConfig
    tensors: dict[str, Tensor]


def config_to_hf(config: GPTConfig, eot: int | None) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in FIXED.items()},
        **{"vocab_size": config.vocab_size, "n_positions": config.block_size, "n_embd": config.n_embd},
        **{"n_layer": config.n_layer, "n_head": config.n_head, "n_inner": config.d_ff},
        **dict.fromkeys(DROPOUTS, config.dropout),
        **{"bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32"},
    }


def weights_to_hf(source: Weights) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names: no padding of the vocabulary, and zeros for missing biases."""
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in source.tensors.items()}
    tensors["wte.weight"] = tensors["wte.weight"][: source.config.vocab_size]
    for name, tensor in list(tensors.items()) if not source.config.bias else ():
        if not name.startswith(("wte.", "wpe.")):  # [in, out], or a LayerNorm's [out]
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.size(-1))
    return {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index lists."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    return [folder / Path(name).name for name in sorted(names)]


def read_folder(folder: Path) -> Weights:
    """The model of a folder with config.json and model.safetensors, in one file or sharded.

    Raises UserError if it is missing, or if our GPT cannot compute the same function, with the first reason.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        for key, allowed in FIXED.items():
            if (value := config.get(key, allowed[0])) not in allowed:
                raise UserError(f"{folder} is an unsupported variant of GPT-2: its {key} is {value}, not {allowed[0]}")
        dropouts = {key: config.get(key, 0.1) for key in DROPOUTS}
        if len(set(dropouts.values())) > 1:
            raise UserError(f"{folder} is an unsupported variant of GPT-2: its dropouts differ, {dropouts}")
        sizes = {key: config.get(key, default) for key, default in SIZES.items()}
        for key, value in {**sizes, "n_inner": config.get("n_inner") or 1}.items():
            if type(value) is not int:
                raise UserError(f"{folder} cannot be read as a GPT-2: its {key} is {value!r}, not an integer")
        sizes["block_size"] = sizes.pop("n_positions")
        ours = GPTConfig(**sizes, d_ff=config.get("n_inner"), dropout=dropouts["resid_pdrop"])
        theirs: dict[str, Tensor] = {}
        for file in weight_files(folder):
            theirs |= safetensors.torch.load_file(file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as a GPT-2: {first_line(error)}") from error
    if not theirs:
        raise UserError(f"{folder} has no model.safetensors; other formats of weights are not supported")
    head = theirs.pop("lm_head.weight", None)
    weights = {
        (name := key.removeprefix("transformer.")): (tensor.T if name.endswith(TRANSPOSED) else tensor).float()
        for key, tensor in theirs.items()
        if not key.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask, in older files
    }
    wte = weights.get("wte.weight", torch.empty(0, 0))
    if head is not None and not torch.equal(head.float(), wte):
        raise UserError(f"{folder} is an unsupported variant of GPT-2: its output head is not its token embedding")
    assert ours.vocab_size is not None
    weights["wte.weight"] = nn.functional.pad(wte, (0, 0, 0, -ours.vocab_size % VOCAB_MULTIPLE))
    return checked(folder, Weights(ours, weights))


def checked(path: Path, source: Weights) -> Weights:
    """The source itself; raises UserError unless its tensors are those of a GPT of its shape, and finite."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(source.config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in source.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, got = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, found))
            raise UserError(f"{path} does not have the shape in its config: {name} should be {wanted}, is {got}")
        if not source.tensors[name].isfinite().all():
            raise UserError(
                f"{path} cannot be used: its {name} has values that are NaN or infinite, as after a training that "
                "diverged; an earlier checkpoint may be intact (out/<run>@best, out/<run>@<step>)"
            )
    return source


def cropped(tensors: dict[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """The tensors with the context cut to `block_size` tokens."""
    return {name: tensor[:block_size] if name == "wpe.weight" else tensor for name, tensor in tensors.items()}
