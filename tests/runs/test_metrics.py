"""Records: valid JSON lines, in order, once each; and the tools that read them."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import records

from nanodisp.config import WandbConfig
from nanodisp.errors import UserError
from nanodisp.runs.metrics import Metrics, describe, drop_records_after

Run = Callable[..., Path]
INTERRUPTED = ("train.steps=4", "train.checkpoint_interval=2", "train.log_interval=1", "train.eval_interval=2")


def metrics(folder: Path | None, step: int = -1) -> Metrics:
    """Open metrics of a run that resumes from `step`."""
    opened = Metrics(folder)
    opened.begin(config={}, wandb_config=WandbConfig(), step=step, total_steps=9)
    return opened


def test_a_record_is_a_line_of_json_without_nan(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        m.record({"step": 1, "split": "train", "loss": math.nan, "lr": 0.5, "mfu": None})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # written at once, not at the end
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "split": "train", "loss": None, "lr": 0.5, "mfu": None}
    ]


def test_lines_of_training_say_how_long_the_run_will_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute a step, of nine. Not on the first line, whose step is slow, nor on the last."""
    with metrics(tmp_path) as m:
        for step in (1, 3, 6, 9):
            monkeypatch.setattr(time, "perf_counter", lambda step=step: 30.0 * step)
            m.record({"step": step, "split": "train", "loss": 1.0})
            m.record({"step": step, "split": "val", "loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("1.0000")[2] for line in lines] == [
        "",
        "",
        "  0:03:00 left",
        "",
        "  0:01:30 left",
        "",
        "",
        "",
    ]


def test_resuming_drops_records_that_will_be_written_again(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        for step in range(5):
            m.record({"step": step, "split": "val", "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "sp')
    with metrics(tmp_path, step=2) as m:
        m.record({"step": 3, "split": "val", "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    drop_records_after(tmp_path / "metrics.jsonl", -1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_ranks_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(None) as m:
        m.say("hello")
        m.record({"step": 1, "split": "train", "loss": 1.0})
        m.advance(1)
    assert capsys.readouterr().out == ""


def test_the_line_of_a_record_leaves_out_nulls() -> None:
    line = describe({"step": 20, "split": "val", "loss": 1.23456, "bpb": None, "mean_cosine": [0.1, 0.25]}, 1000)
    assert line == "step   20/1000  val    loss 1.2346  mean cosine by layer 0.10 0.25"


def test_another_wandb_mode_is_rejected() -> None:
    with pytest.raises(ValueError, match="disabled, offline, online"):
        WandbConfig(mode="yes")


def test_the_error_that_ended_a_run_is_in_its_folder_until_the_next_attempt(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), metrics(tmp_path):
        raise RuntimeError("out of memory")
    assert (tmp_path / "error.txt").read_text().splitlines()[-1] == "RuntimeError: out of memory"
    with pytest.raises(KeyboardInterrupt), metrics(tmp_path):
        raise KeyboardInterrupt  # a run that is stopped has not failed
    assert not (tmp_path / "error.txt").exists()


# --- other readers --------------------------------------------------------------------------


def resumed(run: Run, *settings: str) -> Path:
    """The folder of a run that was killed after its last figures, before the checkpoint, and resumed."""
    folder = run(*INTERRUPTED, *settings)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    return run(*INTERRUPTED, *settings)


def test_pandas_reads_the_records_as_a_table(run: Run) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.read_json(run(*INTERRUPTED) / "metrics.jsonl", lines=True)
    integers, real = (
        ("step", "tokens"),
        ("loss", "lr", "grad_norm", "dispersion", "tokens_per_second", "seconds", "bpb"),
    )
    assert {str(table[key].dtype) for key in integers} == {"int64"}
    assert {str(table[key].dtype) for key in real} == {"float64"}
    train, val = (table[table.split == split] for split in ("train", "val"))
    assert train.step.tolist() == [1, 2, 3, 4] and train.tokens.tolist() == [64, 128, 192, 256]
    assert train[["loss", "lr", "grad_norm"]].notna().all(axis=None) and val.bpb.notna().all()
    assert pandas.DataFrame(val.mean_cosine.tolist()).shape == (3, 3)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log of W&B's own messages.

    7 bytes, then blocks of 32 KiB, in which a piece of a record is checksum, length, kind (1 full, 4 last) and bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, collected = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position < len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        collected += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(collected)
            collected = b""


@pytest.mark.slow
def test_wandb_syncs_a_resumed_offline_run_as_one_run_without_repeated_steps(run: Run) -> None:
    pytest.importorskip("wandb")
    folder = resumed(run, "wandb.mode=offline", "wandb.tags=[a,b]", "seed=7")
    run_id = (folder / "wandb" / "id").read_text()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert result.returncode == 0 and "Would sync 2 run(s)" in result.stdout + result.stderr

    found = [record for file in files for record in wandb_records(file)]
    starts = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {(start.run_id, start.display_name, start.project, *start.tags) for start in starts} == {
        (run_id, "run", "nanodisp", "a", "b")
    }
    logged_config = {item.key: json.loads(item.value_json) for item in starts[0].config.update}
    assert logged_config["seed"] == 7 and logged_config["train"]["steps"] == 4

    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    for split in ("train", "val"):
        logged = [(row["step"], row[f"{split}/loss"]) for row in rows if f"{split}/loss" in row]
        assert logged == [(record["step"], record["loss"]) for record in records(folder, split)]
    summary = {"/".join(i.nested_key) or i.key: i.value_json for r in found for i in r.summary.update}
    assert json.loads(summary["val/loss"]) == records(folder, "val")[-1]["loss"]
    assert json.loads(summary["step"]) == 4


def test_tensorboard_has_every_figure_of_a_resumed_run_once(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = resumed(run, "tensorboard=true")
    written = sorted((folder / "tensorboard").iterdir())
    run(*INTERRUPTED, "tensorboard=true")  # complete: adds nothing
    assert sorted((folder / "tensorboard").iterdir()) == written and len(written) == 2
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for split in ("train", "val"):
        wanted = [(record["step"], pytest.approx(record["loss"])) for record in records(folder, split)]
        assert [(event.step, event.value) for event in events.Scalars(f"{split}/loss")] == wanted
    layers = [events.Scalars(f"val/mean_cosine/layer_{layer:02d}")[-1].value for layer in range(3)]
    assert layers == pytest.approx(records(folder, "val")[-1]["mean_cosine"])


def test_tensorboard_is_on_disk_when_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *call: (time.sleep(0.05), write(*call)))  # a thread that lags
    m = Metrics(tmp_path)
    m.begin(config={}, wandb_config=WandbConfig(), step=-1, total_steps=9, tensorboard=True)
    for step in range(3):
        m.record({"step": step, "split": "val", "loss": 1.0})
    m.flush()
    flushed = [file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()]
    m.close()
    assert [file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()] == flushed


@pytest.mark.parametrize("broken", ["__init__", "add_scalar", "flush", "close"])
def test_a_failure_of_tensorboard_does_not_stop_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils import tensorboard

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, broken, full)
    folder = run(*INTERRUPTED, "tensorboard=true")
    assert len(records(folder, "train")) == 4
    assert Counter(capsys.readouterr().out.split())["TensorBoard"] == 1


def test_a_missing_tensorboard_is_reported_before_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"needs tensorboard: pip install 'nanodisp\[tensorboard\]'"):
        run(*INTERRUPTED, "tensorboard=true")
    run(*INTERRUPTED)
