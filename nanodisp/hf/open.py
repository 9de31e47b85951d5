"""The one place where a model is opened by name.

A name is a run's folder (its newest checkpoint), one of its checkpoints, a folder with config.json as Hugging Face
writes it, or hf:<folder or id on the hub>.

- `open_run`: the model of a run's checkpoint, for sample.py, evaluation and condensation;
- `open_source`: weights to start from or to distil from, a run's or a Hugging Face GPT-2's;
- `open_for_measuring`: any decoder that returns hidden states, a run's or any of transformers'.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.config import Config
from nanodisp.data.prepare import DataConfig
from nanodisp.data.tokenizer import Tokenizer, load_tokenizer
from nanodisp.errors import UserError, first_line, optional
from nanodisp.hf import gpt2
from nanodisp.hf.gpt2 import Weights
from nanodisp.hf.tokenizer import read_tokenizer
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.runs import checkpoint
from nanodisp.runs.folder import spec_in

DEFAULT_CONTEXT = 512  # tokens, for a transformers model whose config does not give one
# A text that different tokenizers split differently.
PROBE = "The quick brown fox: 1234567 naïve cafés, 東京 😀\n\n\tdef f(x):\n        return x  \n"


def is_hugging_face(name: str) -> bool:
    return name.startswith("hf:") or (Path(name) / "config.json").is_file()


# --- a run -------------------------------------------------------------------------------


@dataclass
class OpenRun:
    """A checkpoint of a run.

    model: on the CPU, in eval mode.
    spec: its tokenizer, for `load_tokenizer`.
    folder: the run's folder.
    """

    saved: checkpoint.Checkpoint
    model: GPT
    spec: str
    folder: Path


def open_run(name: str) -> OpenRun:
    """Raises UserError without a checkpoint, or if this version does not build its model."""
    saved = checkpoint.load(checkpoint.find(Path(name)))
    return OpenRun(saved, build(read_checkpoint(saved)), spec_of(saved), saved.path.parent.parent)


def read_checkpoint(saved: checkpoint.Checkpoint) -> Weights:
    """The weights of a checkpoint; raises UserError if this version does not build its model."""
    try:
        spec_of(saved)
        return gpt2.checked(saved.path, Weights(GPTConfig(**saved.state["config"]["model"]), saved.model))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{saved.path} holds a model that this version does not build: {first_line(error)}") from error


def spec_of(saved: checkpoint.Checkpoint) -> str:
    """The spec of a checkpoint's tokenizer."""
    return spec_in(saved.path.parent.parent, saved.state["config"]["data"]["tokenizer"])


def build(weights: Weights) -> GPT:
    """The model with these weights, on the CPU in eval mode."""
    model = GPT(weights.config)
    model.load_state_dict(weights.tensors)
    return model.eval()


# --- weights to start from or to distil from ------------------------------------------------


class Source(NamedTuple):
    """The weights of a model, and its tokenizer if that is available."""

    weights: Weights
    tokenizer: Tokenizer | None


def open_source(name: str) -> Source:
    """Raises UserError if there is no such model, or it is not a GPT-2."""
    if is_hugging_face(name):
        folder = download(name.removeprefix("hf:"))
        return Source(gpt2.read_folder(folder), _if_available(read_tokenizer, folder))
    saved = checkpoint.load(checkpoint.find(Path(name)))
    return Source(read_checkpoint(saved), _if_available(load_tokenizer, spec_of(saved)))


def initial_weights(config: Config) -> dict[str, Tensor]:
    """The state dict that a run with `init_from` starts from.

    The source must have the run's shape; the run's context may be shorter and its dropout may differ. If both
    tokenizers are available, they must agree.

    Raises UserError if there is no such source, or it has another shape or tokenizer.
    """
    name = str(config.init_from)
    source = open_source(name)
    theirs, ours = (
        {**dataclasses.asdict(c), "d_ff": c.d_ff or 4 * c.n_embd, "dropout": None}
        for c in (source.weights.config, config.model)
    )
    if config.model.block_size < theirs["block_size"]:
        theirs["block_size"] = config.model.block_size
    if changes := [f"model.{key}={str(value).lower()}" for key, value in theirs.items() if ours[key] != value]:
        hint = "; another vocabulary is another data.tokenizer" if ours["vocab_size"] != theirs["vocab_size"] else ""
        raise UserError(f"init_from={name} has another shape: give {' '.join(changes)}{hint}")
    check_tokenizer(f"init_from={name}", source, config.data.tokenizer)
    return gpt2.cropped(source.weights.tensors, config.model.block_size)


def open_teacher(config: Config, device: torch.device) -> GPT | None:
    """The teacher of a run, frozen and in eval mode; None without `intervention.teacher`.

    Raises UserError if there is no such source, or it has another vocabulary, a shorter context or another tokenizer.
    """
    name = config.intervention.teacher
    if name is None:
        return None
    source = open_source(name)
    vocab_size, context = source.weights.config.vocab_size, source.weights.config.block_size
    if vocab_size != config.model.vocab_size:
        raise UserError(
            f"intervention.teacher={name} has a vocabulary of {vocab_size} tokens, the run {config.model.vocab_size}: "
            "choose a teacher of the run's tokenizer, or give the teacher's as data.tokenizer"
        )
    if context < config.model.block_size:
        raise UserError(
            f"intervention.teacher={name} has a context of {context} tokens: give model.block_size={context} or less"
        )
    check_tokenizer(f"intervention.teacher={name}", source, config.data.tokenizer)
    return build(source.weights).requires_grad_(False).to(device)


def check_tokenizer(setting: str, source: Source, tokenizer: str) -> None:
    """Raises UserError naming `setting` if the tokenizers of source and run are both available and differ."""
    probes = [t.encode(PROBE).tolist() for t in (source.tokenizer, _if_available(load_tokenizer, tokenizer)) if t]
    if len(probes) == 2 and probes[0] != probes[1]:
        raise UserError(f"{setting} was trained with another tokenizer than data.tokenizer={tokenizer}")


def _if_available(load: Callable[[Any], Tokenizer], what: Any) -> Tokenizer | None:
    """The tokenizer, or None if its file or package is missing."""
    try:
        return load(what)
    except UserError:
        return None


# --- any model, to be measured --------------------------------------------------------------


@dataclass
class Measurable:
    """A model and what is needed to measure it.

    context: the longest window, in tokens.
    encode: text -> int64 [n]; the tokenizer is loaded when it is called.
    data: the run's data; None for a Hugging Face model.
    folder: where figures are written.
    """

    model: nn.Module
    context: int
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    data: DataConfig | None
    folder: Path


def open_for_measuring(name: str) -> Measurable:
    """A run, or any model that transformers knows, without its head and in float32; else raises UserError."""
    if is_hugging_face(name):
        return _open_transformers(name.removeprefix("hf:"))
    run = open_run(name)
    data = None
    if run.saved.state["corpus"] is not None:
        data = DataConfig(**{**run.saved.state["config"]["data"], "tokenizer": run.spec})

    def encode(text: str) -> np.ndarray:
        return load_tokenizer(run.spec).encode(text)

    return Measurable(run.model, run.model.config.block_size, run.model.vocab_size, encode, data, run.folder)


def _open_transformers(name: str) -> Measurable:
    transformers = optional("transformers")
    try:
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).float()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error

    def encode(text: str) -> np.ndarray:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return np.asarray(tokenizer(text).input_ids, dtype=np.int64)

    context = getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT)
    return Measurable(model, context, model.config.vocab_size, encode, None, folder_of(name))


def download(name: str) -> Path:
    """A folder as it is; of an id on the hub, its config, tokenizer and weights, downloaded or from the cache."""
    if Path(name).is_dir():
        return Path(name)
    hub = optional("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=["config.json", "tokenizer.json", "model*.safetensors", "*.index.json"]
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a folder and cannot be downloaded from the hub: {first_line(error)}") from error


def folder_of(name: str) -> Path:
    """Where figures of a Hugging Face model are written: its own folder, or out/<model> for one from the hub."""
    return Path(name) if Path(name).is_dir() else Path("out") / re.sub(r"[^\w.-]", "-", name)
