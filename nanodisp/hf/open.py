"""The one place where a model is opened by name.

A name is a run's folder (its newest checkpoint), out/<run>@best or @<step>, one of its checkpoints, a folder with
config.json as Hugging Face writes it, or hf:<folder or id on the hub>.

- `open_run`: the model of a run's checkpoint, for evaluation;
- `open_for_text`: a GPT and its tokenizer, a run's or Hugging Face's, for sample.py;
- `open_source`: weights to start from or to distil from, a run's or Hugging Face's;
- `open_for_measuring`: any model that returns hidden states, a run's or one of transformers'.

The first three are GPTs of ours: of Hugging Face's models GPT-2, LLaMA and Qwen3 (`families.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.condensation.measure import hidden_states
from nanodisp.config import Config
from nanodisp.data.prepare import DataConfig
from nanodisp.data.tokenizer import GPT2_VOCAB_SIZE, NO_FILE, SPECS, Tokenizer, load_tokenizer
from nanodisp.errors import UserError, first_line, optional
from nanodisp.hf.families import read_folder
from nanodisp.hf.tokenizer import read_tokenizer
from nanodisp.hf.weights import Weights, checked, cropped
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

    @property
    def name(self) -> str:
        return name_of(self.folder, self.saved.step)

    def load_tokenizer(self, spec: str | None = None) -> Tokenizer:
        """The run's own, or the one of `spec`; raises UserError if it cannot be loaded or is not the model's."""
        try:
            return load_fitting(spec or self.spec, self.model.config)
        except UserError as error:
            raise UserError(str(error) + ("" if spec else "; tokenizer=… replaces the run's own")) from error


def name_of(folder: Path, step: int) -> str:
    """The name of a run's checkpoint in what is measured of it."""
    return f"{folder.resolve().name} at step {step}"


def open_run(name: str) -> OpenRun:
    """Raises UserError without a checkpoint, or if this version does not build its model."""
    saved = checkpoint.load(checkpoint.find(Path(name)))
    return OpenRun(saved, build(read_checkpoint(saved)), spec_of(saved), saved.path.parent.parent)


def read_checkpoint(saved: checkpoint.Checkpoint) -> Weights:
    """The weights of a checkpoint; raises UserError if this version does not build its model."""
    try:
        spec_of(saved)
        return checked(saved.path, Weights(GPTConfig(**saved.state["config"]["model"]), saved.model))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{saved.path} holds a model that this version does not build: {first_line(error)}") from error


def spec_of(saved: checkpoint.Checkpoint) -> str:
    """The spec of a checkpoint's tokenizer."""
    return spec_in(saved.path.parent.parent, saved.state["config"]["data"]["tokenizer"])


def load_fitting(spec: str, config: GPTConfig) -> Tokenizer:
    """The tokenizer of a spec; raises UserError if it has more tokens than the model."""
    tokenizer = load_tokenizer(spec)
    assert config.vocab_size is not None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer={spec} has a vocabulary of {tokenizer.vocab_size} tokens, the model of {config.vocab_size}"
        )
    return tokenizer


def need_causal(name: str, config: GPTConfig, cannot: str) -> None:
    """Raises UserError for an encoder, which predicts hidden tokens and not the next one, with what it can not be."""
    if not config.causal:
        raise UserError(
            f"{name} is a bidirectional model (model.causal=false), which cannot {cannot}; "
            "python -m nanodisp.condensation measures its layers"
        )


def build(weights: Weights) -> GPT:
    """The model with these weights, on the CPU in eval mode."""
    model = GPT(weights.config)
    model.load_state_dict(weights.tensors)
    return model.eval()


# --- a GPT and its tokenizer ----------------------------------------------------------------


def open_for_text(name: str, spec: str | None) -> tuple[GPT, Tokenizer, int]:
    """A run's model or one of Hugging Face, with its own tokenizer or the one of `spec`; raises UserError.

    The third is the token that text without a prompt begins after: end-of-text, if the model has learned it.
    """
    if is_hugging_face(name):
        weights, tokenizer = open_hugging_face(name, spec)
        return build(weights), tokenizer, tokenizer.eot
    run = open_run(name)
    need_causal(name, run.model.config, "generate text")
    tokenizer, start = run.load_tokenizer(spec), run.saved.state.get("sample_start")  # older checkpoints have none
    return run.model, tokenizer, tokenizer.eot if start is None else start


def open_hugging_face(name: str, spec: str | None) -> tuple[Weights, Tokenizer]:
    """The weights of a folder or hub id and the tokenizer of `spec`, else its own, else GPT-2's if that may be its.

    Raises UserError if our GPT cannot be that model, or without a tokenizer that fits.
    """
    folder = download(name.removeprefix("hf:"))
    weights = read_folder(folder)
    assert weights.config.vocab_size is not None
    if spec is None and (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder)
        if tokenizer.vocab_size > weights.config.vocab_size:
            raise UserError(
                f"{name} has a vocabulary of {weights.config.vocab_size} tokens, its tokenizer of "
                f"{tokenizer.vocab_size}"
            )
        return weights, tokenizer
    if spec is None and weights.config.vocab_size != GPT2_VOCAB_SIZE:
        raise UserError(f"{name} has no tokenizer.json: give tokenizer={SPECS}")
    return weights, load_fitting(spec or "gpt2", weights.config)


# --- weights to start from or to distil from ------------------------------------------------


class Source(NamedTuple):
    """The weights of a model, and its tokenizer if that is available."""

    weights: Weights
    tokenizer: Tokenizer | None


def open_source(name: str) -> Source:
    """Raises UserError if there is no such model, or our GPT cannot be that model."""
    if is_hugging_face(name):
        folder = download(name.removeprefix("hf:"))
        return Source(read_folder(folder), _if_available(read_tokenizer, folder))
    saved = checkpoint.load(checkpoint.find(Path(name)))
    return Source(read_checkpoint(saved), _if_available(load_tokenizer, spec_of(saved)))


def initial_weights(config: Config) -> dict[str, Tensor]:
    """The state dict that a run with `init_from` starts from.

    The source must have the run's shape; the run's context may be shorter, without learned positions also longer. If
    both tokenizers are available, they must agree.

    Raises UserError if there is no such source, or it has another shape or tokenizer.
    """
    name = str(config.init_from)
    source = open_source(name)
    theirs, ours = source.weights.config.shape(), config.model.shape()
    if config.model.block_size < theirs["block_size"] or config.model.position != "learned":
        theirs["block_size"] = config.model.block_size
    if changes := [f"model.{key}={str(value).lower()}" for key, value in theirs.items() if ours[key] != value]:
        hint = "; another vocabulary is another data.tokenizer" if ours["vocab_size"] != theirs["vocab_size"] else ""
        raise UserError(f"init_from={name} has another shape: give {' '.join(changes)}{hint}")
    check_tokenizer(f"init_from={name}", source, config.data.tokenizer)
    return cropped(source.weights.tensors, config.model.block_size)


def open_teacher(config: Config, device: torch.device) -> GPT | None:
    """The teacher of a run, frozen and in eval mode; None without `intervention.teacher`.

    Raises UserError if there is no such source, or it has another vocabulary, a shorter context or another tokenizer,
    or is an encoder for a decoder, or the reverse.
    """
    name = config.intervention.teacher
    if name is None:
        return None
    source = open_source(name)
    vocab_size, context = source.weights.config.vocab_size, source.weights.config.block_size
    if source.weights.config.causal != config.model.causal:
        kinds = ("an encoder", "a decoder") if config.model.causal else ("a decoder", "an encoder")
        raise UserError(
            f"intervention.teacher={name} is {kinds[0]}, the run {kinds[1]}: they predict other tokens; choose a "
            f"teacher with model.causal={str(config.model.causal).lower()}"
        )
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
    encode: text -> int64 [n]; the tokenizer is loaded when it is called, and UserError is raised without one.
    folder: where figures are written.
    data, corpus, fingerprint: the run's data, the name of its folder of shards and what identifies their tokens; None
        for a Hugging Face model, the last also for a run of version 0.1.0.
    load_tokenizer: the tokenizer of `encode`, for many texts; None for a Hugging Face model.
    """

    name: str
    model: nn.Module
    context: int
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    folder: Path
    data: DataConfig | None = None
    corpus: str | None = None
    fingerprint: str | None = None
    load_tokenizer: Callable[[], Tokenizer] | None = None


def open_for_measuring(name: str, spec: str | None = None) -> Measurable:
    """A run, with the tokenizer of `spec` if it is given, or a model of transformers, without its head and in float32.

    Raises UserError if there is none, or it does not return hidden states.
    """
    if is_hugging_face(name):
        if spec is not None:
            raise UserError("tokenizer=… is for runs: a Hugging Face model has its own")
        return _open_transformers(name.removeprefix("hf:"))
    run = open_run(name)
    corpus, data = run.saved.state["corpus"], None
    if corpus is not None:
        data = DataConfig(**run.saved.state["config"]["data"])
        if not Path(data.tokenizer).exists() and data.tokenizer not in NO_FILE:  # its folder of shards is named by it
            data.tokenizer = run.spec

    def load() -> Tokenizer:
        return run.load_tokenizer(spec)

    def encode(text: str) -> np.ndarray:
        return load().encode(text).astype(np.int64)

    block_size, vocab_size = run.model.config.block_size, run.model.vocab_size
    known = run.saved.state.get("corpus_fingerprint")
    return Measurable(run.name, run.model, block_size, vocab_size, encode, run.folder, data, corpus, known, load)


def quiet_transformers() -> Any:
    """transformers without progress bars and load reports."""
    transformers = optional("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _open_transformers(name: str) -> Measurable:
    transformers = quiet_transformers()
    options: Any = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise UserError(
                f"{name} is an encoder-decoder ({config.model_type}), which has two stacks of layers: supported are "
                "decoders (GPT-2, LLaMA, Qwen, OPT, …) and encoders (BERT, RoBERTa, …)"
            )
        model, loaded = transformers.AutoModel.from_pretrained(name, **options)
    except UserError:
        raise
    except Exception as error:  # of many classes, from transformers, safetensors and the network
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error
    check_complete(name, model, loaded)
    model = model.float().eval()
    try:
        with torch.inference_mode():
            list(hidden_states(model, torch.zeros(1, 2, dtype=torch.int64)))
    except Exception as error:  # of many classes: a model of images needs other inputs
        raise UserError(
            f"{name} ({type(model).__name__}) gives no hidden states of tokens alone: {first_line(error)}"
        ) from error

    def encode(text: str) -> np.ndarray:
        return np.asarray(load_their_tokenizer(name)(text, add_special_tokens=False).input_ids, dtype=np.int64)

    vocab_size = model.get_input_embeddings().weight.size(0)
    return Measurable(name, model, context_of(model), vocab_size, encode, folder_of(name))


def context_of(model: Any) -> int:
    """The longest window of a transformers model, in tokens; `DEFAULT_CONTEXT` if its config does not give one."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions begin after padding_idx
    context = getattr(model.config, "max_position_embeddings", None)
    return context if context and context > 0 else DEFAULT_CONTEXT


def check_complete(name: str, model: Any, loaded: dict[str, Any]) -> None:
    """Raises UserError if transformers had to invent weights; a pooler, which encoders may lack, has no effect here."""
    if missing := sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(f"{name} is incomplete: as a {type(model).__name__} it lacks weights, such as {missing[0]}")


def load_their_tokenizer(name: str) -> Any:
    """The tokenizer of a transformers model; raises UserError without one."""
    try:
        tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokens = tokenizer(PROBE, add_special_tokens=False).input_ids
    except Exception as error:  # of many classes
        raise UserError(f"{name} has no tokenizer that can be loaded: {first_line(error)}") from error
    if set(tokens) <= {tokenizer.unk_token_id}:  # without its files, transformers makes one without a vocabulary
        raise UserError(f"{name} has no tokenizer: put its tokenizer.json there")
    return tokenizer


def download(name: str) -> Path:
    """A folder as it is; of an id on the hub, its config, tokenizer and weights, downloaded or from the cache."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{name} is a file: give the folder that it is in, {Path(name).parent}")
    hub = optional("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=["config.json", "tokenizer*.json", "model*.safetensors", "*.index.json"]
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a folder and cannot be downloaded from the hub: {first_line(error)}") from error


def folder_of(name: str) -> Path:
    """Where figures of a Hugging Face model are written: its own folder, or out/<model> for one from the hub."""
    return Path(name) if Path(name).is_dir() else Path("out") / re.sub(r"[^\w.-]", "-", name)
