"""The wheel, installed into a folder of its own and used away from the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, compose, write_corpus
from tiny_models import write_benchmarks

from nanodisp import __version__, launch

pytestmark = pytest.mark.slow

Python = Callable[..., subprocess.CompletedProcess[str]]

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
LOSS = """
import torch, nanodisp
print(nanodisp.__file__)
print(nanodisp.DispersionLoss()(torch.eye(3)[None]).item())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel in it, and nothing else."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nanodisp", source / "nanodisp", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, out/run."""
    import train

    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus")
    settings = (
        *TINY,
        "train.steps=2",
        "train.snapshot_interval=1",
        f"data.path={corpus}",
        f"out_dir={folder}/out",
        "run_name=run",
    )
    train.train(compose(*settings))
    return folder / "out"


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Python:
    """Run the interpreter in an empty folder, with the installed package before any other."""

    def go(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    return go


def test_the_wheel_has_the_version_of_the_package(installed: Path) -> None:
    assert (installed / f"nanodisp-{__version__}.dist-info").is_dir()


def test_the_wheel_says_that_it_is_typed(installed: Path) -> None:
    assert (installed / "nanodisp" / "py.typed").is_file()


def test_the_wheel_has_the_source_of_the_compiled_loops_and_nothing_compiled(installed: Path) -> None:
    assert (installed / "nanodisp" / "dispersion" / "kernels" / "loops.cpp").is_file()
    assert not [*installed.rglob("*.so")]


def test_the_loss_comes_from_the_wheel_and_not_from_the_clone(python: Python, installed: Path) -> None:
    file, loss = python("-c", LOSS).stdout.splitlines()
    assert file == str(installed / "nanodisp" / "__init__.py")
    assert float(loss) < 0


def test_a_folder_of_runs_becomes_a_page(python: Python, sweep_folder: Path) -> None:
    done = python("-m", "nanodisp.report", str(sweep_folder))
    assert done.returncode == 0, done.stderr
    assert "1 finished" in (sweep_folder / "report" / "index.html").read_text()
    assert "1 finished" in (sweep_folder / "report" / "report.md").read_text()


def test_a_run_is_explored(python: Python, sweep_folder: Path, tmp_path: Path) -> None:
    done = python("-m", "nanodisp.explore", str(sweep_folder / "run"), "out=page.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme" in text and "function cosinesOf" in text, "with its style and scripts"


def test_a_run_is_exported_for_hugging_face(python: Python, sweep_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    done = python("-m", "nanodisp.hf", "export", f"checkpoint={sweep_folder / 'run'}", "to=exported")
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "exported").iterdir()}


def test_condensation_is_measured_on_a_text(python: Python, sweep_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Tokens of a text that is long enough for two windows. " * 4)
    done = python("-m", "nanodisp.condensation", f"checkpoint={sweep_folder / 'run'}", "text=book.txt", "out=measured")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measured" / "condensation.json").is_file()


def test_benchmarks_are_evaluated_from_local_files(python: Python, sweep_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_benchmarks(tmp_path / "benchmarks")
    arguments = (f"checkpoint={sweep_folder / 'run'}", "tasks=blimp", "task_data=benchmarks", "out=out.json")
    done = python("-m", "nanodisp.evaluate", *arguments, "device=cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.json").is_file()


def test_a_command_without_arguments_says_what_it_needs(python: Python) -> None:
    done = python("-m", "nanodisp.evaluate")
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint ") and done.stderr.count("\n") == 1


def test_training_without_conf_says_that_it_needs_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "CONF", tmp_path / "conf")
    with pytest.raises(SystemExit) as stopped:
        launch.main(print)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "needs a clone of nanodisp" in error and error.count("\n") == 1
