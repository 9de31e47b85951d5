"""The command line of the small tools: `key=value` into a dataclass, as in `python sample.py top_k=50`.

Training itself is configured by Hydra (`launch.py`), with overrides of the same form. `--help` of both is made from the
docstrings of the dataclasses.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar, cast, get_args, get_type_hints

from nanodisp.errors import UserError, to_stderr

T = TypeVar("T")
MISSING = "???"  # the default of a required field, as in OmegaConf
NoneType = type(None)


def parse(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a `schema` (a dataclass) from key=value strings.

    A field is a str (taken literally), an int, a float, a bool (true, false), or one of these
    or None (null). A field whose default is `MISSING` is required. Text is empty only where that is its default.

    Raises UserError for an unknown key, one given twice, a wrong type, a missing or an invalid value.
    """
    types = get_type_hints(schema)
    known = {field.name: field.default for field in fields(cast(Any, schema))}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or key not in known:
            raise UserError(f"{argument!r} is not valid: give key=value, with one of the keys {', '.join(known)}")
        if key in values:
            raise UserError(f"{key} is given twice: {', '.join(a for a in arguments if a.startswith(f'{key}='))}")
        values[key] = _convert(argument, text, types[key])
        if values[key] == "" != known[key]:
            raise UserError(f"{key}= is empty: give a value" + (", or leave it out" if known[key] != MISSING else ""))
    missing = [key for key, default in known.items() if default == MISSING and key not in values]
    if missing:
        raise UserError(f"{missing[0]} is required: give {missing[0]}=…")
    try:
        return schema(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


LEAVE = "leave it out"


class Unused(NamedTuple):
    """`keys` have no effect while the value of `decider` passes `when`; `advice` says what to do about it."""

    keys: tuple[str, ...]
    decider: str
    when: Callable[[Any], bool]
    advice: str


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def no(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def split_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are names, such as folders, and those that are key=value.

    A folder's name may hold "=" if something with a "/" comes before it.
    """
    names = [each for each in arguments if "=" not in each or "/" in each.partition("=")[0]]
    return names, [each for each in arguments if each not in names]


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

    def show_help() -> None:
        print(*filter(None, (sys.modules["__main__"].__doc__, main.__doc__)), sep="\n")
        for schema in schemas:
            print("", *describe_keys(schema), sep="\n")

    attempt(show_help if asks_for_help(sys.argv[1:]) else lambda: main(sys.argv[1:]))


def attempt(action: Callable[[], None]) -> None:
    """Call `action`, which prints its results; what ends it early becomes at most one line and an exit code."""
    try:
        guard_output()
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        pass
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception) -> int:
    """Print an error on stderr; return the exit code."""
    with contextlib.suppress(OSError):  # a full disk: there is no place left to report it
        to_stderr(f"error: {error}")
    return error.exit_code if isinstance(error, UserError) else 2


class Output:
    """Standard output that may fail: on a full disk, or when its reader has gone.

    Nothing more is written to it then. With `consequence`, which stderr gets as part of one line, the program
    continues; without it, BrokenPipeError is raised if the reader has gone, else UserError.
    """

    def __init__(self, stream: TextIO, consequence: str | None) -> None:
        self.stream, self.consequence = stream, consequence

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or 0

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., Any], *text: str) -> Any:
        try:
            return action(*text)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # also for what is buffered
            line = f"standard output cannot be written: {error.strerror}"
            if self.consequence is not None:
                with contextlib.suppress(OSError):
                    to_stderr(f"{line}; {self.consequence}")
            elif isinstance(error, BrokenPipeError):
                raise
            else:
                raise UserError(line) from error


def guard_output(consequence: str | None = None) -> None:
    """Let standard output replace the characters that its encoding lacks, and fail as `Output` does."""
    if sys.stdout is None:  # closed by the shell, with >&-
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
        sys.stdout = cast(TextIO, Output(sys.stdout, consequence))


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
