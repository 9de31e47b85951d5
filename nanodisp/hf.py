"""GPT-2 to and from Hugging Face: as safetensors and JSON, and without code of their authors.

    python -m nanodisp.hf export checkpoint=out/<run> to=<folder>
    python -m nanodisp.hf import checkpoint=<folder or hub id> to=out/<run>

An exported folder is what transformers' GPT2LMHeadModel and its fast tokenizers read; an imported
one is a run at step 0, for sample.py, nanodisp.condensation and train.py's `init_from`.

- Their linear layers in the blocks ("Conv1D") lie transposed, and their vocabulary is not padded.
- GPT-2 has biases: a model without is exported with biases of zero, which is the same function.
- The tokenizer goes along (`hf_tokenizer.py`). As everywhere here, no text encodes to the end-of-text
  token: `split_special_tokens` says so.
- Tokenizers, other models' bodies and the hub need packages of their own: pip install 'nanodisp[eval]'.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor, nn

from nanodisp import arguments, checkpoint
from nanodisp.errors import UserError, first_line, optional
from nanodisp.gpt import GPT, VOCAB_MULTIPLE, GPTConfig
from nanodisp.hf_tokenizer import END_OF_TEXT, build_tokenizer, read_tokenizer
from nanodisp.model_card import model_card
from nanodisp.tokenizer import GPT2_VOCAB_SIZE, TiktokenTokenizer, Tokenizer, load_tokenizer, spec_in, write_ranks

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What of a GPT-2's config.json ours can not be told otherwise: key, values that are ours, the first its default.
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
PROBE = (
    "The quick brown fox: 1234567 naïve cafés, 東京 😀\n\n\tdef f(x):\n        return x  \n"  # tells tokenizers apart
)


class Source(NamedTuple):
    """A model: shape, weights by our names (float32, the vocabulary padded), its tokenizer if that is at hand."""

    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None


# --- from train.py and condensation.py -----------------------------------------------------------


def initial_weights(name: str, config: GPTConfig, tokenizer: str) -> dict[str, Tensor]:
    """The weights that a run with `init_from=name` begins with: a state dict of GPT(config).

    Args:
        name: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<folder or id>.
        config: its shape must be the source's; the context may be shorter, dropout is free.
        tokenizer: the run's spec; where both tokenizers are at hand, they must agree.

    Raises UserError when there is no such source, or it is of another shape or tokenizer.
    """
    source = open_source(name)
    theirs, ours = (
        {**dataclasses.asdict(c), "d_ff": c.d_ff or 4 * c.n_embd, "dropout": None} for c in (source.config, config)
    )
    if config.block_size < source.config.block_size:
        theirs["block_size"] = config.block_size
    if changes := [f"model.{key}={str(value).lower()}" for key, value in theirs.items() if ours[key] != value]:
        hint = "; another vocabulary is another data.tokenizer" if ours["vocab_size"] != theirs["vocab_size"] else ""
        raise UserError(f"init_from={name} is of another shape: give {' '.join(changes)}{hint}")
    check_tokenizer(f"init_from={name}", source, tokenizer)
    return {**source.weights, "wpe.weight": source.weights["wpe.weight"][: config.block_size]}


def check_tokenizer(setting: str, source: Source, tokenizer: str) -> None:
    """UserError naming `setting` where the tokenizers of source and run are both at hand, and differ."""
    probes = [t.encode(PROBE).tolist() for t in (source.tokenizer, _at_hand(load_tokenizer, tokenizer)) if t]
    if len(probes) == 2 and probes[0] != probes[1]:
        raise UserError(f"{setting} was trained with another tokenizer than data.tokenizer={tokenizer}")


def open_source(name: str) -> Source:
    """A run's folder, one of its checkpoints, a Hugging Face folder or hf:<folder or id>; else UserError."""
    if name.startswith("hf:") or (Path(name) / "config.json").is_file():
        folder = download(name.removeprefix("hf:"))
        return read_folder(folder)._replace(tokenizer=_at_hand(read_tokenizer, folder))
    saved = checkpoint.load(checkpoint.find(Path(name)))
    return read_checkpoint(saved)._replace(tokenizer=_at_hand(load_tokenizer, spec_of(saved)))


# --- the command line ----------------------------------------------------------------------------


@dataclass
class ExportConfig:
    """checkpoint: a run's folder (its newest one) or one checkpoint's. to: a folder that is new or empty.

    tokenizer: byte, gpt2 or the path of a .tiktoken file, where the run's own is not at hand; null takes that. A run
        on tokens that nobody can turn into text ("none") is exported without.
    """

    checkpoint: str = arguments.MISSING
    to: str = arguments.MISSING
    tokenizer: str | None = None


@dataclass
class ImportConfig:
    """checkpoint: a folder of Hugging Face's, or an id on the hub. to: a run's folder that is new or empty.

    tokenizer: byte, gpt2 or the path of a .tiktoken file; null reads the folder's tokenizer.json, and
        takes gpt2 for a vocabulary of its size without one.
    """

    checkpoint: str = arguments.MISSING
    to: str = arguments.MISSING
    tokenizer: str | None = None


def main(argv: Sequence[str]) -> None:
    commands: dict[str, tuple[type, Callable[[Any, Path], None]]] = {
        "export": (ExportConfig, export_run),
        "import": (ImportConfig, import_run),
    }
    if not argv or argv[0] not in commands:
        raise UserError("say which way: python -m nanodisp.hf export checkpoint=… to=…, or import checkpoint=… to=…")
    schema, command = commands[argv[0]]
    config: Any = arguments.parse(schema, argv[1:])
    folder = Path(config.to)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"to={folder} is there already: name a new folder or an empty one")
        command(config, folder)
    except OSError as error:
        raise UserError(f"to={folder} can not be written: {error}") from error
    print(f"wrote {folder}")


# --- out -----------------------------------------------------------------------------------------


def export_run(config: ExportConfig, folder: Path) -> None:
    """Write config.json, model.safetensors, the tokenizer and a model card into `folder`."""
    saved = checkpoint.load(checkpoint.find(Path(config.checkpoint)))
    source, spec = read_checkpoint(saved), config.tokenizer or spec_of(saved)
    ours = load_tokenizer(spec) if spec != "none" else None
    if ours is not None and ours.vocab_size > source.config.vocab_size:  # type: ignore[operator]
        raise UserError(f"tokenizer={spec} has {ours.vocab_size} tokens, the model {source.config.vocab_size}")
    tokenizer, card = build_tokenizer(ours) if ours is not None else None, model_card(saved)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        about_tokenizer = {
            **{"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True},
            **{"clean_up_tokenization_spaces": False, "model_max_length": source.config.block_size},
            **{"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
        }
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(about_tokenizer, indent=2) + "\n")
    eot = ours.eot if ours is not None else None
    (folder / "config.json").write_text(json.dumps(config_to_hf(source.config, eot), indent=2) + "\n")
    safetensors.torch.save_file(weights_to_hf(source), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")


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


def weights_to_hf(source: Source) -> dict[str, Tensor]:
    """Their tensors by their names: no padding of the vocabulary, and biases of zero where there are none."""
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in source.weights.items()}
    tensors["wte.weight"] = tensors["wte.weight"][: source.config.vocab_size]
    for name, tensor in list(tensors.items()) if not source.config.bias else ():
        if not name.startswith(("wte.", "wpe.")):  # [in, out], or a LayerNorm's [out]
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.size(-1))
    return {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}


# --- in ------------------------------------------------------------------------------------------


def import_run(config: ImportConfig, folder: Path) -> None:
    """Write a run's folder with a checkpoint of step 0."""
    from nanodisp.config import Config, DataConfig, DispersionConfig  # here: they lie above this module

    name = config.checkpoint.removeprefix("hf:")
    theirs = download(name)
    source = read_folder(theirs)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif (theirs / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(theirs)
    elif source.config.vocab_size == GPT2_VOCAB_SIZE:
        tokenizer = load_tokenizer("gpt2")
    else:
        raise UserError(f"{name} has no tokenizer.json: give tokenizer=byte, gpt2 or the path of a .tiktoken file")
    if tokenizer.vocab_size > source.config.vocab_size:  # type: ignore[operator]
        raise UserError(f"{name} has {source.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    ranks = folder / "tokenizer.tiktoken"
    data = DataConfig(name="shards", tokenizer=str(ranks) if isinstance(tokenizer, TiktokenTokenizer) else "byte")
    try:
        run = Config(
            model=source.config,
            data=data,
            dispersion=DispersionConfig(lambda_disp=0.0),
            init_from=f"hf:{name}",
            out_dir=str(folder.parent),
            run_name=folder.name,
        )
    except ValueError as error:
        raise UserError(f"to={folder}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, TiktokenTokenizer):
        write_ranks(ranks, tokenizer)
    OmegaConf.save(OmegaConf.structured(run), folder / "config.yaml")
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "val_loss": None,
        "bad_steps": 0,
        "bad_in_a_row": 0,
        "scaler": {},
        "corpus": None,
    }
    checkpoint.save(folder / "checkpoints", source.weights, {}, {**state, "config": dataclasses.asdict(run)})


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    return [folder / Path(name).name for name in sorted(names)]


def read_folder(folder: Path) -> Source:
    """The model of a folder with config.json and model.safetensors, whole or in parts.

    Raises UserError when it is not there, or ours can not be the same function; told by the first thing in the way.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        for key, allowed in FIXED.items():
            if (value := config.get(key, allowed[0])) not in allowed:
                raise UserError(f"{folder} is not a GPT-2 of our kind: its {key} is {value}, ours {allowed[0]}")
        dropouts = {key: config.get(key, 0.1) for key in DROPOUTS}
        if len(set(dropouts.values())) > 1:
            raise UserError(f"{folder} is not a GPT-2 of our kind, which has one dropout: it has {dropouts}")
        sizes = {key: config.get(key, default) for key, default in SIZES.items()}
        for key, value in {**sizes, "n_inner": config.get("n_inner") or 1}.items():
            if type(value) is not int:
                raise UserError(f"{folder} can not be read as a GPT-2: its {key} is {value!r}, not a whole number")
        sizes["block_size"] = sizes.pop("n_positions")
        ours = GPTConfig(**sizes, d_ff=config.get("n_inner"), dropout=dropouts["resid_pdrop"])
        theirs: dict[str, Tensor] = {}
        for file in weight_files(folder):
            theirs |= safetensors.torch.load_file(file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} can not be read as a GPT-2: {first_line(error)}") from error
    if not theirs:
        raise UserError(f"{folder} has no model.safetensors, and weights in other formats are not read")
    head = theirs.pop("lm_head.weight", None)
    weights = {
        (name := key.removeprefix("transformer.")): (tensor.T if name.endswith(TRANSPOSED) else tensor).float()
        for key, tensor in theirs.items()
        if not key.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask, in older files
    }
    wte = weights.get("wte.weight", torch.empty(0, 0))
    if head is not None and not torch.equal(head.float(), wte):
        raise UserError(f"{folder} is not a GPT-2 of our kind: its output head is not its token embedding")
    assert ours.vocab_size is not None
    weights["wte.weight"] = nn.functional.pad(wte, (0, 0, 0, -ours.vocab_size % VOCAB_MULTIPLE))
    return checked(folder, Source(ours, weights, None))


def read_checkpoint(saved: checkpoint.Checkpoint) -> Source:
    """The model of one of our checkpoints; UserError when this nanodisp does not build it."""
    try:
        spec_of(saved)
        return checked(saved.path, Source(GPTConfig(**saved.state["config"]["model"]), saved.model, None))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{saved.path} is not of a model that this nanodisp builds: {first_line(error)}") from error


def build(source: Source) -> GPT:
    """The model itself, on the CPU."""
    model = GPT(source.config)
    model.load_state_dict(source.weights)
    return model


def checked(path: Path, source: Source) -> Source:
    """The source, if its tensors are those of a GPT of its shape."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(source.config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in source.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, got = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, found))
            raise UserError(f"{path} is not a GPT-2 of the shape it tells: {name} should be {wanted}, is {got}")
    return source


def download(name: str) -> Path:
    """A folder as it is; else the config, tokenizer and weights of an id on the hub, downloaded or from its cache."""
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
        raise UserError(f"{name} is no folder and can not be had from the hub: {first_line(error)}") from error


def folder_of(name: str) -> Path:
    """Where figures of a Hugging Face model go: its own folder, out/<model> for one from the hub."""
    return Path(name) if Path(name).is_dir() else Path("out") / re.sub(r"[^\w.-]", "-", name)


def spec_of(saved: checkpoint.Checkpoint) -> str:
    return spec_in(saved.path.parent.parent, saved.state["config"]["data"]["tokenizer"])


def _at_hand(load: Callable[[Any], Tokenizer], what: Any) -> Tokenizer | None:
    """None for a tokenizer whose file or package is not here."""
    try:
        return load(what)
    except UserError:
        return None


if __name__ == "__main__":
    arguments.run(main)
