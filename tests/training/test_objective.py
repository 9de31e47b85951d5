"""The loss terms: one that is added is trained, recorded, shown and reported under its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import records
from torch import Tensor

from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.placement import DispersionConfig, sample_slices
from nanodisp.models.gpt import GPT, GPTConfig, SoftTargets
from nanodisp.report import __main__ as report
from nanodisp.runs.read import read_run
from nanodisp.runs.trackers import scalars
from nanodisp.training.interventions import InterventionConfig
from nanodisp.training.objective import Objective, Terms, add_up

Run = Callable[..., Path]
WEIGHT = 0.7


@pytest.fixture
def with_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term "norm", the mean square of the token embeddings, added as the head of objective.py says."""
    forward, weights_at = Terms.forward, Objective.weights_at

    def terms(self: Terms, x: Tensor, y: Tensor, *drawn: Tensor | SoftTargets | None) -> dict[str, Tensor]:
        return forward(self, x, y, *drawn) | {"norm": self.model.embedding.weight.square().mean()}

    def weights(self: Objective, step: int) -> dict[str, float]:
        return weights_at(self, step) | {"norm": WEIGHT}

    monkeypatch.setattr(Terms, "forward", terms)
    monkeypatch.setattr(Objective, "weights_at", weights)


def embedding_gradient(monkeypatch: pytest.MonkeyPatch, weight: float) -> tuple[Tensor, Tensor]:
    """The token embeddings, and the gradient of the objective's loss with this weight of "norm"."""
    monkeypatch.setattr("test_objective.WEIGHT", weight)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=6, vocab_size=20))
    objective = Objective(model, DispersionConfig(), InterventionConfig(), seed=0, total_steps=1)
    objective.begin(0)
    idx = torch.randint(20, (2, 7))
    loss, terms = objective(idx[:, :-1], idx[:, 1:])
    assert set(terms) == {"loss", "dispersion", "norm"}
    loss.backward()
    assert model.embedding.weight.grad is not None
    return model.embedding.weight.detach(), model.embedding.weight.grad


@pytest.mark.usefixtures("with_norm")
def test_the_gradient_has_an_added_term_at_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, without = embedding_gradient(monkeypatch, 0.0)
    _, with_term = embedding_gradient(monkeypatch, 0.7)
    torch.testing.assert_close(with_term - without, 0.7 * 2 * weight / weight.numel(), atol=1e-7, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("with_norm")
def test_an_added_term_is_trained_recorded_shown_and_reported_by_its_name(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.steps=20", "train.log_interval=10", "train.micro_batch_size=2")
    folder = run(*settings, name="light")
    record = records(folder, "train")[-1]
    assert f"norm {record['norm']:.4f}" in capsys.readouterr().out
    assert scalars(record)["train/norm"] == record["norm"]
    assert read_run(folder).numbers["norm, training"] == record["norm"]

    monkeypatch.setattr("test_objective.WEIGHT", 1e4)
    heavier = records(run(*settings, name="heavy"), "train")
    assert heavier[0]["norm"] == records(folder, "train")[0]["norm"], "of the same initial weights"
    assert heavier[-1]["norm"] < 0.9 * record["norm"]

    report.main([str(tmp_path)])
    assert "norm, training" in (tmp_path / "report" / "report.md").read_text().lower()
    assert "norm, training" in (tmp_path / "report" / "runs.csv").read_text()


def test_terms_are_averaged_over_micro_batches() -> None:
    sums: dict[str, Tensor] = {}
    for value in (1.0, 5.0):
        add_up(sums, {"loss": torch.tensor(value, requires_grad=True)}, 2)
    assert sums["loss"] == 3 and not sums["loss"].requires_grad


def test_weights_follow_the_step() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=6, vocab_size=20))
    dispersion = DispersionConfig(lambda_disp=0.4, schedule="warmup", warmup_fraction=0.5)
    distillation = InterventionConfig(teacher="a", distillation_alpha=0.25, distillation_temperature=3.0)
    objective = Objective(model, dispersion, distillation, seed=0, total_steps=8)
    assert objective.weights_at(0) == {"loss": 0.75, "dispersion": 0.0, "distillation": 2.25}
    assert [objective.weights_at(step)["dispersion"] for step in (1, 2, 4, 7)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    objective.begin(2)
    assert objective.weights["dispersion"] == pytest.approx(0.2)


def test_without_dispersion_no_tokens_are_drawn_for_it() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=20))
    for lambda_disp in (0.0, 0.1):
        config = DispersionConfig(lambda_disp=lambda_disp, max_tokens=2)
        objective = Objective(model, config, InterventionConfig(), seed=0, total_steps=2)
        objective.begin(0)
        assert (objective.positions is None) == (lambda_disp == 0)


def test_random_directions_are_drawn_again_for_every_step_and_used() -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=20))
    objective = Objective(model, DispersionConfig("sigreg"), InterventionConfig(), seed=5, total_steps=9)
    idx = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
    hidden = model(idx[:, :-1], take=([1, 2], torch.arange(6).repeat(2, 1))).hidden.flatten(0, 1)
    seen = []
    for step in (3, 4):
        objective.begin(step)
        right = DispersionLoss("sigreg")(hidden, sample_slices("sigreg", 5, step, 8))
        first, again = (objective(idx[:, :-1], idx[:, 1:])[1]["dispersion"] for _ in range(2))
        torch.testing.assert_close(first, right)
        assert torch.equal(first, again), "all micro-batches of a step have the same directions"
        seen.append(first.item())
    assert seen[0] != seen[1]
    assert Objective(model, DispersionConfig(), InterventionConfig(), seed=5, total_steps=9).slices is None
