"""Benchmarks at the validations of a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # before their packages are imported

import forked
import pytest
from conftest import TINY, compose, records, weights
from tiny_models import write_benchmarks

from nanodisp.data import shards
from nanodisp.errors import UserError
from nanodisp.evaluate import __main__ as evaluate

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def benchmarks(data: Path, *names: str) -> tuple[str, ...]:
    return (f"train.eval_tasks=[{','.join(names)}]", f"train.eval_task_data={data}")


def test_the_figures_of_a_run_are_those_of_the_command(run: Callable[..., Path], data: Path) -> None:
    settings = benchmarks(data, "blimp", "hellaswag", "wikitext")
    folder = run("train.steps=4", "train.eval_interval=2", *settings, "train.eval_task_limit=7", name="with")
    lines = records(folder, "task")
    assert [line["step"] for line in lines] == [0, 2, 4]
    names = "blimp,hellaswag,wikitext"
    evaluate.main([f"checkpoint={folder}", f"tasks={names}", f"task_data={data}", "limit=7", "device=cpu"])
    found = json.loads((folder / "evaluation.json").read_text())["tasks"]
    expected = {f"{task}/{name}": metric["value"] for task in found for name, metric in found[task]["metrics"].items()}
    got = {key: value for key, value in lines[-1].items() if "/" in key}
    assert got == pytest.approx(expected, rel=1e-5)
    assert {"blimp/acc", "blimp/acc_syntax", "hellaswag/acc_norm", "wikitext/bits_per_byte"} <= set(got)


def test_they_do_not_change_what_is_trained(run: Callable[..., Path], data: Path) -> None:
    dropout = ("train.steps=4", "train.eval_interval=2", "model.dropout=0.2")
    one, other = run(*dropout, name="without"), run(*dropout, *benchmarks(data, "piqa", "lambada"), name="with")
    assert all((tensor == weights(other)[name]).all() for name, tensor in weights(one).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.eval_tasks=[blinp]", "train.eval_task_data=x"),
            "train.eval_tasks: blinp is unknown; did you mean blimp",
        ),
        (("train.eval_tasks=[blimp]",), "train.eval_tasks needs train.eval_task_data=<folder of its files>"),
        (("train.eval_task_limit=0",), "train.eval_task_limit=0 must be positive, or null"),
        (("train.eval_tasks=[blimp]", "train.eval_task_data=x", "model=nano_encoder"), "eval_tasks need a model that"),
    ],
)
def test_a_wrong_name_is_reported_by_the_configuration(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(*overrides)


def test_a_missing_file_is_reported_before_the_data_is_prepared(
    run: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no blimp\.jsonl, which blimp needs"):
        run(*benchmarks(tmp_path, "blimp"), "data.path=nowhere", "dry_run=true")


def test_the_harness_is_needed_only_with_such_tasks(
    run: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run("train.steps=1")
    with pytest.raises(UserError, match=r"this needs lm_eval: pip install 'nanodisp\[eval\]'"):
        run(*benchmarks(data, "blimp"), "dry_run=true", name="other")


def test_a_run_without_its_tokenizer_is_rejected(
    run: Callable[..., Path], data: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    for file in corpus.glob("*.bin"):
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((corpus / shards.MANIFEST).read_text())
    (folder / shards.MANIFEST).write_text(json.dumps({**manifest, "tokenizer": "none"}))
    with pytest.raises(UserError, match=r"train\.eval_tasks needs the tokenizer of the run's tokens"):
        run(*benchmarks(data, "blimp"), f"data.path={folder}", "dry_run=true")


def test_two_ranks_share_the_texts(corpus: Path, data: Path, tmp_path: Path) -> None:
    settings = [
        *TINY,
        f"data.path={corpus}",
        f"out_dir={tmp_path}",
        "train.steps=1",
        *benchmarks(data, "blimp", "piqa"),
    ]
    found = []
    for ranks in (1, 2):
        done = forked.train(*settings, f"run_name=r{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        line = records(tmp_path / f"r{ranks}", "task")[-1]
        found.append({key: value for key, value in line.items() if "/" in key})
    assert found[0] == found[1]
    assert 0 < found[0]["blimp/acc"] < 1
