"""The error that a user can mend."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(Exception):
    """A mistake of the user's, told in one line: what was wrong, what is allowed, what to do.

    The entry points print it without a traceback; anything else is a bug of ours and shows one.
    """


def optional(package: str, extra: str = "eval") -> Any:
    """A package that not everybody needs; UserError, naming the extra that has it, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this needs {package}: pip install 'nanodisp[{extra}]'") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
