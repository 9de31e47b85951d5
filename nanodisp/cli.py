"""The command line of the small tools: `key=value` into a dataclass, as in `python sample.py top_k=50`.

Training itself is configured by Hydra (`launch.py`), with overrides of the same form. `--help` of both is made from the
docstrings of the dataclasses.
"""

from __future__ import annotations

import inspect
import io
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
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


def run(main: Callable[[Sequence[str]], None], *schemas: type) -> None:
    """Call `main` with the command line; a UserError becomes one line on stderr and exit code 2.

    `--help` prints the docstring of the program, and the keys of `schemas`.
    """
    try:
        show_any_text()
        if asks_for_help(sys.argv[1:]):
            print(*filter(None, (sys.modules["__main__"].__doc__, main.__doc__)), sep="\n")
            for schema in schemas:
                print("", *describe_keys(schema), sep="\n")
            return
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception) -> int:
    """Print an error on stderr; return the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def show_any_text() -> None:
    """Let standard output replace the characters that its encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


# --- help


def asks_for_help(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def describe_keys(schema: Any, prefix: str = "", values: dict[str, Any] | None = None) -> Iterator[str]:
    """What a dataclass's docstring says: its first line, then its keys with their defaults and descriptions.

    Args:
        schema: a dataclass.
        prefix: of the keys, such as "train.".
        values: defaults that differ from the dataclass's, by name.
    """
    defaults = {
        field.name: field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        for field in fields(schema)
    } | (values or {})
    yield (inspect.getdoc(schema) or "").partition("\n")[0]
    for names, text in descriptions(schema):
        head = "  " + " ".join(f"{prefix}{name}={as_typed(defaults[name])}" for name in names)
        lines = textwrap.wrap(text, 120, initial_indent=" " * 36, subsequent_indent=" " * 36)
        if len(head) < 36:
            lines[0] = head.ljust(36) + lines[0].lstrip()
        else:
            yield head
        yield from lines


def descriptions(schema: Any) -> list[tuple[list[str], str]]:
    """The entries "name: text" and "name, name: text" of a dataclass's docstring, for names of fields."""
    known = {field.name for field in fields(schema)}
    entries: list[tuple[list[str], str]] = []
    for line in (inspect.getdoc(schema) or "").splitlines():
        names, colon, text = line.partition(": ")
        if colon and known.issuperset(names.split(", ")):
            entries.append((names.split(", "), text))
        elif entries and line.strip():
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
    return entries


def as_typed(value: Any) -> str:
    """A default as one would type it; "…" for a required value."""
    special = {None: "null", True: "true", False: "false", MISSING: "…"}
    return special[value] if isinstance(value, (bool, str, NoneType)) and value in special else str(value)
