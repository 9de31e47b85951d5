"""The default corpus: the standard library of the Python that runs this, about 12 MB.

Sources and the prose of `pydoc_data`, one document per file. Preparation takes a few seconds and no
network. The corpus differs between Python versions; the folder's name has the version. Left out: tests,
installed packages, and files generated when the interpreter was built (they name its machine).
"""

import platform
import sysconfig
from pathlib import Path

from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.errors import UserError

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
    return prepare_files(config, files, root, stem=f"python{platform.python_version()}")


if __name__ == "__main__":
    main(prepare)
