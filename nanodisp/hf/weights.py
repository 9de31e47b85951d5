"""The weights of a model with its shape, and what both must pass before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nanodisp.errors import UserError, first_line
from nanodisp.models.gpt import GPT, VOCAB_MULTIPLE, GPTConfig

TABLES = ("wte.weight", "lm_head.weight")  # with a row for each token


class Weights(NamedTuple):
    """A model's shape, and its tensors under our names (float32, the vocabulary padded)."""

    config: GPTConfig
    tensors: dict[str, Tensor]


def blank(config: GPTConfig) -> dict[str, Tensor]:
    """The tensors of a GPT, by our names, without memory for their values."""
    with torch.device("meta"):
        return GPT(config).state_dict()


def checked(path: Path, source: Weights) -> Weights:
    """The source itself; raises UserError unless its tensors are those of a GPT of its shape, and finite."""
    check_tensors(path, source.tensors, blank(source.config))
    return source


def check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises UserError unless `found` has the names and shapes of `expected`, and finite values."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (list(each[name].shape) if name in each else "none" for each in (expected, found))
        if wanted != got:
            raise UserError(f"{path} does not have the shape in its config: {name} should be {wanted}, is {got}")
        if not found[name].isfinite().all():
            raise UserError(
                f"{path} cannot be used: its {name} has values that are NaN or infinite, as after a training that "
                "diverged; an earlier checkpoint may be intact (out/<run>@best, out/<run>@<step>)"
            )


def padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the vocabulary padded with zeros, as our models have it."""
    pad = lambda table: nn.functional.pad(table, (0, 0, 0, -len(table) % VOCAB_MULTIPLE))  # noqa: E731
    return {name: pad(tensor) if name in TABLES else tensor for name, tensor in tensors.items()}


def unpadded(source: Weights) -> dict[str, Tensor]:
    """The tensors without the padding of the vocabulary."""
    return {name: t[: source.config.vocab_size] if name in TABLES else t for name, t in source.tensors.items()}


def cropped(tensors: dict[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """The tensors with the context cut to `block_size` tokens."""
    return {name: tensor[:block_size] if name == "wpe.weight" else tensor for name, tensor in tensors.items()}


# --- files of Hugging Face ------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json; raises UserError if it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} cannot be read as a Hugging Face model: {first_line(error)}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, in one file or sharded, in float32.

    Raises UserError if there are none, or if they are quantized.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= safetensors.torch.load_file(file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"the weights of {folder} cannot be read: {first_line(error)}") from error
    if not tensors:
        raise UserError(f"{folder} has no model.safetensors; other formats of weights are not supported")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{folder} has quantized weights ({name} is {dtype}): give the model in full precision")
    return {name: tensor.float() for name, tensor in tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index lists."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    return [folder / Path(name).name for name in sorted(names)]


def integers(config: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Fields of config.json under our names, `names` being theirs -> ours; ValueError unless all are integers."""
    for name in names:
        if type(config.get(name)) is not int:
            raise ValueError(f"its {name} is {config.get(name)!r}, not an integer")
    return {ours: config[name] for name, ours in names.items()}


def check_fixed(config: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    """ValueError if a field of config.json has a value that we do not have; the first of `fixed` is the default."""
    for name, allowed in fixed.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ValueError(f"its {name} is {value}, not {allowed[0]}")
