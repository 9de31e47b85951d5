"""Groups, optimizers, the schedule, and optimizer state by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training.optim import (
    OptimConfig,
    build_optimizers,
    clip_gradients,
    first_not_finite,
    load_state_tensors,
    lr_scale,
    set_lr,
    state_tensors,
    step_unless,
    with_rates,
)


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=20))


def step(model: GPT, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    idx = torch.randint(20, (2, 4), generator=torch.Generator().manual_seed(seed))
    model(idx, idx).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def names_of(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Parameter name -> weight decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_adamw_decays_only_matrices_and_covers_every_parameter() -> None:
    model = small_model()
    (adamw,) = build_optimizers(model, OptimConfig(lr=1e-3, weight_decay=0.1))
    decay = names_of(model, adamw)
    assert decay == {name: 0.1 if p.dim() == 2 else 0.0 for name, p in model.named_parameters()}


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = small_model()
    adamw, muon = build_optimizers(model, OptimConfig(name="muon", lr=1e-3, muon_lr=1e-3))
    in_blocks = {name for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert set(names_of(model, muon)) == in_blocks
    assert set(names_of(model, adamw)) == {name for name, _ in model.named_parameters()} - in_blocks


def test_rates_that_are_left_open_follow_the_width_and_are_higher_for_adamw_beside_muon() -> None:
    assert with_rates(OptimConfig(), 768).lr == pytest.approx(5e-4)
    muon = with_rates(OptimConfig(name="muon"), 768)
    assert (muon.lr, muon.muon_lr) == pytest.approx((3.5e-3, 5e-4))
    given = with_rates(OptimConfig(name="muon", lr=0.1, muon_lr=0.2), 768)
    assert (given.lr, given.muon_lr) == (0.1, 0.2)
    for config in (OptimConfig(), OptimConfig(name="muon", lr=0.1)):
        with pytest.raises(ValueError, match="use with_rates"):
            build_optimizers(small_model(), config)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_with_loaded_state_continue_bit_for_bit(name: str) -> None:
    config = OptimConfig(name=name, lr=1e-3, muon_lr=1e-3)
    model = small_model()
    optimizers = build_optimizers(model, config)
    for seed in range(3):
        step(model, optimizers, seed)
    other = small_model()
    other.load_state_dict(model.state_dict())
    fresh = build_optimizers(other, config)
    load_state_tensors(other, fresh, {k: v.clone() for k, v in state_tensors(model, optimizers).items()})
    step(model, optimizers, 3)
    step(other, fresh, 3)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 300),
)
def test_schedule_rises_then_never_rises_again(
    schedule: str, warmup: int, decay_fraction: float, floor: float, total: int
) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=decay_fraction, min_lr_fraction=floor)
    scales = [lr_scale(config, step, total) for step in range(total)]
    peak = scales.index(max(scales))
    assert all(0 <= scale <= 1 for scale in scales)
    assert scales[:peak] == sorted(scales[:peak])
    assert scales[peak:] == sorted(scales[peak:], reverse=True)
    assert min(scales[peak:]) >= min(floor, scales[peak]) - 1e-12


def test_schedules_have_the_expected_values() -> None:
    cosine = OptimConfig(warmup_steps=10, min_lr_fraction=0.1)
    assert lr_scale(cosine, 0, 1000) == pytest.approx(1 / 11)
    assert lr_scale(cosine, 10, 1000) == 1.0
    assert lr_scale(cosine, 505, 1000) == pytest.approx(0.55)
    assert lr_scale(cosine, 999, 1000) == pytest.approx(0.1, abs=1e-4)
    wsd = OptimConfig(schedule="linear", warmup_steps=10, decay_fraction=0.2, min_lr_fraction=0.0)
    assert lr_scale(wsd, 799, 1000) == 1.0
    assert lr_scale(wsd, 900, 1000) == pytest.approx(0.5)
    assert lr_scale(OptimConfig(schedule="constant"), 999, 1000) == 1.0
    assert lr_scale(OptimConfig(warmup_steps=100), 5, 50) == 1.0  # warm-up takes a tenth of a short run at most
    fifth = OptimConfig(warmup_steps=1, warmup_fraction=0.2)
    assert [lr_scale(fifth, step, 1000) for step in (99, 199, 200)] == pytest.approx([100 / 201, 200 / 201, 1.0])
    assert lr_scale(fifth, 10, 50) == 1.0


def test_set_lr_scales_every_group_from_its_own_peak() -> None:
    config = OptimConfig(name="muon", lr=1e-3, muon_lr=2e-2, schedule="linear", warmup_steps=0, min_lr_fraction=0.0)
    optimizers = build_optimizers(small_model(), config)
    for step, scale in ((50, 0.5), (75, 0.25)):
        set_lr(optimizers, config, step, 100)
        for optimizer, peak in zip(optimizers, (1e-3, 2e-2), strict=True):
            assert {group["lr"] for group in optimizer.param_groups} == {peak * scale}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "choose one of adamw, muon"),
        ({"schedule": "step"}, "choose one of cosine, linear, constant"),
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"beta2": 1.0}, "optim.beta2=1.0"),
        ({"grad_clip": 0.0}, "null never clips"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must not be negative"),
    ],
)
def test_impossible_values_are_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)  # type: ignore[arg-type]


def clip(model: GPT, max_norm: float | None) -> torch.Tensor:
    return clip_gradients(model, [], torch.amp.GradScaler("cpu", enabled=False), max_norm)


def test_clipping_is_that_of_pytorch_and_leaves_gradients_that_are_not_finite() -> None:
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    norm = clip(ours, 0.5)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    first = next(ours.parameters())
    before = [p.grad.clone() for p in ours.parameters()]
    first.grad[0, 0] = math.nan
    assert clip(ours, 0.5).isnan()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(list(ours.parameters())[1:], before[1:], strict=True))


@pytest.mark.parametrize("bad_steps", [{0}, {1, 2}, set()])
def test_a_bad_step_of_muon_is_taken_back(bad_steps: set[int]) -> None:
    def trained(skips: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = small_model()
        optimizers = build_optimizers(model, OptimConfig(name="muon", lr=0.1, muon_lr=0.1))
        for step in range(4):
            idx = torch.full((2, 4), step)
            model(idx, idx).loss.backward()
            if bad := step in bad_steps:
                model.h[0].mlp.c_fc.weight.grad.fill_(math.nan)
            for optimizer in optimizers:
                if not skips:
                    step_unless(torch.tensor(bad), optimizer)
                elif not bad:
                    optimizer.step()
                optimizer.zero_grad()
        return model.state_dict(), state_tensors(model, optimizers)

    (taken_back, states), (skipped, expected) = trained(skips=False), trained(skips=True)
    for name, weight in skipped.items():
        assert torch.equal(taken_back[name], weight), name
    for name, state in expected.items():
        assert torch.equal(states[name], state), name


def test_a_number_that_is_not_finite_is_traced_to_its_layer() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=8, block_size=8, vocab_size=10))
    idx = torch.zeros(1, 8, dtype=torch.int64)
    model(idx, idx).loss.backward()
    assert first_not_finite(model, idx) == "the loss"
    model.h[1].mlp.c_fc.weight.grad[0, 0] = math.inf
    assert first_not_finite(model, idx) == "the gradient of h.1.mlp.c_fc.weight"
    with torch.no_grad():
        model.h[1].attn.c_proj.bias[0] = math.nan
    assert first_not_finite(model, idx) == "hidden state 2"
