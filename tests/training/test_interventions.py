"""The baselines of dispersion: noisy embeddings, active forgetting, distillation."""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compose, losses, records, weights, write_run
from torch import Tensor

import train
from nanodisp.data.batches import Batches
from nanodisp.data.corpus import open_corpus
from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import DispersionConfig, sample_positions
from nanodisp.errors import UserError
from nanodisp.hf.card import model_card
from nanodisp.hf.open import build, open_source, open_teacher
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.report.tables import make_rows
from nanodisp.runs import checkpoint
from nanodisp.runs.read import read_runs
from nanodisp.training.interventions import InterventionConfig, add_noise
from nanodisp.training.objective import Objective

Run = Callable[..., Path]
NOISE, FORGET = "intervention.noise_alpha=5", "intervention.forget_interval=4"


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another width and a longer context."""
    folder = tmp_path_factory.mktemp("teacher")
    wider = ("model.n_embd=24", "model.n_layer=1", "model.block_size=20", "dispersion=off", "train.steps=20")
    train.train(compose(*TINY, f"data.path={corpus}", f"out_dir={folder}", "run_name=teacher", "seed=7", *wider))
    return folder / "teacher"


def small(n_embd: int = 32) -> GPT:
    return GPT(GPTConfig(n_layer=3, n_head=2, n_embd=n_embd, block_size=24, vocab_size=50))


def test_a_run_without_interventions_has_its_known_figures(run: Run) -> None:
    """The figures of this run before interventions were added."""
    folder = run("train.steps=3", "train.log_interval=1")
    assert losses(folder) == pytest.approx([5.5651078, 5.4683780, 5.4299993], rel=1e-6)
    assert losses(folder, "grad_norm") == pytest.approx([1.6349316, 1.5168421, 1.1105819], rel=1e-5)


# --- noisy embeddings ------------------------------------------------------------------------


def test_noise_has_its_scale_in_training_and_is_absent_in_evaluation() -> None:
    torch.manual_seed(0)
    model, idx = small(), torch.randint(50, (8, 24))
    plain = model(idx, return_hidden=True).hidden[0]
    add_noise(model, alpha=5)
    noise = (model(idx, return_hidden=True).hidden[0] - plain).detach()
    scale = 5 / math.sqrt(24 * 32)
    assert 0.99 * scale < noise.abs().max() <= 1.0001 * scale
    assert noise.std().item() == pytest.approx(scale / math.sqrt(3), rel=0.02), "uniform"
    assert noise.mean().abs() < 0.02 * scale
    assert torch.equal(model.eval()(idx, return_hidden=True).hidden[0], plain)


def test_noise_changes_training_and_not_validation(run: Run) -> None:
    plain, noisy = run("train.steps=1", name="a"), run("train.steps=1", NOISE, name="b")
    assert records(plain, "val")[0]["loss"] == records(noisy, "val")[0]["loss"]
    assert losses(plain) != losses(noisy)


# --- active forgetting -----------------------------------------------------------------------


def test_embeddings_and_their_state_are_reset_only_at_the_right_steps(run: Run) -> None:
    keep = (
        "train.checkpoint_interval=1",
        "train.keep_last=9",
        "optim.lr=1e-9",
    )  # so that training hardly moves the weights
    folder = run("train.steps=6", "intervention.forget_interval=2", *keep)
    saved = {step: checkpoint.load(checkpoint.path_of(folder / "checkpoints", step)) for step in range(1, 7)}
    updates = [[s.optimizer[f"{name}/step"].item() for s in saved.values()] for name in ("wte.weight", "wpe.weight")]
    assert updates == [[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]]
    for name in saved[1].model:
        moved = [bool((saved[s].model[name] - saved[s + 1].model[name]).abs().max() > 1e-6) for s in range(1, 6)]
        assert moved == ([False, True, False, True, False] if name == "wte.weight" else [False] * 5), name
    before, after, again = (saved[step].model["wte.weight"] for step in (2, 3, 5))
    assert after.std() == pytest.approx(0.02, rel=0.05)
    for a, b in ((before, after), (after, again)):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.1, "drawn again"


def test_nothing_is_reset_before_the_first_interval(run: Run) -> None:
    settings = ("train.steps=6", "train.log_interval=1")
    plain, forgetful = losses(run(*settings, name="a")), losses(run(*settings, FORGET, name="b"))
    assert forgetful[:4] == plain[:4]
    assert forgetful[4] > plain[4] + 0.01


def test_an_interval_without_a_reset_is_an_error(run: Run) -> None:
    with pytest.raises(UserError, match=r"forget_interval=4 never resets the embeddings in a run of 4 steps"):
        run("train.steps=4", FORGET)
    with pytest.raises(UserError, match=r"forget_interval=4 never resets the embeddings in a run of 3 steps"):
        run("train.tokens=192", FORGET)
    run("train.steps=5", FORGET)


# --- distillation ----------------------------------------------------------------------------


def test_the_loss_with_a_teacher_is_the_formula(run: Run, corpus: Path, teacher: Path) -> None:
    """(1 - alpha) cross-entropy + alpha temperature^2 KL + lambda dispersion, by PyTorch's functions on all logits."""
    settings = (f"intervention.teacher={teacher}", "intervention.distillation_alpha=0.3")
    settings += ("intervention.distillation_temperature=3", "dispersion.lambda_disp=0.5", "train.steps=1")
    folder = run(*settings)

    config = compose(*TINY, "model.vocab_size=257")
    torch.manual_seed(config.seed)
    model, taught_by = GPT(config.model), build(open_source(str(teacher)).weights)
    tokens = open_corpus(corpus, "byte").train
    x, y = Batches(tokens, block_size=16, batch_size=4, seed=config.seed, vocab_size=257).batch(0)
    ours, theirs = model(x).logits[..., :257].flatten(0, 1), taught_by(x).logits[..., :257].flatten(0, 1)
    ce = F.cross_entropy(ours, y.flatten())
    q, p = (ours / 3).log_softmax(-1), (theirs / 3).log_softmax(-1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    positions = sample_positions(config.seed, 0, [1, 2], 16, 8)
    hidden = model(x, take=([1, 2], positions)).hidden
    dispersion = DispersionLoss()(hidden.flatten(0, 1))
    loss = 0.7 * ce + 0.3 * 9 * kl + 0.5 * dispersion
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()

    (record,) = records(folder, "train")
    found = [record[key] for key in ("loss", "distillation", "dispersion", "grad_norm")]
    assert found == pytest.approx([ce.item(), kl.item(), dispersion.item(), norm.item()], rel=1e-4)


def test_micro_batches_with_a_teacher_give_the_gradient_of_the_full_batch() -> None:
    torch.manual_seed(0)
    model, teaches = small(), small(n_embd=48).eval().requires_grad_(False)
    dispersion, distillation = DispersionConfig(lambda_disp=0.5, max_tokens=16), InterventionConfig(teacher="a")
    objective = Objective(model, dispersion, distillation, seed=0, total_steps=1, teacher=teaches)
    objective.begin(0)
    assert objective.weights == {"loss": 0.5, "dispersion": 0.5, "distillation": 2.0}
    idx = torch.randint(50, (8, 25))

    def gradient(parts: int) -> Tensor:
        model.zero_grad()
        for x in idx.chunk(parts):
            loss, _ = objective(x[:, :-1], x[:, 1:])
            (loss / parts).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(1)
    for parts in (2, 8):
        assert (whole - gradient(parts)).norm() < 1e-6 * whole.norm()
    assert all(p.grad is None for p in teaches.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_has_nothing_to_learn_from_itself(run: Run, dtype: str) -> None:
    start = run("train.steps=3", name="start")
    again = (f"init_from={start}", f"intervention.teacher={start}", f"train.dtype={dtype}", "train.steps=2")
    distillation = losses(run(*again, "train.log_interval=1", name="again"), "distillation")
    assert distillation[0] == 0
    assert distillation[1] > 0


def test_distillation_is_recorded_and_printed_and_has_no_part_in_validation(
    run: Run, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, taught = run("train.steps=1", name="a"), run("train.steps=1", f"intervention.teacher={teacher}", name="b")
    assert f"distillation {losses(taught, 'distillation')[0]:.4f}" in capsys.readouterr().out
    assert "distillation" not in records(plain, "train")[0]
    assert records(plain, "val")[0]["loss"] == records(taught, "val")[0]["loss"]
    assert weights(taught).keys() == weights(plain).keys(), "the teacher is not saved"


def test_a_student_approaches_its_teacher(run: Run, teacher: Path) -> None:
    settings = ("train.steps=40", "train.log_interval=1", f"intervention.teacher={teacher}")
    distillation = losses(run(*settings, "intervention.distillation_alpha=1"), "distillation")
    assert distillation[-1] < 0.2 * distillation[0]


def test_an_unsuitable_teacher_is_rejected_with_a_reason(run: Run, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(f"intervention.teacher={tmp_path}")
    with pytest.raises(UserError, match=r"has a context of 20 tokens: give model.block_size=20 or less"):
        run(f"intervention.teacher={teacher}", "model.block_size=32")
    with pytest.raises(UserError, match=r"has a vocabulary of 257 tokens, the run 300: .* data.tokenizer"):
        run(f"intervention.teacher={teacher}", "model.vocab_size=300")
    backwards = tmp_path / "backwards.tiktoken"
    tokens = (base64.b64encode(bytes([255 - rank])).decode() for rank in range(256))
    backwards.write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    with pytest.raises(UserError, match=r"teacher=.* was trained with another tokenizer"):
        settings = ("model.vocab_size=257", f"intervention.teacher={teacher}", f"data.tokenizer={backwards}")
        open_teacher(compose(*TINY, *settings), torch.device("cpu"))


# --- all of them -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", ["noise", "forget", "teacher", "all"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(run: Run, teacher: Path, which: str) -> None:
    options = {"noise": (NOISE,), "forget": (FORGET,), "teacher": (f"intervention.teacher={teacher}",)}
    options["all"] = (*(o for part in options.values() for o in part), "train.activation_checkpointing=true")
    settings = ("train.steps=12", "train.checkpoint_interval=4", "train.keep_last=3", "train.log_interval=1")
    settings += options[which]
    folder = run(*settings)
    whole, lines = weights(folder), losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    shutil.rmtree(folder / "checkpoints" / "step_00000008")  # step 4 is the last before a reset
    assert checkpoint.find(folder).name == "step_00000004"
    run(*settings)
    assert losses(folder) == lines
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_run_has_the_same_curve(run: Run, teacher: Path) -> None:
    settings = ("train.steps=6", "train.log_interval=1", FORGET, f"intervention.teacher={teacher}")
    plain, compiled = run(*settings, name="a"), run(*settings, "train.compile=true", name="b")
    for key in ("loss", "distillation"):
        assert losses(compiled, key) == pytest.approx(losses(plain, key), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_noise_in_a_compiled_run_is_repeatable(run: Run, one_thread: None) -> None:
    settings = ("train.steps=6", "train.log_interval=1", "model.n_layer=1")
    noisy = [run(*settings, NOISE, "train.compile=true", name=name) for name in ("a", "b")]
    assert losses(noisy[0]) == pytest.approx(
        losses(noisy[1]), rel=1e-6
    )  # to the bit: docs/reliability.md, "Checkpoints"
    assert losses(noisy[0])[0] != pytest.approx(losses(run(*settings, name="c"))[0], rel=1e-5)


@pytest.mark.slow
def test_ranks_sharded_or_not_have_the_curve_of_one_process(
    run: Run, corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    """A validation gathers sharded weights just before a reset."""
    settings = ("train.steps=10", "train.log_interval=1", "train.eval_interval=4", "train.condensation_interval=4")
    settings += (FORGET, f"intervention.teacher={teacher}")
    one = run(*settings, name="one")
    result = forked.train(
        *("-m", *TINY, *settings, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=${train.parallel}"),
        *("train.micro_batch_size=1", "train.parallel=ddp,fsdp"),
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    for name in ("ddp", "fsdp"):
        for key in ("loss", "dispersion", "distillation", "grad_norm"):
            assert losses(tmp_path / name, key) == pytest.approx(losses(one, key), rel=1e-5)
        ours, theirs = (checkpoint.load(checkpoint.find(folder)).optimizer for folder in (tmp_path / name, one))
        assert ours["wte.weight/step"] == theirs["wte.weight/step"] == 2


def test_a_model_card_names_only_the_interventions_of_its_run(run: Run) -> None:
    plain, noisy = run("train.steps=1", name="a"), run("train.steps=1", NOISE, name="b")
    cards = [model_card(checkpoint.load(checkpoint.find(folder)), "gpt2", None) for folder in (plain, noisy)]
    assert "intervention" not in cards[0]
    assert "intervention:\n  noise_alpha: 5.0\n```" in cards[1]


@pytest.mark.slow
def test_a_report_distinguishes_interventions(tmp_path: Path) -> None:
    arms = ("none", "dispersion", "noisy_embeddings", "active_forgetting", "distillation")
    for arm in arms:
        write_run(tmp_path / arm, "dispersion=off", f"intervention={arm}")
    expected = {"": [0.0, 0.1], "noise_alpha=5.0": [0.0], "forget_interval=200": [0.0], "teacher=out/teacher": [0.0]}
    assert rows(tmp_path) == expected
    write_run(tmp_path / "more", "dispersion=off", "intervention=distillation", "intervention.distillation_alpha=1")
    del expected["teacher=out/teacher"]
    alphas = {f"teacher=out/teacher, distillation_alpha={alpha}": [0.0] for alpha in (0.5, 1.0)}
    assert rows(tmp_path) == {**expected, **alphas}


def rows(folder: Path) -> dict[str, list[float]]:
    """A report's rows by their labels without the size, and the lambdas of each."""
    return {row.label.partition("), ")[2]: list(row.cells) for row in make_rows(read_runs(folder))}
