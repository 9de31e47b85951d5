"""Training a bidirectional encoder on masked tokens: its loss has its own name, and no door takes it for a decoder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compose, losses, records, weights
from tiny_models import write_checkpointed_run

import sample
from nanodisp.condensation import __main__ as condensation
from nanodisp.condensation.cosine import mean_cosine
from nanodisp.condensation.layers import LAYER_FIGURES, POOLED_FIGURES
from nanodisp.condensation.measure import measure
from nanodisp.config import identity
from nanodisp.data.batches import Batches, mask_tokens, read_windows
from nanodisp.data.corpus import open_corpus
from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import sample_positions
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.hf import __main__ as hf
from nanodisp.hf.open import build, open_run, open_source
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training.validation import Validation

Run = Callable[..., Path]
BY_LAYER = {*LAYER_FIGURES, *POOLED_FIGURES}
ENCODER = "model.causal=false"
CURVE = ("train.steps=8", "train.log_interval=1", "train.eval_interval=4", "train.condensation_interval=4", ENCODER)


def encoder() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257, causal=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_an_encoder_learns_and_its_loss_has_its_own_name(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train.steps=60", "train.log_interval=20", "train.eval_interval=20", ENCODER)
    assert set(records(folder, "train")[0]) == {
        *("step", "split", "masked_loss", "dispersion", "lambda_disp", "lr", "grad_norm", "bad_steps"),
        *("tokens", "tokens_per_second", "mfu", "seconds"),
    }
    val = records(folder, "val")
    assert set(val[0]) == {*("step", "split", "masked_loss", "train_masked_loss", "tokens", "seconds"), *BY_LAYER}
    assert val[-1]["masked_loss"] < val[0]["masked_loss"] - 0.5
    assert open_run(str(folder)).saved.state["val_loss"] == val[-1]["masked_loss"]
    printed = capsys.readouterr().out
    assert f"validation masked loss {val[-1]['masked_loss']:.4f} nats per masked token after 60 steps" in printed
    assert "bits per byte" not in printed and "sample" not in printed
    assert f"python -m nanodisp.condensation checkpoint={folder}" in printed
    assert not (folder / "samples.txt").exists()


def test_the_loss_of_a_step_is_the_formula(run: Run, corpus: Path) -> None:
    """(1 - alpha) masked loss + alpha temperature^2 KL from another encoder + lambda dispersion, on all logits."""
    teacher = run("train.steps=3", ENCODER, "model.n_embd=24", name="teacher")
    settings = (f"intervention.teacher={teacher}", "intervention.distillation_alpha=0.3", "dispersion.lambda_disp=0.5")
    folder = run("train.steps=1", ENCODER, *settings)

    config = compose(*TINY, "model.vocab_size=257", ENCODER)
    torch.manual_seed(config.seed)
    model, taught_by = GPT(config.model), build(open_source(str(teacher)).weights)
    data = open_corpus(corpus, "byte").train
    batches = Batches(data, block_size=16, batch_size=4, seed=config.seed, vocab_size=257)
    text, _ = batches.batch(0)
    x, y = mask_tokens(text, np.arange(4), (config.seed, 0), 257)
    chosen = y != -100
    ours, theirs = (m(x).logits[chosen][:, :257] for m in (model, taught_by))
    loss = F.cross_entropy(ours, text[chosen])
    q, p = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    hidden = model(x, take=([1, 2], sample_positions(config.seed, 0, [1, 2], 16, 8))).hidden
    dispersion = DispersionLoss()(hidden.flatten(0, 1))
    total = 0.7 * loss + 0.3 * 4 * kl + 0.5 * dispersion
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]).norm()

    (record,) = records(folder, "train")
    found = [record[key] for key in ("masked_loss", "distillation", "dispersion", "grad_norm")]
    assert found == pytest.approx([loss.item(), kl.item(), dispersion.item(), norm.item()], rel=1e-4)


def test_validation_has_the_same_masks_for_every_run_and_measures_layers_of_the_text(corpus: Path) -> None:
    model, data = encoder(), open_corpus(corpus, "byte")
    world, autocast = World(0, 1, torch.device("cpu")), contextlib.nullcontext
    validation = Validation(data, world, block_size=16, n_windows=8, rows=3, autocast=autocast)
    measured = validation(model)
    spread = lambda tokens, n: np.array([i * ((len(tokens) - 1) // 16) // n for i in range(n)])  # noqa: E731
    for name, tokens, n in (("masked_loss", data.val, 8), ("train_masked_loss", data.train, 2)):
        windows = spread(tokens, n)
        text, _ = read_windows(tokens, windows, 16, 257)
        x, y = mask_tokens(text, windows, (0,), 257)
        with torch.no_grad():
            loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
            cosines = [mean_cosine(z).item() for z in model.hidden_states(text)]
            of_masked = [mean_cosine(z).item() for z in model.hidden_states(x)]
        assert measured[name] == pytest.approx(loss.item(), rel=1e-5)
        if name == "masked_loss":
            assert measured["mean_cosine"] == pytest.approx(cosines, rel=1e-4)
            assert measured["mean_cosine"] != pytest.approx(of_masked, rel=1e-2)
    assert set(measured) == {"masked_loss", "train_masked_loss", *BY_LAYER}


@pytest.mark.slow
def test_micro_batches_and_recomputation_do_not_change_the_run(run: Run) -> None:
    whole = run(*CURVE)
    parts = run(*CURVE, "train.micro_batch_size=1", "train.activation_checkpointing=true", name="parts")
    for key in ("masked_loss", "grad_norm"):
        assert losses(parts, key) == pytest.approx(losses(whole, key), rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_run_has_the_same_curve(run: Run) -> None:
    settings = ("train.steps=3", "train.log_interval=1", "model.n_layer=1", ENCODER)
    plain, compiled = run(*settings, name="a"), run(*settings, "train.compile=true", name="b")
    assert losses(compiled, "masked_loss") == pytest.approx(losses(plain, "masked_loss"), rel=1e-4)
    for ours, theirs in zip(records(compiled, "val"), records(plain, "val"), strict=True):
        assert ours["masked_loss"] == pytest.approx(theirs["masked_loss"], rel=1e-4)
        assert ours["mean_cosine"] == pytest.approx(theirs["mean_cosine"], rel=1e-3)


@pytest.mark.slow
def test_ranks_sharded_or_not_have_the_curve_of_one_process(run: Run, corpus: Path, tmp_path: Path) -> None:
    """With forgetting, a teacher, and a validation chunk more on one rank."""
    teacher = run("train.steps=20", "optim.lr=3e-2", ENCODER, name="teacher")
    settings = (*CURVE, "train.eval_windows=5", "intervention.forget_interval=4", f"intervention.teacher={teacher}")
    one = run(*settings, name="one")
    result = forked.train(
        *("-m", *(s for s in TINY if "sample" not in s), *settings, f"data.path={corpus}", f"out_dir={tmp_path}"),
        *("run_name=${train.parallel}", "train.micro_batch_size=1", "train.parallel=ddp,fsdp"),
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    for name in ("ddp", "fsdp"):
        for key in ("masked_loss", "dispersion", "distillation", "grad_norm"):
            assert losses(tmp_path / name, key) == pytest.approx(losses(one, key), rel=1e-5)
        for ours, theirs in zip(records(tmp_path / name, "val"), records(one, "val"), strict=True):
            assert ours["masked_loss"] == pytest.approx(theirs["masked_loss"], rel=1e-5)
            assert ours["mean_cosine"] == pytest.approx(theirs["mean_cosine"], rel=1e-4)


def test_noise_and_forgetting_act_on_an_encoder(run: Run) -> None:
    plain = losses(run(*CURVE, name="a"), "masked_loss")
    noisy = losses(run(*CURVE, "intervention.noise_alpha=5", name="b"), "masked_loss")
    forgetful = losses(run(*CURVE, "intervention.forget_interval=4", name="c"), "masked_loss")
    assert noisy[0] != plain[0]
    assert forgetful[:4] == plain[:4] and forgetful[4] > plain[4] + 0.01


def test_training_goes_on_from_an_encoder_and_not_from_a_decoder(run: Run) -> None:
    folder, decoder = run(*CURVE, name="encoder"), run("train.steps=1", name="decoder")
    again = run("train.steps=1", ENCODER, f"init_from={folder}", "optim.lr=1e-12", name="again")
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(weights(again)[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"another shape: give model.causal=true$"):
        run("train.steps=1", ENCODER, f"init_from={decoder}", name="x")


@pytest.mark.parametrize("student", ["encoder", "decoder"])
def test_a_teacher_of_the_other_kind_is_rejected(student: str, tmp_path: Path, run: Run) -> None:
    causal = student == "decoder"
    teacher = write_checkpointed_run(tmp_path / "teacher", "byte", causal=not causal)
    with pytest.raises(UserError) as error:
        run("train.steps=1", f"model.causal={causal}", f"intervention.teacher={teacher}")
    for part in ("decoder", "encoder", f"choose a teacher with model.causal={str(causal).lower()}"):
        assert part in str(error.value)


def test_an_encoder_is_not_sampled_exported_or_evaluated(tmp_path: Path) -> None:
    folder = write_checkpointed_run(tmp_path / "run", "byte", causal=False)
    doors: dict[str, Callable[[], object]] = {
        "generate text": lambda: sample.main([f"checkpoint={folder}"]),
        "be exported": lambda: hf.main(["export", f"checkpoint={folder}", f"to={tmp_path / 'to'}"]),
    }
    for cannot, door in doors.items():
        with pytest.raises(UserError) as error:
            door()
        assert f"cannot {cannot}; python -m nanodisp.condensation measures its layers" in str(error.value)
    assert not (tmp_path / "to").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_condensation_command_measures_an_encoder_on_text_without_masks(run: Run, corpus: Path) -> None:
    folder = run("train.steps=2", ENCODER)
    condensation.main([f"checkpoint={folder}", "windows=5", "device=cpu"])
    found = json.loads((folder / "condensation.json").read_text())
    tokens = open_corpus(corpus, "byte").val
    windows = np.arange(5) * ((len(tokens) - 1) // 16) // 5
    expected = measure(open_run(str(folder)).model, read_windows(tokens, windows, 16, 257)[0])
    assert [layer["mean"] for layer in found["layers"]] == pytest.approx(expected.mean.tolist(), abs=1e-6)


# --- the objective ---------------------------------------------------------------------------


def test_the_objective_is_that_of_the_model_and_no_part_of_a_runs_identity() -> None:
    for preset, objective in (("nano", "next_token"), ("nano_encoder", "masked_lm")):
        left, given = compose(f"model={preset}"), compose(f"model={preset}", f"objective={objective}")
        assert left.objective == given.objective == objective
        assert "objective" not in identity(dataclasses.asdict(given)), "older checkpoints do not have it"
    assert compose("model=nano_encoder").model == compose("model=nano", ENCODER).model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("objective=masked_lm",), "objective=masked_lm needs model.causal=false, as in model=nano_encoder"),
        (("objective=next_token", ENCODER), "objective=next_token needs model.causal=true"),
        (("objective=clm",), "objective=clm is unknown; choose one of next_token, masked_lm"),
        ((ENCODER, "train.eval_task=x"), "eval_tasks need a model that predicts the next token: leave them out"),
    ],
)
def test_an_objective_that_does_not_fit_the_model_is_rejected(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        compose(*settings)
    assert message in str(error.value)
