"""The command line of the small tools: `key=value` pairs into a dataclass, as in `python sample.py top_k=50`.

Training itself is configured by Hydra (`config.py`), whose overrides look the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanodisp.errors import UserError

T = TypeVar("T")


def parse(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a `schema` (a dataclass) from key=value texts.

    Raises UserError for an unknown key, a wrong type, a missing or an impossible value.
    """
    known = [field.name for field in fields(cast(Any, schema))]
    config = OmegaConf.structured(schema)
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or key not in known:
            raise UserError(f"{argument!r} is not understood: give key=value, with one of the keys {', '.join(known)}")
        try:
            config[key] = None if text == "null" else text  # OmegaConf converts to the field's type
        except OmegaConfBaseException as error:
            raise UserError(f"{argument!r}: {first_line(error)}") from error
    try:
        return cast(T, OmegaConf.to_object(config))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.key or 'an argument'} is missing: give it as {error.key}=…") from error


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception) -> int:
    """Tell a user's mistake on stderr; the exit code to leave with."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
