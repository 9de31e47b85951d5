"""Training runs, started as `python train.py` starts them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import ROOT, TINY, command, compose, losses, records, weights, write_corpus

import sample
import train
from nanodisp.dispersion import kernels
from nanodisp.dispersion.placement import DispersionConfig
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.plan import count_micro_batches
from nanodisp.runs import checkpoint
from nanodisp.training.interventions import InterventionConfig
from nanodisp.training.objective import Objective
from nanodisp.training.signals import EXIT_CODE

Run = Callable[..., Path]


def test_a_run_learns_and_writes_its_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train.steps=30", "train.log_interval=10", "train.eval_interval=10")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "samples.txt", "checkpoints", ".lock"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000030"]
    assert [record["step"] for record in records(folder, "train")] == [1, 10, 20, 30]
    val = records(folder, "val")
    assert [record["step"] for record in val] == [0, 10, 20, 30]
    assert val[-1]["loss"] < val[0]["loss"] - 0.5
    assert val[-1]["bpb"] == pytest.approx(val[-1]["loss"] / 0.6931472, rel=1e-6)
    assert [len(record["mean_cosine"]) for record in val] == [3] * 4
    assert set(records(folder, "train")[0]) == {
        *("step", "split", "loss", "dispersion", "lambda_disp", "lr", "grad_norm", "bad_steps"),
        *("tokens", "tokens_per_second", "mfu", "seconds"),
    }
    printed = capsys.readouterr().out
    for part in ("before training:", "after training:", "--- sample", "bits per byte", str(folder)):
        assert part in printed


def test_the_speed_counts_waiting_for_data_and_not_for_evaluation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prefetch, validate, waits = train.prefetch, train.validate, {"data": 0.0, "evaluation": 0.0}

    def late(*arguments: Any) -> Any:
        for batch in prefetch(*arguments):
            time.sleep(waits["data"])
            yield batch

    def slow(*arguments: Any) -> None:
        time.sleep(waits["evaluation"])
        validate(*arguments)

    monkeypatch.setattr(train, "prefetch", late)
    monkeypatch.setattr(train, "validate", slow)

    def seconds_of_a_step(name: str, **waiting: float) -> float:
        waits.update({"data": 0.0, "evaluation": 0.0} | waiting)
        record = records(run("train.steps=6", "train.log_interval=6", name=name), "train")[-1]
        return record["tokens"] / record["step"] / record["tokens_per_second"]

    plain = seconds_of_a_step("plain")
    assert seconds_of_a_step("data", data=0.15) > 0.15
    assert seconds_of_a_step("evaluation", evaluation=0.4) < plain + 0.3


@pytest.mark.slow
def test_dispersion_spreads_the_embeddings_and_off_has_no_such_term(run: Run) -> None:
    settings = ("train.steps=60", "optim.lr=1e-2", "train.log_interval=60")
    plain = run(*settings, "dispersion=off", name="off")
    spread = run(*settings, "dispersion.lambda_disp=1", name="on")
    assert "dispersion" not in records(plain, "train")[-1]
    assert records(plain, "train")[-1]["lambda_disp"] == 0
    cosine_off, cosine_on = (sum(records(folder, "val")[-1]["mean_cosine"][1:]) for folder in (plain, spread))
    assert cosine_on < cosine_off - 0.2


@pytest.mark.parametrize("variant", ["angular", "decorrelation", "entropy"])
@pytest.mark.parametrize("n_micro", [2, 4])
def test_micro_batches_give_the_gradient_of_the_full_batch(variant: str, n_micro: int) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=50))
    dispersion = DispersionConfig(variant=variant, lambda_disp=0.5, max_tokens=16)
    objective = Objective(model, dispersion, InterventionConfig(), seed=0, total_steps=1)
    objective.begin(0)
    idx = torch.randint(50, (8, 25))

    def gradient(parts: int) -> torch.Tensor:
        model.zero_grad()
        for x in idx.chunk(parts):
            loss, _ = objective(x[:, :-1], x[:, 1:])
            (loss / parts).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, parts = gradient(1), gradient(n_micro)
    assert (whole - parts).norm() < 1e-6 * whole.norm()


@pytest.mark.slow
def test_micro_batches_do_not_change_the_run(run: Run) -> None:
    settings = ("train.steps=10", "train.log_interval=1")
    whole, parts = run(*settings, name="a"), run(*settings, "train.micro_batch_size=1", name="b")
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    assert count_micro_batches(12, None) == 1
    assert count_micro_batches(12, 5) == 3


def test_the_command_of_a_sample_is_quoted_for_the_shell(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train.steps=1", f"out_dir='{tmp_path}/a & b'")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("more text: ")]
    assert shlex.split(line) == ["more", "text:", "python", "sample.py", f"checkpoint={tmp_path}/a & b/run", "prompt=…"]


@pytest.mark.slow
def test_a_terminal_without_utf_8_does_not_fail_a_run(corpus: Path, tmp_path: Path) -> None:
    settings = ("train.steps=1", "run_name=run", f"data.path={corpus}", f"out_dir={tmp_path}")
    result = command(*TINY, *settings, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "run" / "error.txt").exists()
    assert "prompt='?'" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["No space left on device", "Broken pipe"])
def test_a_standard_output_that_fails_does_not_end_a_run(corpus: Path, tmp_path: Path, reason: str) -> None:
    settings = ("train.steps=2", "run_name=run", f"data.path={corpus}", f"out_dir={tmp_path}")
    read, write = os.pipe() if reason == "Broken pipe" else (None, os.open("/dev/full", os.O_WRONLY))
    if read is not None:
        os.close(read)
    result = command(*TINY, *settings, stdout=write)
    os.close(write)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert result.stderr.startswith(f"standard output cannot be written: {reason}; the command continues")
    assert [record["step"] for record in records(tmp_path / "run", "val")] == [0, 2]
    assert not (tmp_path / "run" / "error.txt").exists()


@pytest.mark.parametrize(("keep_every", "interval"), [(2, 3), (4, 10)])
def test_multiples_of_keep_every_of_which_none_is_saved_are_an_error(run: Run, keep_every: int, interval: int) -> None:
    settings = (f"train.keep_every={keep_every}", f"train.checkpoint_interval={interval}")
    message = rf"train\.keep_every={keep_every} keeps nothing: of a run of 5 steps, .* every {interval} steps"
    with pytest.raises(UserError, match=message):
        run("train.steps=5", *settings)
    run("train.steps=8", *settings)


def test_a_run_that_is_too_short_for_keep_every_is_accepted(run: Run) -> None:
    run("train.steps=2", "train.keep_every=3")


@pytest.mark.slow
def test_two_ranks_have_the_loss_curve_of_one(run: Run, corpus: Path, tmp_path: Path) -> None:
    settings = ("train.steps=50", "train.log_interval=1")
    one = run(*settings, name="one")
    where = (f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=two", "train.micro_batch_size=1")
    result = forked.train(*TINY, *where, *settings, ranks=2)
    assert result.returncode == 0, result.stderr
    two = tmp_path / "two"
    assert len(losses(two)) == 50
    for key in ("loss", "dispersion"):
        assert losses(two, key) == pytest.approx(losses(one, key), rel=1e-5)
    for ours, theirs in zip(records(two, "val"), records(one, "val"), strict=True):
        assert [ours["loss"], *ours["mean_cosine"]] == pytest.approx([theirs["loss"], *theirs["mean_cosine"]], rel=1e-4)


@pytest.mark.parametrize("budget", ["train.tokens=640", "train.tokens_per_param=0.0583"])
def test_a_budget_in_tokens_becomes_steps(run: Run, budget: str) -> None:
    folder = run(budget, "train.log_interval=1")  # 64 tokens a step, 10,960 parameters
    assert len(records(folder, "train")) == 10


@pytest.mark.slow
@pytest.mark.parametrize("options", [("train.dtype=bfloat16",), ("optim=muon", "optim.schedule=linear")], ids=str)
def test_other_precisions_and_optimizers_also_learn(run: Run, options: tuple[str, ...]) -> None:
    val = records(run("train.steps=40", *options), "val")
    assert val[-1]["loss"] < val[0]["loss"] - 0.3


@pytest.mark.slow
def test_an_outage_of_wandb_does_not_stop_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")

    def unreachable(**settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    folder = run("train.steps=3", "wandb.mode=online")
    assert "W&B start failed (no route to host)" in capsys.readouterr().out
    assert checkpoint.find(folder).name == "step_00000003"


def test_shards_of_another_tokenizer_and_short_corpora_are_rejected(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        run("model.vocab_size=100")
    short = write_corpus(tmp_path / "short", n_train=20, n_val=10)
    with pytest.raises(UserError, match="block_size=16 needs 17 tokens"):
        run(f"data.path={short}")


def test_a_file_in_place_of_the_run_folder_is_reported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another out_dir"):
        run("train.steps=1", f"out_dir={tmp_path / 'file'}")


def test_ranks_must_divide_the_batch(corpus: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "start", lambda *_: World(rank=0, size=3, device=torch.device("cpu")))
        patch.setattr(train, "open_for", pytest.fail)  # reported before the data is prepared
        with pytest.raises(UserError, match="not divisible by the number of ranks, 3"):
            train.train(compose(*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=x"))


def test_the_same_shards_for_training_and_validation_are_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "own", n_train=3000)
    (folder / "manifest.json").unlink()
    shutil.copy(folder / "train_000000.bin", folder / "val_000000.bin")
    run("train.steps=1", f"data.path={folder}", "data.tokenizer=byte")
    assert f"warning: the same tokens are for training and for validation in {folder}\n" in capsys.readouterr().err


@pytest.mark.parametrize("n_documents", [1, 2])
def test_the_sample_begins_with_what_follows_something_in_the_training_text(
    run: Run, tmp_path: Path, n_documents: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """End-of-text between two documents; the first token of a single one, which never saw end-of-text before it."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "val.txt").write_text("held out " * 20)
    for i in range(n_documents):
        (texts / f"{i}.txt").write_text("Words " * 40)
    own = ("data=text", f"data.path={texts}", f"data.folder={tmp_path / 'prepared'}", "train.steps=1")
    starts = []
    generate = sample.generate

    def spy(model: GPT, prompt: torch.Tensor, *args: Any, **options: Any) -> Any:
        starts.append(prompt.tolist())
        return generate(model, prompt, *args, **options)

    monkeypatch.setattr("nanodisp.runs.folder.generate", spy)
    monkeypatch.setattr(sample, "generate", spy)
    folder = run(*own)
    capsys.readouterr()
    sample.main((f"checkpoint={folder}", "max_new_tokens=8"))
    assert starts == [[[ord("W") if n_documents == 1 else 256]]] * 2
    if n_documents == 1:
        assert (folder / "samples.txt").read_text().startswith("W")
        assert capsys.readouterr().out.startswith("W")


def test_lambda_follows_its_schedule(run: Run) -> None:
    """A warm-up begins at 0: the first update is that of a run without dispersion."""
    warming = run("train.steps=1", "dispersion.schedule=warmup", name="a")
    plain, steady = run("train.steps=1", "dispersion=off", name="b"), run("train.steps=1", name="c")
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(warming).items())
    assert not all(torch.equal(value, weights(plain)[key]) for key, value in weights(steady).items())


def test_the_gradient_is_clipped_and_the_learning_rate_moves(run: Run) -> None:
    free, clipped = run("train.steps=2", name="a"), run("train.steps=2", "optim.grad_clip=1e-9", name="b")
    assert max(losses(free, "grad_norm")) > 0.1  # the norm before clipping
    change = [weights(folder)["ln_f.bias"].abs().max().item() for folder in (free, clipped)]
    assert change[1] < 0.5 * change[0]  # AdamW's epsilon is no longer small relative to the gradient
    assert len(set(losses(run("train.steps=20", "train.log_interval=1", name="c"), "lr"))) > 10


def test_a_run_that_diverges_says_so_and_completes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("train.steps=6", "optim.lr=1e30", "optim.grad_clip=null")
    folder = run(*settings)
    assert records(folder, "val")[-1]["loss"] is None
    assert None in records(folder, "val")[-1]["mean_cosine"]
    run(*settings)
    assert capsys.readouterr().out.count("the loss is not finite") == 2


# of Triton's interpreter, which is slow
FEW = ("train.steps=30", "train.batch_size=1", "dispersion.layers=last", "dispersion.max_tokens=4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance", "options"),
    [
        ("cpu", "float32", 1e-4, ("train.steps=80",)),
        ("cpu", "bfloat16", 2e-2, ("train.steps=80",)),
        ("triton", "float32", 1e-4, FEW),
        ("triton", "bfloat16", 2e-2, FEW),
    ],
)
def test_every_backend_of_the_loss_gives_the_same_curve(
    run: Run, backend: str, dtype: str, tolerance: float, options: tuple[str, ...]
) -> None:
    settings = ("train.log_interval=10", "optim.lr=1e-3", f"train.dtype={dtype}", *options)
    plain = run(*settings, "dispersion.backend=reference", name="reference")
    fused = run(*settings, f"dispersion.backend={backend}", name=backend)
    for key in ("loss", "dispersion"):
        assert losses(fused, key) == pytest.approx(losses(plain, key), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(corpus: Path, tmp_path: Path, name: str) -> None:
    settings = [*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=run", "train.checkpoint_interval=100000"]
    training = forked.Forked(ROOT / "train.py", *settings, "train.steps=100000", "train.log_interval=1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()) and training.process.is_alive():
        time.sleep(0.01)
    os.kill(training.process.pid, getattr(signal, name))
    ended = training.finish()
    assert ended.returncode == EXIT_CODE, ended.stderr
    (step,) = re.findall(rf"{name}: saved at step (\d+); the same command resumes", ended.stdout)
    assert checkpoint.find(tmp_path / "run").name == f"step_{int(step):08d}"
    assert not (tmp_path / "run" / "error.txt").exists()


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradients of these steps (from 1) not finite."""
    calls = 0
    clip = train.optim.clip_gradients

    def poisoned(model: GPT, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in steps:
            model.h[0].mlp.c_fc.weight.grad[0, 0] = float("nan")
        return clip(model, *arguments)

    monkeypatch.setattr(train.optim, "clip_gradients", poisoned)


def test_a_backend_that_the_device_does_not_have_is_refused_before_the_data_are_prepared(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TRITON_INSTALLED", True)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"^dispersion.backend=triton is not available: z is on cpu"):
        run("train.steps=1", "dispersion.backend=triton", "data.path=nowhere")


def test_an_update_that_is_not_finite_is_skipped_and_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 4})
    folder = run("train.steps=6", "train.log_interval=1", "train.max_bad_steps=2")
    assert losses(folder, "bad_steps") == [0, 1, 1, 2, 2, 2]
    assert losses(folder, "grad_norm")[1] is None
    assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.slow
def test_float16_tolerates_overflow_but_not_a_persistent_nan(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("train.steps=60", "train.dtype=float16", "train.max_bad_steps=3")
    assert losses(run(*settings, name="overflows"), "bad_steps")[-1] == 0
    build = train.optim.build_optimizers

    def poisoned(model: GPT, settings: train.optim.OptimConfig) -> list[torch.optim.Optimizer]:
        model.ln_f.weight.register_hook(lambda gradient: gradient * float("nan"))
        return build(model, settings)

    monkeypatch.setattr(train.optim, "build_optimizers", poisoned)
    with pytest.raises(UserError, match="not finite at step 19, 3 times in a row"):  # 2**16 is halved 16 times first
        run(*settings, name="poisoned")


def test_too_many_bad_steps_in_a_row_end_the_run_with_their_origin(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, {4, 5, 6})
    with pytest.raises(UserError) as error:
        run("train.steps=9", "train.checkpoint_interval=2", "train.max_bad_steps=3")
    for part in ("step 6", "3 times in a row", "the gradient of h.0.mlp.c_fc.weight", "step_00000004", "optim.lr"):
        assert part in str(error.value)
    assert "step 6" in (tmp_path / "run" / "error.txt").read_text()
