"""key=value command lines: typed, and every mistake one line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nanodisp import cli as arguments
from nanodisp.errors import UserError


@dataclass
class Options:
    path: str = arguments.MISSING
    count: int = 3
    limit: int | None = 5
    share: float = 0.5
    loud: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count} must not be negative")


def test_values_get_the_fields_types_and_text_stays_as_it_is() -> None:
    options = arguments.parse(Options, ["path= a: [1] = ${x} ", "count=7", "limit=null", "share=1e-3", "loud=true"])
    assert options == Options(" a: [1] = ${x} ", 7, None, 1e-3, True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cuont=1", "path, count, limit, share, loud"),
        ("count", "give key=value"),
        ("count=x", "count=x"),
        ("count=1.5", "count=1.5"),
        ("count=-1", "count=-1 must not be negative"),
    ],
)
def test_a_mistake_is_one_line(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        arguments.parse(Options, ["path=x", argument])
    assert "\n" not in str(error.value)


def test_what_must_be_given_is_asked_for() -> None:
    with pytest.raises(UserError, match="path"):
        arguments.parse(Options, [])


def test_run_turns_a_users_mistake_into_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> None:
        raise UserError("no such thing")

    with pytest.raises(SystemExit) as exit:
        arguments.run(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"
