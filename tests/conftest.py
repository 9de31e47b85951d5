"""Shared by the tests: a small corpus, training runs on it, and folders that look like runs."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; must be set before triton is imported
os.environ["WANDB_MODE"] = "offline"
if IN_PARALLEL := "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared; before torch and numpy are imported

import forked
import hydra
import hypothesis
import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nanodisp import launch
from nanodisp.config import Config
from nanodisp.data import shards
from nanodisp.dispersion.kernels import compiled
from nanodisp.runs import checkpoint

for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(variable, None)  # rich would take a pipe for a terminal
torch.set_num_threads(1 if IN_PARALLEL else 2)
hypothesis.settings.register_profile("nanodisp", deadline=None)  # a machine that does much else is no failure
hypothesis.settings.load_profile("nanodisp")
ConfigStore.instance().store(name="schema", node=Config)
compiled.library()  # starts a compiler the first time, which only slow tests may
ROOT = Path(__file__).parents[1]
# One for all: in an empty one inductor first compiles headers and looks for the CPU's instructions, half a minute.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".pytest_cache" / "inductor"))
TINY = (
    "model=nano",
    "optim=adamw",
    "data=shards",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "train.batch_size=4",
    "train.eval_windows=8",  # twice as many as give the figures of layers between validations
    "train.sample_tokens=8",
    "optim.lr=3e-3",
    "dispersion.max_tokens=8",
    "train.dtype=float32",  # whatever the machine has
    "device=cpu",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in Triton's interpreter are slow."""
    for item in items:
        if getattr(getattr(item, "callspec", None), "params", {}).get("backend") == "triton":
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def only_slow_tests_start_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("slow") is None:

        def refuse(*_: Any, **__: Any) -> None:
            pytest.fail("this test starts a process: mark it with @pytest.mark.slow")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(forked.Forked, "__init__", refuse)


def write_corpus(folder: Path, n_train: int = 5000, n_val: int = 1000, vocab_size: int = 257) -> Path:
    """A folder of byte shards with some structure to learn, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, size=rng.integers(2, 7)) for _ in range(20)]
    entries = []
    for split, n_tokens in (("train", n_train), ("val", n_val)):
        text = np.concatenate([np.append(words[i], 32) for i in rng.integers(0, 20, size=n_tokens)])[:n_tokens]
        shards.write_shard(folder / f"{split}_000000.bin", text.astype(np.uint16))
        entries.append(shards.describe_shard(folder / f"{split}_000000.bin", split))
    shards.Manifest("byte", vocab_size, "made by a test", {"train": 1.0, "val": 1.0}, entries).save(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def compose(*overrides: str) -> Config:
    """The configuration that `python train.py <overrides>` gets."""
    return copy.deepcopy(compose_once(overrides))


@functools.cache
def compose_once(overrides: tuple[str, ...]) -> Config:
    """Half of the time of a tiny run is Hydra's."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(launch.CONF), version_base="1.3"):
        return launch.check(hydra.compose("config", list(overrides)))


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in records(folder, "train")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find(folder)).model


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train a tiny model as `python train.py <overrides>` would; return the run's folder."""
    import train

    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # it goes through all that pytest and the tests have loaded

    def go(*overrides: str, name: str = "run") -> Path:
        config = compose(*TINY, f"data.path={corpus}", "out_dir=here", f"run_name={name}", *overrides)
        if config.out_dir == "here":
            config.out_dir = str(tmp_path)
        train.train(config)
        return tmp_path / name

    return go


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of three steps, which tests read only."""
    import train

    folder = tmp_path_factory.mktemp("trained")
    settings = ("train.steps=3", "train.sample_tokens=0", f"data.path={corpus}", f"out_dir={folder}", "run_name=run")
    train.train(compose(*TINY, *settings))
    return folder / "run"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With two, inductor's sums of the embedding's gradients are atomic: their order, and last digits, vary."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> None:
    """A module's generator RNG begins anew for each test, whichever ran before."""
    if (rng := getattr(request.module, "RNG", None)) is not None:
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of condensation are made, but not written: that takes most of the time of its commands."""
    monkeypatch.setattr("nanodisp.condensation.figures.save", lambda *_: [])


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time: for tests of what is written beside the figures."""
    monkeypatch.setattr("nanodisp.report.__main__.draw", lambda *_: [])


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the same graphs, but runs them as they are: no C++ compiler, and no half minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def command(
    *arguments: str, ranks: int | None = None, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python train.py …`, or torchrun with that many ranks; see `forked.train`, which is faster."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


STEPS = 40
SHAPE = (
    "model=nano",
    "optim=adamw",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.vocab_size=257",
)


def write_run(folder: Path, *overrides: str, loss: float | None = 2.0, steps: int = STEPS) -> Path:
    """A run's folder as train.py leaves it, without training."""
    config = compose(*SHAPE, f"train.steps={STEPS}", f"out_dir={folder.parent}", f"run_name={folder.name}", *overrides)
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    records: list[dict[str, Any]] = []
    name = config.model.loss_name
    for step in range(0, steps + 1, 20):
        if step:
            records.append({"step": step, "split": "train", name: 3.0, "tokens_per_second": 100.0 * step})
        means = [0.1, 0.2, 0.3 + step / 1000]
        bpb = {"bpb": loss and loss * 2} if config.model.causal else {}
        records.append({"step": step, "split": "val", name: loss, **bpb, "mean_cosine": means})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lambdas and none, three seeds each, one unfinished; beside them one diverged, one raised, one is damaged."""
    folder = tmp_path_factory.mktemp("sweep")
    for disp, effect in ((0, 0.0), (0.1, -0.1), (1, 0.3)):
        for seed in (1, 2, 3):
            loss = 2 + effect + 0.01 * seed + 0.001 * (seed == 3) * disp
            settings = (f"dispersion.lambda_disp={disp}", f"seed={seed}")
            write_run(folder / f"disp{disp}-s{seed}", *settings, loss=loss, steps=20 if (disp, seed) == (1, 3) else 40)
    write_run(folder / "nan", "seed=4", loss=None)
    (write_run(folder / "raised", "seed=5", steps=20) / "error.txt").write_text("UserError: <b>no space</b> & more\n")
    (write_run(folder / "damaged", "seed=6") / "config.yaml").write_text("model: [")
    (folder / "notes").mkdir()
    return folder
