"""The task `loss`: a run's own validation loss, and what rounding adds to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanodisp.errors import UserError
from nanodisp.evaluate import __main__ as evaluate
from nanodisp.runs.metrics import METRICS, read_records

Run = Callable[..., Path]


@pytest.fixture
def run_of_all_windows(run: Run) -> Path:
    return run("train.steps=30", "train.eval_windows=null", "train.sample_tokens=0")


def entry(folder: Path, name: str = "evaluation.json") -> dict[str, dict[str, float]]:
    return json.loads((folder / name).read_text())["tasks"]["loss"]


def value(found: dict[str, dict[str, float]], metric: str) -> float:
    return found["metrics"][metric]["value"]  # type: ignore[index, return-value]


def test_it_is_the_loss_that_the_run_recorded(run_of_all_windows: Path) -> None:
    evaluate.main([f"checkpoint={run_of_all_windows}", "tasks=loss", "limit=100000"])
    recorded = [r for r in read_records(run_of_all_windows / METRICS) if r["split"] == "val"][-1]
    found = entry(run_of_all_windows)
    assert value(found, "loss") == pytest.approx(recorded["loss"], abs=2e-4)
    assert value(found, "bpb") == pytest.approx(recorded["bpb"], abs=2e-4)
    assert len(found["layers"]["kurtosis"]) == len(recorded["mean_cosine"])


def test_rounding_to_fewer_bits_costs_more_and_goes_to_a_file_of_its_own(
    run_of_all_windows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of_all_windows
    for scheme in ("null", "int8", "w4a4"):
        evaluate.main([f"checkpoint={folder}", "tasks=loss", f"quantize={scheme}"])
    plain, int8, w4a4 = (entry(folder, f"evaluation{end}.json") for end in ("", "_int8", "_w4a4"))
    for found in (int8, w4a4):
        assert value(found, "loss before") == value(plain, "loss")
        assert value(found, "relative") == pytest.approx(value(found, "loss") / value(plain, "loss"))
        assert found["layers"]["before"]["kurtosis"] == plain["layers"]["kurtosis"]
    moved = [abs(value(found, "loss") - value(plain, "loss")) for found in (int8, w4a4)]
    assert 0 < moved[0] < moved[1] / 5
    content = json.loads((folder / "evaluation_w4a4.json").read_text())
    assert content["model"].endswith("at step 30 in w4a4")
    assert "relative" in capsys.readouterr().out


def test_a_model_without_data_of_its_own_and_an_unknown_scheme_are_refused(run_of_all_windows: Path) -> None:
    with pytest.raises(UserError, match="tasks=wikitext"):
        evaluate.main(["checkpoint=hf:gpt2", "tasks=loss"])
    with pytest.raises(UserError, match="quantize=int3 is unknown; choose one of int8, int4, w8a8, w4a4"):
        evaluate.main([f"checkpoint={run_of_all_windows}", "tasks=loss", "quantize=int3"])
