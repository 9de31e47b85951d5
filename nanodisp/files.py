"""Files that appear complete or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nanodisp.errors import UserError


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file under its name only when it is complete and on disk, so that a power cut leaves the old one.

    Raises UserError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free space or fix the permissions, then run the command again"
        ) from error


def flush(path: Path) -> None:
    """fsync a file, or a folder after files in it were renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content; other threads run meanwhile."""
    state = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()
