"""Hosts that share no disk: here two ranks with a folder each, both the first rank of their host."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import ROOT, TINY, losses, write_corpus

from nanodisp.runs import checkpoint

pytestmark = pytest.mark.slow  # starts processes

SETTINGS = (
    *TINY,
    "train.checkpoint_interval=3",
    "train.log_interval=1",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
)
REPLICATED = "train.replicate_checkpoints=true"


def train_on(
    hosts: list[Path], *settings: str, data: list[Path], second: tuple[str, ...] = (), ends: int = 0
) -> list[str]:
    """Two ranks, each with its out_dir and its data, `second` with further settings; what they say on stderr."""
    shared = forked.rendezvous(2)
    ranks = [
        forked.Forked(
            *(ROOT / "train.py", *SETTINGS, *settings, f"out_dir={host}", "run_name=run", f"data.path={corpus}"),
            *(second if rank == 1 else ()),
            **{**shared, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, (host, corpus) in enumerate(zip(hosts, data, strict=True))
    ]
    ended = forked.finish(ranks)
    assert [each.returncode for each in ended] == [ends, ends], ended
    return [each.stderr for each in ended]


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts, a and b, after three steps of a replicated run."""
    folder = tmp_path_factory.mktemp("stopped")
    train_on([folder / "a", folder / "b"], REPLICATED, "train.steps=3", data=[corpus, corpus])
    return folder


@pytest.fixture
def hosts(stopped: Path, tmp_path: Path) -> list[Path]:
    """A copy of both."""
    return [Path(shutil.copytree(stopped / name, tmp_path / name)) for name in ("a", "b")]


def newest(host: Path) -> dict[str, str]:
    return json.loads((checkpoint.find(host / "run") / "state.json").read_text())["sha256"]


def test_a_replicated_run_goes_on_without_the_host_that_wrote_it(corpus: Path, tmp_path: Path) -> None:
    hosts, data = [tmp_path / "a", tmp_path / "b"], [corpus, corpus]
    train_on(hosts, REPLICATED, "train.steps=12", data=data)
    whole = losses(hosts[0] / "run")
    assert losses(hosts[1] / "run") == whole
    assert newest(hosts[0])["model.safetensors"] == newest(hosts[1])["model.safetensors"]

    for host in hosts:
        shutil.rmtree(host)
    train_on(hosts, REPLICATED, "train.steps=6", data=data)
    shutil.rmtree(hosts[0])  # rank 0's: a new host takes its place
    train_on(hosts, REPLICATED, "train.steps=12", data=data)
    assert losses(hosts[0] / "run") == losses(hosts[1] / "run") == whole


def test_hosts_that_went_on_without_each_other_are_one_run_again(corpus: Path, tmp_path: Path) -> None:
    hosts, data = [tmp_path / "a", tmp_path / "b"], [corpus, corpus]
    train_on(hosts, REPLICATED, "train.steps=3", data=data)
    tensors = checkpoint.load(checkpoint.find(hosts[1] / "run"))
    changed = {name: tensor + 1 for name, tensor in tensors.model.items()}
    state = {key: value for key, value in tensors.state.items() if key not in ("sha256", "format_version")}
    checkpoint.save(hosts[1] / "run" / "checkpoints", changed, tensors.optimizer, state)
    train_on(hosts, REPLICATED, "train.steps=6", data=data)
    assert newest(hosts[0])["model.safetensors"] == newest(hosts[1])["model.safetensors"]
    assert losses(hosts[0] / "run") == losses(hosts[1] / "run")


def test_a_new_host_joins_although_the_records_of_the_other_are_lost(
    hosts: list[Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.rmtree(hosts[1])
    (hosts[0] / "run" / "metrics.jsonl").unlink()
    data = [corpus, Path(shutil.copytree(corpus, tmp_path / "copy"))]  # paths may differ
    train_on(hosts, REPLICATED, "train.steps=6", data=data)
    assert len(losses(hosts[0] / "run")) == 3
    assert losses(hosts[0] / "run") == losses(hosts[1] / "run")
    assert newest(hosts[0])["model.safetensors"] == newest(hosts[1])["model.safetensors"]


def records_are_no_file(hosts: list[Path]) -> int:
    (hosts[0] / "run" / "metrics.jsonl").unlink()
    (hosts[0] / "run" / "metrics.jsonl").mkdir()
    shutil.rmtree(hosts[1])
    return 0


def a_file_is_in_the_way_of_the_checkpoint(hosts: list[Path]) -> int:
    shutil.rmtree(hosts[1] / "run" / "checkpoints" / "step_00000003")
    (hosts[1] / "run" / "checkpoints" / "step_00000003").touch()
    return 1


@pytest.mark.parametrize("spoil", [records_are_no_file, a_file_is_in_the_way_of_the_checkpoint])
def test_what_cannot_be_read_or_written_ends_all_hosts_in_one_line(
    spoil: Callable[[list[Path]], int], hosts: list[Path], corpus: Path
) -> None:
    host = spoil(hosts)
    said = train_on(hosts, REPLICATED, "train.steps=6", data=[corpus, corpus], ends=2)
    assert said[1 - host] == ""
    line = rf"error: {hosts[host] / 'run'} on {socket.gethostname()} cannot be copied between the hosts: .*\n"
    assert re.fullmatch(line, said[host])


def test_a_host_whose_checkpoints_are_all_damaged_gets_those_of_another(hosts: list[Path], corpus: Path) -> None:
    for host in reversed(hosts):
        (host / "run" / "checkpoints" / "step_00000003" / "model.safetensors").write_bytes(b"")
        if host == hosts[1]:
            shutil.copytree(hosts[0], hosts[0].with_name("intact"))
    said = train_on(hosts, REPLICATED, "train.steps=6", data=[corpus, corpus], ends=2)
    assert all(re.fullmatch(r"error: no checkpoint in .* is intact .*\n", line) for line in said), said
    hosts[0] = hosts[0].with_name("intact")
    said = train_on(hosts, REPLICATED, "train.steps=6", data=[corpus, corpus])
    assert said[0] == ""
    assert re.fullmatch(r".*damaged.*: renamed to damaged_step_00000003, taking step 3 of rank 0\n", said[1])
    assert losses(hosts[0] / "run") == losses(hosts[1] / "run")
    assert newest(hosts[0])["model.safetensors"] == newest(hosts[1])["model.safetensors"]


def test_ranks_with_other_keys_are_named_with_the_keys(hosts: list[Path], corpus: Path) -> None:
    other = ("train.replicate_checkpoints=false", "train.dtype=auto")
    said = train_on(hosts, REPLICATED, data=[corpus, corpus], second=other, ends=2)
    assert said[0] == ""
    assert said[1].startswith(
        f"error: rank 1 differs from rank 0: on {socket.gethostname()} "
        'train.dtype="auto" (rank 0: "float32"), train.replicate_checkpoints=false (rank 0: true); '
    )
    assert said[1].count("\n") == 1


def test_without_replicas_a_resume_on_separate_disks_says_what_to_do(corpus: Path, tmp_path: Path) -> None:
    hosts, data = [tmp_path / "a", tmp_path / "b"], [corpus, corpus]
    train_on(hosts, "train.steps=3", data=data)
    said = train_on(hosts, "train.steps=6", data=data, ends=2)
    assert said[0] == ""
    assert re.fullmatch(
        r"error: .*step_00000003 exists for rank 0, but not on .*replicate_checkpoints=true.*\n", said[1]
    )


def test_other_tokens_on_another_host_end_the_run_in_one_line(corpus: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", n_train=6000)
    said = train_on([tmp_path / "a", tmp_path / "b"], "train.steps=3", data=[corpus, other], ends=2)
    assert said[0] == ""
    assert re.fullmatch(
        rf"error: the tokens in {other} on {socket.gethostname()} are not those of rank 0: .*\n", said[1]
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_the_first_step_ends_with_the_code_that_means_again(name: str) -> None:
    """A scheduler's signal may come while torch is loaded: it must not look like a crash."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    handled = getattr(signal, name)
    deadline = time.monotonic() + 60
    status = Path(f"/proc/{process.pid}/status")
    while time.monotonic() < deadline:  # until the handler is there, long before the first step
        caught = int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16)
        if caught >> (handled - 1) & 1:
            break
        time.sleep(0.002)
    process.send_signal(handled)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, f"{name}: ended before a step, nothing to save\n")
