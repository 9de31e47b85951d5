"""The default corpus: the standard library of the Python that runs this, about 12 MB.

Sources and the prose of `pydoc_data`, one document per file. Preparation takes a few seconds and no
network. The corpus differs between Python versions; the folder's name has the version. Left out: tests,
installed packages, and files generated when the interpreter was built (they name its machine).

The vocabulary python4096.tiktoken beside this file was trained on the training split of Python 3.11.7's library:

    python data/pystdlib/prepare.py tokenizer=byte
    python -m nanodisp.data.tokenizer train text=<the printed folder> vocab_size=4096 to=python4096.tiktoken

With another version, some of its documents for validation have been seen by the vocabulary, but not by the model.
"""

import platform
import sysconfig
from dataclasses import replace
from pathlib import Path

from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.errors import UserError

VOCABULARY = "python4096.tiktoken"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_files(root: Path) -> list[Path]:
    """The sources below `root` that belong to the corpus, sorted by name."""
    names = sorted(file.relative_to(root) for file in root.rglob("*.py"))
    return [root / name for name in names if not LEFT_OUT & set(name.parts) and not name.name.startswith("_sysconfig")]


def prepare(config: DataConfig) -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root)
    if not files:
        raise UserError(f"{root} holds no sources; train on your own text: data=text data.path=<file or folder>")
    if config.tokenizer == VOCABULARY:
        config = replace(config, tokenizer=str(Path(__file__).parent / VOCABULARY))
    return prepare_files(config, files, root, stem=f"python{platform.python_version()}")


if __name__ == "__main__":
    main(prepare)
