"""GPT-2, LLaMA and Qwen3 to and from Hugging Face, as safetensors and JSON; no code from the hub is run.

    python -m nanodisp.hf export checkpoint=out/<run> to=<folder>
    python -m nanodisp.hf import checkpoint=<folder or hub id> to=out/<run>

transformers' AutoModelForCausalLM and AutoTokenizer load an exported folder. An imported model is a run at step 0, for
sample.py, nanodisp.condensation, nanodisp.evaluate and train.py's `init_from`. Tokenizers and the hub need further
packages: pip install 'nanodisp[eval]'.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodisp import cli
from nanodisp.config import Config
from nanodisp.data import tokenizer_json
from nanodisp.data.prepare import DataConfig
from nanodisp.data.tokenizer import TiktokenTokenizer, write_ranks
from nanodisp.data.tokenizer_json import JsonTokenizer
from nanodisp.dispersion.placement import DispersionConfig
from nanodisp.errors import UserError
from nanodisp.hf.card import model_card
from nanodisp.hf.families import to_hf
from nanodisp.hf.open import is_hugging_face, load_fitting, need_causal, open_hugging_face, read_checkpoint, spec_of
from nanodisp.hf.tokenizer import write_tokenizer
from nanodisp.runs import checkpoint
from nanodisp.runs.folder import TOKENIZER, write_config


@dataclass
class ExportConfig:
    """Keys of `export`.

    checkpoint: a run's folder (its newest checkpoint) or one checkpoint's.
    to: a new or empty folder.
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the run's own is not
        available; null is the run's own. A run on shards without a tokenizer ("none") is exported without one.
    """

    checkpoint: str = cli.MISSING
    to: str = cli.MISSING
    tokenizer: str | None = None


@dataclass
class ImportConfig:
    """Keys of `import`.

    checkpoint: a Hugging Face folder, or an id on the hub.
    to: the run's folder, new or empty.
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json; null reads the folder's
        own tokenizer.json, or else uses gpt2 if the vocabulary has its size.
    """

    checkpoint: str = cli.MISSING
    to: str = cli.MISSING
    tokenizer: str | None = None


def main(argv: Sequence[str]) -> None:
    commands: dict[str, tuple[type, Callable[[Any, Path], None]]] = {
        "export": (ExportConfig, export_run),
        "import": (ImportConfig, import_run),
    }
    if not argv or argv[0] not in commands:
        raise UserError("give export or import: python -m nanodisp.hf export checkpoint=… to=…, or import …")
    schema, command = commands[argv[0]]
    config: Any = cli.parse(schema, argv[1:])
    folder = Path(config.to)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"to={folder} is not empty: give a new or an empty folder")
        command(config, folder)
    except OSError as error:
        raise UserError(f"to={folder} cannot be written: {error}") from error
    print(f"wrote {folder}")


def export_run(config: ExportConfig, folder: Path) -> None:
    """Write config.json, model.safetensors, the tokenizer and a model card into `folder`."""
    if is_hugging_face(config.checkpoint):
        raise UserError(f"checkpoint={config.checkpoint} is a Hugging Face model already: give a run to export")
    saved = checkpoint.load(checkpoint.find(Path(config.checkpoint)))
    source, spec = read_checkpoint(saved), config.tokenizer or spec_of(saved)
    need_causal(config.checkpoint, source.config, "be exported")
    tokenizer = load_fitting(spec, source.config) if spec != "none" else None
    about, tensors = to_hf(source, tokenizer.eot if tokenizer is not None else None)
    card = model_card(saved, about["model_type"], tokenizer)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, source.config.block_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    checkpoint.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")


def import_run(config: ImportConfig, folder: Path) -> None:
    """Write a run's folder with a checkpoint at step 0."""
    name = config.checkpoint.removeprefix("hf:")
    source, tokenizer = open_hugging_face(name, config.tokenizer)
    files = {TiktokenTokenizer: TOKENIZER, JsonTokenizer: tokenizer_json.NAME}
    copied = files.get(type(tokenizer))
    data = DataConfig(name="shards", tokenizer=str(folder / copied) if copied else "byte")
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
        write_ranks(folder / TOKENIZER, tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer_json.copy(tokenizer.file, folder)
    write_config(folder, run)
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
    checkpoint.save(folder / checkpoint.CHECKPOINTS, source.tensors, {}, {**state, "config": dataclasses.asdict(run)})


if __name__ == "__main__":
    cli.run(main, ExportConfig, ImportConfig)
