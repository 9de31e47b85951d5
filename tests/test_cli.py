"""key=value command lines: typed, and every mistake is reported in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from nanodisp import cli
from nanodisp.errors import UserError


@dataclass
class Options:
    path: str = cli.MISSING
    count: int = 3
    limit: int | None = 5
    share: float = 0.5
    loud: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count} must not be negative")


def test_values_have_the_types_of_the_fields_and_text_is_literal() -> None:
    options = cli.parse(Options, ["path= a: [1] = ${x} ", "count=7", "limit=null", "share=1e-3", "loud=true"])
    assert options == Options(" a: [1] = ${x} ", 7, None, 1e-3, True)


def test_null_is_text_where_a_value_is_required() -> None:
    assert cli.parse(Options, ["path=null"]).path == "null"
    with pytest.raises(UserError, match="'null' is not of type int"):
        cli.parse(Options, ["path=x", "count=null"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cuont=1", "path, count, limit, share, loud"),
        ("count", "give key=value"),
        ("count=x", "'count=x': 'x' is not of type int"),
        ("count=1.5", "'1.5' is not of type int"),
        ("loud=True", "'True' is not of type bool"),
        ("count=-1", "count=-1 must not be negative"),
    ],
)
def test_a_mistake_is_reported_in_one_line(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.parse(Options, ["path=x", argument])
    assert "\n" not in str(error.value)


def test_a_required_value_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"path is required: give path=…"):
        cli.parse(Options, [])


def exit_code(error: BaseException) -> object:
    def main(argv: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    return exit.value.code


def test_run_reports_a_users_mistake_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(UserError("no such thing")) == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")


def test_run_ends_quietly_when_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_run_passes_the_command_line_and_does_not_hide_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "a=1", "b=2"])
    given: list[str] = []
    cli.run(given.extend)
    assert given == ["a=1", "b=2"]
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 / 0)
