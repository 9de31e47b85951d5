"""A run as one file, to move it to another machine: a tar that begins with the sha256 of everything in it.

The run's folder is read with its lock held, so that no training changes it meanwhile. Unpacking believes nothing that
the file says: only plain files that its list names, each below the new folder, with their size and their sha256; the
folder gets its name once all of them are right and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nanodisp.config import CONFIG, RUN_NAME
from nanodisp.errors import InUse, UserError
from nanodisp.files import digest, flush
from nanodisp.runs.checkpoint import CHECKPOINTS
from nanodisp.runs.metrics import METRICS, take

LIST, VERSION, LONGEST_LIST = "packed.json", 1, 1 << 24
CHUNK = 1 << 22
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # how files of gzip, bzip2, xz and zstd begin


def pack(run: Path, to: Path) -> int:
    """Write the run's folder to a new file `to`; return the number of its files.

    Hidden files are left out, and the links that W&B makes to its newest run and its log.

    Raises:
        InUse: the run is in training.
        UserError: no run, a link in its folder, or a file that exists, is in the run's folder or cannot be written.
    """
    if not (run / CONFIG).is_file() and not (run / METRICS).is_file() and not (run / CHECKPOINTS).is_dir():
        raise UserError(f"{run} is no run's folder: it has neither {CONFIG} nor {METRICS} nor {CHECKPOINTS}/")
    if to.exists():
        raise UserError(f"to={to} exists: give another name, or delete it")
    if to.resolve().is_relative_to(run.resolve()):
        raise UserError(f"to={to} is in the run's folder {run}: give a file outside it")
    temporary = to.with_name(f".{to.name}.tmp")
    try:
        with locked(run):
            files = [path for path in sorted(run.rglob("*")) if not is_left_out(path, run)]
            if links := [path for path in files if path.is_symlink() or not (path.is_file() or path.is_dir())]:
                raise UserError(f"{links[0]} is a link or no plain file, and is not packed: replace it with the file")
            plain = [path for path in files if path.is_file()]
            entries = {
                path.relative_to(run).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
                for path in plain
            }
            about = json.dumps({"version": VERSION, "run": run.resolve().name, "files": entries}, indent=1).encode()
            try:
                with temporary.open("wb") as file, tarfile.open(None, "w", file, format=tarfile.PAX_FORMAT) as tar:
                    add(tar, LIST, len(about), io.BytesIO(about))
                    for name, entry in entries.items():
                        with (run / name).open("rb") as content:
                            add(tar, name, cast(int, entry["bytes"]), content)
                flush(temporary)
                temporary.rename(to)
                flush(to.parent)
            finally:  # also after Ctrl-C
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run} cannot be packed into {to}: {error}") from error
    return len(entries)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """The lock of a run's folder; none where its file system is read-only, so that nothing here trains into it."""
    try:
        lock = (run / ".lock").open("w")
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        yield
        return
    with lock:
        try:
            take(lock, run)
        except BlockingIOError:
            raise InUse(
                f"another process is training {run}, or packing it: wait for it, or end it (Ctrl-C saves), then pack"
            ) from None
        yield


def is_left_out(path: Path, run: Path) -> bool:
    """Whether a path in a run's folder is hidden, or a link from W&B's files to one of these."""
    name, wandb = path.relative_to(run), run / "wandb"
    is_link = path.is_symlink() and wandb in path.parents and path.resolve().is_relative_to(wandb.resolve())
    return is_link or any(part.startswith(".") for part in name.parts)


def add(tar: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, content)


def unpack(packed: Path, to: Path) -> Path:
    """Write the run in the file `packed` into the folder `to`; return the run's new folder.

    Raises UserError when the folder exists, and when anything in the file is not what its list says: then nothing is
    left behind.
    """
    temporary: Path | None = None
    missing: list[Path] = []
    try:
        missing = [folder for folder in (to, *to.parents) if not folder.exists()]
        with packed.open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise UserError(
                    f"{packed} is compressed: decompress it first (gunzip, unzstd, …), then unpack the .tar"
                )
        with tarfile.open(packed, "r:") as tar:
            about = read_list(tar, packed)
            folder = to / about["run"]
            if folder.exists() or folder.is_symlink():
                raise UserError(f"{folder} exists: give another to=, or move that run away")
            temporary = to / f".{about['run']}.unpacking"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            left = dict(about["files"])
            while member := tar.next():
                entry = left.pop(member.name, None)
                if entry is None or not member.isreg() or member.size != entry["bytes"]:
                    raise wrong(packed, f"{member.name!r} is not in its list, or twice, or no plain file of that size")
                write(tar, member, entry["sha256"], temporary / member.name, packed)
            if left:
                raise wrong(packed, f"{next(iter(left))} is missing")
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_dir():
                flush(path)
        temporary.rename(folder)
        flush(to)
    except (tarfile.TarError, EOFError) as error:
        raise wrong(packed, f"it is cut short, or no file that pack has written ({error})") from error
    except OSError as error:
        raise UserError(f"{packed} cannot be unpacked into {to}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for each in missing:
            with contextlib.suppress(OSError):  # not empty: the run is there
                each.rmdir()
    return folder


def read_list(tar: tarfile.TarFile, packed: Path) -> dict[str, Any]:
    """The list at the beginning, checked."""
    member = tar.next()
    content = tar.extractfile(member) if member and member.isreg() and member.name == LIST else None
    if member is None or content is None or member.size > LONGEST_LIST:
        raise wrong(packed, f"it does not begin with {LIST}; give a file that pack has written")
    try:
        about = json.loads(content.read())
        names = list(about["files"])
        fine = about["version"] == VERSION and RUN_NAME.fullmatch(about["run"]) and all(map(is_below, names))
        fine = fine and all(
            type(entry["bytes"]) is int and type(entry["sha256"]) is str for entry in about["files"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = None
    if not fine:
        raise wrong(packed, f"its {LIST} is damaged, or names files outside a run's folder")
    return about


def is_below(name: str) -> bool:
    """Whether a name of a tar's list is that of a file below the run's folder, in its only form."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "/".join(parts) == name
        and not any(part.startswith(".") or "\\" in part or "\0" in part for part in parts)
        and not name.startswith("/")
    )


def write(tar: tarfile.TarFile, member: tarfile.TarInfo, sha256: str, path: Path, packed: Path) -> None:
    content, found = tar.extractfile(member), hashlib.sha256()
    assert content is not None  # a plain file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        while chunk := content.read(CHUNK):
            found.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if found.hexdigest() != sha256:
        raise wrong(packed, f"the sha256 of {member.name} is not the one in its list")


def wrong(packed: Path, what: str) -> UserError:
    return UserError(f"{packed}: {what}; nothing was unpacked: copy the file again")
