"""Many runs from one command: `python train.py -m …`."""

from __future__ import annotations

import csv
import re
import subprocess
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT, TINY, command

from nanodisp.report import __main__ as report
from nanodisp.runs import checkpoint
from nanodisp.runs.read import read_run, read_runs

pytestmark = pytest.mark.slow


def test_a_sweep_runs_every_valid_job_and_reports_each_other_in_one_line(corpus: Path, tmp_path: Path) -> None:
    result = command("-m", *TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "train.steps=2", "model.n_head=2,3,4")
    assert result.returncode == 2
    errors = result.stderr.strip().splitlines()
    assert len(errors) == 1
    assert "model.n_head=3" in errors[0]
    assert "n_embd=16 is not divisible" in errors[0]
    runs = list(tmp_path.glob("nano-*"))
    assert len(runs) == 2
    assert all(checkpoint.find(folder).name == "step_00000002" for folder in runs)


def test_an_error_on_one_rank_ends_a_sweep_on_all(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x").touch()  # only rank 0 writes into the run's folder, here a file
    settings = ("-m", *TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=x", "train.steps=2", "seed=1,2")
    ranks = forked.finish(forked.start_ranks(2, ROOT / "train.py", *settings))
    assert all(rank.returncode for rank in ranks), ranks
    assert "cannot be written" in ranks[0].stderr


def test_the_baseline_of_a_sweep_is_trained_once(corpus: Path, tmp_path: Path) -> None:
    settings = (f"data.path={corpus}", f"out_dir={tmp_path}", "train.steps=2", "train.sample_tokens=0")
    choices = ("dispersion=off,angular,cosine", "dispersion.lambda_disp=0.1,0")
    result = forked.train(*(each for each in TINY if "max_tokens" not in each), *settings, "-m", *choices)
    assert result.returncode == 0, result.stderr
    names = sorted("-".join(folder.name.split("-")[:3]) for folder in tmp_path.iterdir() if folder.is_dir())
    assert names == ["nano-shards-angular0.1", "nano-shards-cosine0.1", "nano-shards-off"]
    assert "dispersion.lambda_disp=0.1: runs without dispersion.lambda_disp=0.1, which has no effect" in result.stdout
    skipped = [line for line in result.stdout.splitlines() if "skipped, the same run as" in line]
    first = "skipped, the same run as dispersion=off dispersion.lambda_disp=0.1"
    assert skipped == [
        f"dispersion={variant} dispersion.lambda_disp=0: {first}" for variant in ("off", "angular", "cosine")
    ]
    (baseline,) = tmp_path.glob("*-off-*")
    assert "lambda_disp=0.1" not in str(read_run(baseline).config["command"]), "it would be an error for one run"


def test_jobs_that_fail_their_check_count_as_failed_until_they_succeed(corpus: Path, tmp_path: Path) -> None:
    def sweep(path: Path) -> subprocess.CompletedProcess[str]:
        settings = (f"data.path={path}", f"out_dir={tmp_path / 'out'}", "train.steps=1", "train.sample_tokens=0")
        return forked.train("-m", *TINY, *settings, "model.n_head=2,3")

    link = tmp_path / "corpus"
    assert sweep(link).returncode == 2
    assert {run.status for run in read_runs(tmp_path / "out")} == {"failed"}
    assert len(read_runs(tmp_path / "out")) == 2, "one for its configuration, one for its missing data"
    link.symlink_to(corpus)
    assert sweep(link).returncode == 2
    failed, finished = sorted(read_runs(tmp_path / "out"), key=lambda run: run.status)
    assert (failed.status, finished.status) == ("failed", "finished")
    assert failed.problem.startswith("model.n_head=3: model.n_embd=16 is not divisible by model.n_head=3")


def test_a_dry_run_prints_the_size_of_every_job_and_writes_no_run(corpus: Path, tmp_path: Path) -> None:
    settings = (f"data.path={corpus}", f"out_dir={tmp_path / 'out'}", "train.tokens=6400", "dry_run=true")
    result = forked.train("-m", *TINY, *settings, "dispersion.lambda_disp=0,0.1")
    assert result.returncode == 0, result.stderr
    *lines, total = result.stdout.splitlines()
    assert len(lines) == 2
    assert re.match(r"2 runs, 0 done already: about \d:\d\d:\d\d", total)
    size = r"10,960 parameters, 100 steps, 6,400 tokens, about \d:\d\d:\d\d"
    assert all(re.search(size, line) for line in lines)
    left = [path.name for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert left in ([], ["multirun.yaml"]), "Hydra's own record of the sweep, and no run"


def test_a_dry_run_says_what_is_done_already(corpus: Path, tmp_path: Path) -> None:
    settings = (*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "train.steps=4", "train.sample_tokens=0")
    assert forked.train(*settings, "seed=1").returncode == 0
    result = forked.train(*settings, "seed=1,2", "-m", "dry_run=true")
    one, two, total = result.stdout.splitlines()
    assert one.endswith("256 tokens, done already")
    assert "done" not in two
    assert total.startswith("2 runs, 1 done already: about ")


def test_parallel_jobs_fail_and_finish_like_sequential_ones(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    settings = (f"data.path={corpus}", f"out_dir={tmp_path}", "train.steps=2", "hydra/launcher=local")
    result = command("-m", *TINY, *settings, "model.n_head=2,2,3")
    assert result.returncode == 2
    assert "skipped, another process is training" in result.stdout or "the run is complete" in result.stdout
    assert result.stderr.startswith("error: model.n_head=3: model.n_embd=16 is not divisible by model.n_head=3")
    assert result.stderr.count("\n") == 1
    assert len(list(tmp_path.glob("*/checkpoints/step_00000002"))) == 1


def test_parallel_dry_runs_have_a_total(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    settings = (f"data.path={corpus}", f"out_dir={tmp_path}", "train.steps=2", "hydra/launcher=local", "dry_run=true")
    result = command("-m", *TINY, *settings, "seed=1,1,2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("2 runs, 0 done already: about 0:00:0")


@pytest.mark.usefixtures("no_figures")
def test_a_killed_and_resumed_sweep_has_the_table_of_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    def sweep(folder: Path) -> list[str]:
        settings = (f"data.path={corpus}", f"out_dir={folder}", "train.steps=40", "train.checkpoint_interval=10")
        return ["-m", *TINY, *settings, "dispersion.lambda_disp=0,0.5,1"]

    def table(folder: Path) -> list[dict[str, str]]:
        report.main([str(folder)])
        with (folder / "report" / "runs.csv").open() as file:
            return [{**row, "tokens_per_second": "", "command": ""} for row in csv.DictReader(file)]

    assert forked.train(*sweep(tmp_path / "whole")).returncode == 0
    killed = forked.Forked(ROOT / "train.py", *sweep(tmp_path / "killed"))
    while len(list((tmp_path / "killed").glob("*/checkpoints"))) < 2 and killed.process.is_alive():
        time.sleep(0.01)
    killed.process.kill()
    killed.process.join()
    assert len(list((tmp_path / "killed").glob("*/checkpoints"))) == 2, "killed in its second job of three"
    assert forked.train(*sweep(tmp_path / "killed")).returncode == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
