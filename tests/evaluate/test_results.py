"""The table that is printed of evaluated tasks."""

from __future__ import annotations

from typing import Any

import pytest

from nanodisp.evaluate.results import table


@pytest.mark.parametrize(("stderr", "printed"), [(0.04, "0.0250"), (None, "\N{EN DASH}")])
def test_the_error_of_a_mean_is_known_if_that_of_every_task_is(stderr: float | None, printed: str) -> None:
    def entry(value: float, error: float | None) -> dict[str, Any]:
        acc = {"value": value, "stderr": error, "higher_is_better": True}
        return {"metrics": {"acc": acc}, "shots": 0, "examples": 9}

    lines = table({"a": entry(0.4, 0.03), "b": entry(0.6, stderr)}).splitlines()
    assert lines[-1].split() == ["mean", "of", "2", "tasks", "0.5000", printed]
