"""Everything random in a step is drawn from (seed, step, rank): it differs between them and is the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose, losses, write_corpus

import train
from nanodisp.data.corpus import open_corpus
from nanodisp.distributed import World
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.plan import resolve
from nanodisp.training import interventions
from nanodisp.training.objective import Objective

Run = Callable[..., Path]
CPU = torch.device("cpu")
RANDOM = pytest.mark.parametrize("option", ["model.dropout=0.2", "intervention.noise_alpha=50"])


@RANDOM
def test_dropout_and_noise_differ_between_steps_and_ranks_and_are_the_same_again(corpus: Path, option: str) -> None:
    config = compose(*TINY, f"data.path={corpus}", "dispersion=off", option)
    plan = resolve(config, open_corpus(corpus, "byte"), World(0, 1, CPU))
    torch.manual_seed(0)
    model = GPT(plan.config.model)
    interventions.apply(model, plan.config.intervention)
    objective = Objective(model, plan.config.dispersion, plan.config.intervention, seed=0, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    idx = torch.randint(257, (4, 17))

    def loss(step: int, rank: int) -> float:
        world = World(rank, 2, CPU)
        return train.forward_backward(objective, scaler, plan, world, step, idx[:, :-1], idx[:, 1:])["loss"].item()

    drawn = [loss(step, rank) for step in range(3) for rank in range(2)]
    assert len(set(drawn)) == 6
    assert [loss(step, rank) for step in range(3) for rank in range(2)] == drawn


@RANDOM
def test_a_run_draws_dropout_and_noise_again_at_every_step(run: Run, tmp_path: Path, option: str) -> None:
    one_window = write_corpus(tmp_path / "one", n_train=17)  # the same batch at every step
    settings = (f"data.path={one_window}", "dispersion=off", "train.steps=6", "train.log_interval=1")
    still = "optim.lr=1e-12"  # the weights stay the same too
    assert len(set(losses(run(*settings, still, name="without")))) == 1
    assert len(set(losses(run(*settings, still, option, name="with")))) == 6


def test_dropout_acts_on_attention_weights_as_well_as_on_outputs() -> None:
    torch.manual_seed(0)
    p, T = 0.5, 12
    attention = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=20, dropout=p)).blocks[0].attn
    x = torch.randn(2, T, 16)
    plain = attention.eval()(x, None, None)
    dropped = attention.train()(x, None, None)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7, "of the outputs"
    ratio = (1 - p) * dropped[kept] / plain[kept]  # 1 everywhere if only outputs were dropped
    assert ((ratio - 1).abs() > 0.01).float().mean() > 0.9
