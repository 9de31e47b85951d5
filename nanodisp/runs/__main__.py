"""A run's folder as one file, and back: to move it to another machine, or to keep it.

    python -m nanodisp.runs pack out/<run> to=<file>.tar
    python -m nanodisp.runs unpack <file>.tar to=out       # then the run's command resumes it, bit for bit

Every file's sha256 is in the tar and compared. The data is not packed: the resumed run checks that it is the same.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for Ctrl-C while the rest is loaded

# isort: split
import contextlib
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import cli
from nanodisp.config import CONFIG
from nanodisp.errors import UserError
from nanodisp.runs.pack import pack, unpack

USAGE = "python -m nanodisp.runs pack out/<run> to=<file>.tar, or unpack <file>.tar to=<folder of runs>"


@dataclass
class PackConfig:
    """pack.

    run: the run's folder.
    to: the file to write.
    """

    run: str = cli.MISSING
    to: str = cli.MISSING


@dataclass
class UnpackConfig:
    """unpack.

    file: what pack has written.
    to: the folder of runs, in which the run's folder is made.
    """

    file: str = cli.MISSING
    to: str = "out"


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in ("pack", "unpack"):
        raise UserError(f"give {USAGE}")
    first = "run" if argv[0] == "pack" else "file"
    names, keys = cli.split_names(argv[1:])
    rest = [f"{first}={name}" for name in names] + keys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C also removes what is half written
    if argv[0] == "pack":
        packed = cli.parse(PackConfig, rest)
        n_files = pack(Path(packed.run), Path(packed.to))
        print(f"wrote {packed.to}: {n_files} files of {packed.run}")
        return
    unpacked = cli.parse(UnpackConfig, rest)
    folder = unpack(Path(unpacked.file), Path(unpacked.to))
    print(f"wrote {folder}, every sha256 as it was packed")
    with contextlib.suppress(OSError, YAMLError, OmegaConfBaseException, AttributeError):
        if command := cast(DictConfig, OmegaConf.load(folder / CONFIG)).get("command"):
            print(f"it goes on with its command and out_dir={shlex.quote(unpacked.to)}: {command}")


if __name__ == "__main__":
    cli.run(main, PackConfig, UnpackConfig)
