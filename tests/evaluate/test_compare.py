"""The comparison of two evaluated runs, on items whose differences are known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nanodisp.errors import UserError
from nanodisp.evaluate.compare import compare
from nanodisp.evaluate.results import save, save_items
from nanodisp.runs.evaluation import evaluation_of_step, items_file, quantized, rename_earlier

SETTINGS = {"limit": None, "seed": 1, "num_fewshot": 0, "data": "d"}


def write(run: Path, by_step: dict[int, dict[str, np.ndarray]], **settings: int) -> Path:
    """A run's evaluations: the items of each task, by step."""
    for step, tasks in by_step.items():
        file = run / evaluation_of_step(step, max(by_step))
        entries = {}
        for task, items in tasks.items():
            metric = {"value": float(items.mean()), "stderr": 0.0, "higher_is_better": True}
            entry = {"metrics": {"acc": metric}, "shots": 0, "examples": len(items), "settings": SETTINGS | settings}
            entries[task] = entry
        save_items(file, {task: {"acc": items} for task, items in tasks.items()})
        save(file, {"model": f"{run.name} at step {step}", "harness": "0", "tasks": entries})
    return run


def answers(share: float, n: int = 1000, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).permutation(n) < share * n).astype(np.float32)


def numbers(text: str, line: str) -> list[float]:
    (found,) = [each for each in text.splitlines() if each.startswith(line)]
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", found)]


def test_a_paired_difference_has_a_narrower_interval_than_an_unpaired_one(tmp_path: Path) -> None:
    base = answers(0.5)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1
    a = write(tmp_path / "a", {7: {"one": base}})
    paired, unpaired = (
        numbers(compare([str(a), str(write(tmp_path / name, {7: {"one": items}}))]), "one")
        for name, items in (("paired", better), ("unpaired", answers(0.52, seed=1)))
    )
    assert paired[:3] == unpaired[:3] == [0.5, 0.52, 0.02]
    error = 1.96 * np.sqrt(0.02 * 0.98 / 1000)  # of the mean of 20 ones among 1,000
    assert paired[3:] == pytest.approx([0.02 - error, 0.02 + error], abs=0.002)
    error = 1.96 * np.sqrt(2 * 0.25 / 1000)
    assert unpaired[3:] == pytest.approx([0.02 - error, 0.02 + error], abs=0.006)


def test_the_mean_over_tasks_weighs_tasks_not_items(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {7: {"small": answers(0.2, 100), "large": answers(0.5)}})
    b = write(tmp_path / "b", {7: {"small": answers(0.4, 100), "large": answers(0.5)}})
    text = compare([str(a), str(b)])
    assert numbers(text, "mean of 2 tasks")[:3] == [0.35, 0.45, 0.1]
    assert numbers(text, "small")[2] == 0.2
    assert "best checkpoints" not in text


def test_the_best_checkpoints_are_chosen_by_the_mean_of_each_run(tmp_path: Path) -> None:
    a = write(
        tmp_path / "a", {step: {"x": answers(s), "y": answers(0.3)} for step, s in ((1, 0.2), (2, 0.6), (3, 0.4))}
    )
    b = write(
        tmp_path / "b", {step: {"x": answers(s), "y": answers(0.3)} for step, s in ((1, 0.2), (2, 0.3), (3, 0.5))}
    )
    text = compare([str(a), str(b)])
    last, best = text.split("best checkpoints")
    assert numbers(last, "mean of 2 tasks")[:3] == [0.35, 0.4, 0.05]
    assert numbers(best, "mean of 2 tasks")[:3] == [0.45, 0.4, -0.05]
    assert "a: best at step 2 of 3 checkpoints; choosing the best adds 0.1000 to the last" in text
    assert "b: best at step 3 of 3 checkpoints; choosing the best adds 0.0000 to the last" in text


def test_the_best_of_equals_is_chosen_again_in_every_resample(tmp_path: Path) -> None:
    """Of five checkpoints that do not differ, the best is above their mean, and its interval knows."""
    five = {step: {"x": answers(0.5, seed=step)} for step in range(1, 6)}
    one = {5: five[5]}
    text = compare([str(write(tmp_path / "one", one)), str(write(tmp_path / "five", five))])
    low, high = numbers(text.split("best checkpoints")[1], "mean of 1 tasks")[3:]
    assert low > -0.005 and high > 0.03, "the maximum of five resampled means is rarely below one of them"


def test_what_not_all_checkpoints_have_is_left_out_and_named_and_rounded_models_are_others(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {1: {"x": answers(0.4)}, 2: {"x": answers(0.4), "y": answers(0.4)}})
    b = write(tmp_path / "b", {2: {"x": answers(0.5), "y": answers(0.5)}})
    text = compare([str(a), str(b)])
    assert "left out, because not all of these checkpoints have it: y" in text
    (b / "evaluation_items.npz").rename(b / "evaluation_step_00000001_int8_items.npz")
    (b / "evaluation.json").rename(b / "evaluation_step_00000001_int8.json")
    with pytest.raises(UserError, match="b has no evaluation with items"):
        compare([str(a), str(b)])


def test_the_same_call_prints_the_same(tmp_path: Path) -> None:
    a, b = (str(write(tmp_path / name, {7: {"x": answers(0.5, seed=i)}})) for i, name in enumerate("ab"))
    assert compare([a, b]) == compare([a, b])


def test_mistakes_are_reported_in_one_line(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {7: {"x": answers(0.5)}})
    limited = write(tmp_path / "limited", {7: {"x": answers(0.5, 500)}}, limit=500)
    other = write(tmp_path / "other", {7: {"y": answers(0.5)}})
    without = write(tmp_path / "without", {7: {"x": answers(0.5)}})
    (without / "evaluation_items.npz").unlink()
    damaged = write(tmp_path / "damaged", {7: {"x": answers(0.5)}})
    (damaged / "evaluation_items.npz").write_bytes(b"PK")
    for arguments, message in (
        ([a], "compare needs two evaluated runs"),
        ([a, limited], "x is not of the same items: 1,000 with .* and 500 with .*'limit': 500"),
        ([a, other], "have no task in common"),
        ([a, without], "without has no evaluation with items: run python -m nanodisp.evaluate"),
        ([a, damaged], "evaluation_items.npz is not what nanodisp.evaluate writes"),
        ([a, tmp_path / "nowhere"], "nowhere has no evaluation"),
    ):
        with pytest.raises(UserError, match=message) as error:
            compare([str(argument) for argument in arguments])
        assert "\n" not in str(error.value)


def test_a_tokenizer_or_version_makes_other_items_only_with_examples(tmp_path: Path) -> None:
    items = {3: {"a": answers(0.5)}}
    new = {"tokenizer": "t", "version": 2}
    compare([str(write(tmp_path / "old", items)), str(write(tmp_path / "new", items, **new))])  # type: ignore[arg-type]
    few = [write(tmp_path / "old_5", items, num_fewshot=5), write(tmp_path / "new_5", items, num_fewshot=5, version=2)]
    with pytest.raises(UserError, match=r"'version': None\} and .*'version': 2\}"):
        compare([str(run) for run in few])


def test_a_step_without_any_task_of_the_last_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", {3: {"b": answers(0.4)}, 5: {"a": answers(0.5)}})
    other = write(tmp_path / "other", {5: {"a": answers(0.6)}})
    assert "best checkpoints" not in compare([str(one), str(other)])
    assert "left out, without any task of step 5: step 3" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_figures_of_an_earlier_step_get_its_name_and_replace_none(tmp_path: Path, quantize: str | None) -> None:
    file = tmp_path / quantized("evaluation.json", quantize)
    of_step = tmp_path / quantized("evaluation_step_00000003.json", quantize)

    def write_evaluation() -> str:
        save_items(file, {"a": {"acc": answers(0.5)}})
        save(file, {"model": "run at step 3" + f" in {quantize}" * (quantize is not None), "harness": "0", "tasks": {}})
        return file.read_text()

    content = write_evaluation()
    rename_earlier(tmp_path, 3, quantize)
    assert file.exists(), "it is the newest"
    rename_earlier(tmp_path, 5, quantize)
    assert (of_step.read_text(), file.exists()) == (content, False)
    assert items_file(of_step).exists() and not items_file(file).exists()
    of_step.write_text("kept")
    write_evaluation()
    rename_earlier(tmp_path, 5, quantize)
    assert (of_step.read_text(), file.exists()) == ("kept", True)
