"""The command line of the small tools: `key=value` into a dataclass, as in `python sample.py top_k=50`.

Training itself is configured by Hydra (`launch.py`), with overrides of the same form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast, get_args, get_type_hints

from nanodisp.errors import UserError

T = TypeVar("T")
MISSING = "???"  # the default of a required field, as in OmegaConf
NoneType = type(None)


def parse(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a `schema` (a dataclass) from key=value strings.

    A field is a str (taken literally), an int, a float, a bool (true, false), or one of these
    or None (null). A field whose default is `MISSING` is required.

    Raises UserError for an unknown key, a wrong type, a missing or an invalid value.
    """
    types = get_type_hints(schema)
    known = [field.name for field in fields(cast(Any, schema))]
    values = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or key not in known:
            raise UserError(f"{argument!r} is not valid: give key=value, with one of the keys {', '.join(known)}")
        values[key] = _convert(argument, text, types[key])
    missing = [f.name for f in fields(cast(Any, schema)) if f.default == MISSING and f.name not in values]
    if missing:
        raise UserError(f"{missing[0]} is required: give {missing[0]}=…")
    try:
        return schema(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _convert(argument: str, text: str, wanted: Any) -> Any:
    kinds = get_args(wanted) or (wanted,)
    if NoneType in kinds and text == "null":
        return None
    kind = kinds[0]
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{argument!r}: {text!r} is not of type {kind.__name__}") from error


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line; a UserError becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception) -> int:
    """Print an error on stderr; return the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2
