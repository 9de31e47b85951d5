"""Errors that the user can fix."""

from __future__ import annotations

import pytest

from nanodisp.errors import UserError, first_line, one_line, optional


def test_an_optional_package_is_imported_or_named_with_its_extra() -> None:
    assert optional("json").loads("[1]") == [1]
    with pytest.raises(UserError, match=r"needs no_such_package: pip install 'nanodisp\[eval\]'"):
        optional("no_such_package")
    with pytest.raises(UserError, match=r"pip install 'nanodisp\[data\]'"):
        optional("no_such_package", extra="data")


def test_an_error_has_one_line() -> None:
    assert first_line(ValueError("\n wrong value \n in two lines")) == "wrong value "
    assert first_line(TimeoutError()) == "TimeoutError"


def test_a_foreign_error_is_one_line_of_200_characters_at_most() -> None:
    assert one_line(ValueError("first\n  second")) == "ValueError first second"
    assert one_line(ValueError("x" * 300)) == f"ValueError {'x' * 189}"
