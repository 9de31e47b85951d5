"""Atomic writes, checksums, and numbers as JSON has them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanodisp.errors import UserError


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file atomically: it gets its name once it is complete and on disk, so a power cut leaves the old one.

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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free space or fix the permissions, then run the command again"
        ) from error


@contextlib.contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """Make a folder for the block's files; UserError, which asks for another, if it or they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        what = error.filename or folder
        raise UserError(f"{what} cannot be written: {error.strerror or error}; choose another with out=…") from error


def flush(path: Path) -> None:
    """fsync a file, or a folder after renaming files in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content; releases the GIL, so that threads run in parallel."""
    state = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def finite(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity: they become None, also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
