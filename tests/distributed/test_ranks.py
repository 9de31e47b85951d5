"""Several ranks: sharded or not, also when other ranks resume, they have the loss curve of one process."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, TINY, losses, records, weights

from nanodisp.distributed import layout
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.runs import checkpoint
from nanodisp.runs.metrics import Metrics

pytestmark = pytest.mark.slow

Run = Callable[..., Path]
FAMILIES = ("nano_llama", "nano_qwen3", "nano_encoder")  # beside GPT-2, which the other tests train
TORCHRUN_2 = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
CURVE = ("train.steps=12", "train.log_interval=1", "train.eval_interval=4", "train.condensation_interval=4")


def assert_same_curve(ours: Path, theirs: Path, tolerance: float = 1e-5, loss: str = "loss") -> None:
    assert len(losses(ours, loss)) == 12
    for key in (loss, "dispersion", "grad_norm"):
        assert losses(ours, key) == pytest.approx(losses(theirs, key), rel=tolerance)
    for split in ("val", "condensation"):
        a, b = ([r["mean_cosine"] for r in records(folder, split)] for folder in (ours, theirs))
        assert a == [pytest.approx(means, rel=10 * tolerance) for means in b]
    a, b = ([r[loss] for r in records(folder, "val")] for folder in (ours, theirs))
    assert a == pytest.approx(b, rel=tolerance)


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep under FSDP on 2 ranks, in micro-batches; one rank has a validation chunk more than the other."""
    folder = tmp_path_factory.mktemp("sharded")
    result = forked.train(
        *("-m", *TINY, *CURVE, f"data.path={corpus}", f"out_dir={folder}", "run_name=${optim.name}-${train.dtype}"),
        *("train.parallel=fsdp", "train.micro_batch_size=1", "train.eval_windows=5", "train.timeout_minutes=1"),
        *("optim=adamw,muon", "optim.muon_lr=1e-3", "train.dtype=float32,float16"),
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("optimizer", "dtype", "tolerance"),
    # Muon's iterations run in bfloat16, and shards are summed in another order
    [("adamw", "float32", 1e-5), ("muon", "float32", 3e-4), ("adamw", "float16", 1e-3)],
)
def test_sharded_ranks_have_the_curve_of_one_process(
    run: Run, sharded: Path, optimizer: str, dtype: str, tolerance: float
) -> None:
    one = run(*CURVE, "train.eval_windows=5", f"optim={optimizer}", "optim.muon_lr=1e-3", f"train.dtype={dtype}")
    ours = sharded / f"{optimizer}-{dtype}"
    assert_same_curve(ours, one, tolerance)
    if tolerance == 1e-5:
        assert (ours / "samples.txt").read_bytes() == (one / "samples.txt").read_bytes()


def test_a_run_of_two_ranks_resumes_sharded_on_four_and_unsharded_on_one(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    keep = ("train.checkpoint_interval=4", "train.keep_last=3")
    one = run(*CURVE, *keep, name="one")
    settings = (*TINY, *CURVE, *keep, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=many")
    checkpoints = tmp_path / "many" / "checkpoints"

    result = forked.train(*settings, ranks=2)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(checkpoints / "step_00000008")
    shutil.rmtree(checkpoints / "step_00000012")
    result = forked.train(*settings, "train.parallel=fsdp", "train.activation_checkpointing=true", ranks=4)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 4" in result.stdout
    shutil.rmtree(checkpoints / "step_00000012")
    many = run(*CURVE, *keep, name="many")

    assert_same_curve(many, one)
    ours, theirs = (checkpoint.load(checkpoint.find(folder)) for folder in (many, one))
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert all(torch.allclose(ours.model[name], theirs.model[name], atol=1e-5) for name in theirs.model)


@pytest.fixture(scope="module")
def families(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family on 2 ranks, recomputing its blocks, under DDP and FSDP."""
    folder = tmp_path_factory.mktemp("families")
    result = forked.train(
        *("-m", *TINY[1:], *CURVE, f"data.path={corpus}", f"out_dir={folder}", "train.activation_checkpointing=true"),
        *(f"model={','.join(FAMILIES)}", "train.parallel=ddp,fsdp", "train.timeout_minutes=1"),
        "run_name=${hydra:runtime.choices.model}-${train.parallel}",
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_curve_on_ranks_and_resumes_to_the_bit(run: Run, families: Path, family: str) -> None:
    settings = (f"model={family}", *CURVE, "train.checkpoint_interval=4", "train.keep_last=3")
    loss = "masked_loss" if "encoder" in family else "loss"
    one = run(*settings)
    whole = weights(one)
    for parallel in ("ddp", "fsdp"):
        assert_same_curve(families / f"{family}-{parallel}", one, loss=loss)
    for step in ("08", "12"):
        shutil.rmtree(one / "checkpoints" / f"step_000000{step}")
    resumed = weights(run(*settings))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


COMPILED = """
import functools, sys
sys.path.insert(0, {root!r})
import train
import torch
from nanodisp import launch
from nanodisp.distributed import group_of_ranks
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the same graphs, without a C++ compiler
with group_of_ranks():
    launch.main(train.train)
"""


def test_compiled_ranks_have_the_curve_of_one_process(run: Run, corpus: Path, tmp_path: Path) -> None:
    program = tmp_path / "compiled.py"
    program.write_text(COMPILED.format(root=str(ROOT)))
    micro = ("train.micro_batch_size=1", "train.eval_windows=5")
    settings = (*TINY, *CURVE, *micro, f"data.path={corpus}", f"out_dir={tmp_path}", "train.compile=true")
    for rank in forked.finish(forked.start_ranks(2, program, *settings, "run_name=ranks")):
        assert rank.returncode == 0, rank.stderr
    assert_same_curve(tmp_path / "ranks", run(*CURVE, *micro, name="one"))


def test_recomputed_blocks_give_the_same_gradients_from_less_memory() -> None:
    config = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=50, dropout=0.1)
    idx = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    take = ([0, 1, 3], torch.arange(12).view(3, 4))

    def backward(recomputed: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = GPT(config)
        if recomputed:
            for block in model.h:
                layout.recompute(block, compiled=False)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            out = model(idx, idx, take=take)
        (out.loss + out.hidden.square().sum()).backward()
        return [p.grad for p in model.parameters()], sum(kept)

    (plain, plain_bytes), (again, again_bytes) = backward(False), backward(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert again_bytes < plain_bytes / 2


def test_recomputed_blocks_do_not_change_the_run(run: Run) -> None:
    settings = (*CURVE, "model.dropout=0.1")
    plain, again = run(*settings, name="a"), run(*settings, "train.activation_checkpointing=true", name="b")
    assert_same_curve(again, plain, 1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_of_a_freed_tensor_is_kept_for_the_next() -> None:
    program = """
from pathlib import Path
import resource
import torch
from nanodisp.distributed import hardware
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def left():
    before = resident()
    tensor = torch.ones(2**26)
    del tensor
    return resident() - before
given_back = left()
hardware.keep_memory()
print(left(), given_back)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=ROOT)
    kept, given_back = map(int, result.stdout.split())
    assert kept > 2**27 > given_back, "of a tensor of 2**28 bytes"


HANGING = """
import os
import signal
import time
import train
from nanodisp import launch
from nanodisp.distributed import roll_call

roll_call.SECONDS_TO_ANSWER = 2.5
update, steps = train.optim.update, 0

def hanging(*arguments):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == "1":
        time.sleep(300)
    return update(*arguments)

train.optim.update = hanging
launch.main(train.train)
"""


def test_a_rank_that_hangs_ends_the_run_and_is_named(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    settings = (f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=run", "train.timeout_minutes=0.2")
    processes = forked.start_ranks(2, script, *TINY, *settings, "train.steps=5", "train.checkpoint_interval=2")
    try:
        ended = processes[0].finish(200)  # less than the rank's sleep
    finally:
        processes[1].process.kill()
    assert ended.returncode == 74
    assert f"error: rank 1 on {socket.gethostname()} hangs" in ended.stderr
    assert f"rank 1 on {socket.gethostname()} hangs" in (tmp_path / "run" / "error.txt").read_text()
    assert checkpoint.find(tmp_path / "run").name == "step_00000002"


@pytest.mark.parametrize("mistake", ["text", "checkpoint", "lock"])
def test_a_mistake_that_rank_0_finds_ends_all_ranks_with_one_line(mistake: str, corpus: Path, tmp_path: Path) -> None:
    settings, data, message = (f"out_dir={tmp_path}", "run_name=run", "train.steps=5"), f"data.path={corpus}", ""
    if mistake == "text":
        (tmp_path / "empty.txt").touch()
        data, message = f"data.path={tmp_path / 'empty.txt'}", "too little text"
        settings += ("data=text", f"data.folder={tmp_path / 'prepared'}")
    with contextlib.ExitStack() as stack:
        if mistake == "checkpoint":
            message = "no checkpoint in .* is intact"
            (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
            (tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json").touch()
        if mistake == "lock":
            message = "another process is training into"
            stack.enter_context(Metrics(tmp_path / "run"))
        ranks = forked.finish(forked.start_ranks(2, ROOT / "train.py", *TINY, data, *settings))
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert re.fullmatch(rf"error: .*{message}.*\n", ranks[0].stderr)
    assert ranks[1].stderr == ""


def test_a_hanging_rank_0_that_keeps_the_store_is_named(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    script.write_text(HANGING.replace('"1"', '"0"').replace("time.sleep(300)", stop))
    settings = (f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=run", "train.timeout_minutes=0.2")
    processes = forked.start_ranks(2, script, *TINY, *settings, "train.steps=5")
    try:
        ended = processes[1].finish()
        assert f"error: rank 0 on {socket.gethostname()}, which keeps the store, hangs or is gone" in ended.stderr
        assert ended.returncode == 74
    finally:
        processes[0].process.kill()


POISONED = """
import os
import train
from nanodisp import launch

build = train.optim.build_optimizers

def poisoned(model, settings):
    calls = 0
    def hook(gradient):
        nonlocal calls
        calls += 1
        return gradient * float("nan") if calls == 2 and os.environ["RANK"] == "1" else gradient
    model.ln_f.weight.register_hook(hook)
    return build(model, settings)

train.optim.build_optimizers = poisoned
launch.main(train.train)
"""


def test_a_nan_gradient_on_one_rank_is_skipped_on_both(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    settings = [*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=run", "train.steps=4"]
    ranks = forked.finish(forked.start_ranks(2, tmp_path / "poisoned.py", *settings, "train.log_interval=1"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert losses(tmp_path / "run", "bad_steps") == [0, 1, 1, 1]
    assert None not in losses(tmp_path / "run")


KILLED = """
import os
import signal
import train
from nanodisp import launch

clip = train.optim.clip_gradients

def killing(*arguments):
    killing.calls += 1
    if killing.calls == 7 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*arguments)

killing.calls = 0
train.optim.clip_gradients = killing
launch.main(train.train)
"""


def test_a_killed_rank_is_named_by_the_others_in_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    settings = [*TINY, *CURVE, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=killed"]
    ranks = forked.finish(forked.start_ranks(3, tmp_path / "killed.py", *settings, "train.batch_size=6"))
    assert [rank.returncode for rank in ranks] == [74, -9, 74], ranks
    for rank in (ranks[0], ranks[2]):
        assert re.fullmatch(rf"error: rank 1 on {socket.gethostname()} is gone: .*command resumes.*\n", rank.stderr)


def test_torchrun_restarts_a_killed_rank(run: Run, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    settings = [*TINY, *CURVE, f"data.path={corpus}", f"out_dir={tmp_path}", "train.checkpoint_interval=5"]
    result = subprocess.run(
        [
            *(sys.executable, *TORCHRUN_2, "--max-restarts=1"),
            *(str(tmp_path / "killed.py"), *settings, "run_name=killed"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "resuming from step 5" in result.stdout
    assert_same_curve(tmp_path / "killed", run(*CURVE))
