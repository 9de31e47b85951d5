"""Errors that the user can fix."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class UserError(Exception):
    """An error that the user can fix, in one line: the wrong value, what is allowed, what to do.

    The commands print it without a traceback and end with `exit_code`; any other exception is a bug and shows one.
    """

    exit_code = 2


class AlreadyReported(UserError):
    """An error that another rank prints."""


class RankLost(UserError):
    """Another rank hangs, or it, its host or its network is gone: no mistake, the same command may well succeed."""

    exit_code = 74  # EX_IOERR of sysexits.h


class InUse(UserError):
    """Another process is training the same run."""


def optional(package: str, extra: str = "eval") -> Any:
    """Import an optional package; raises UserError with the command that installs its extra if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this needs {package}: pip install 'nanodisp[{extra}]'") from error


def to_stderr(line: str) -> None:
    """Print a line in one write: without a buffer, print's two would mix the lines of several ranks."""
    print(f"{line}\n", end="", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The type and message of a foreign error on one line, cut to 200 characters."""
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
