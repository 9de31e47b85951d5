"""`attach` adds exactly lambda * the mean dispersion of the hidden states, in whatever loop the model is trained.

Here with models in plain torch; `test_attach_transformers.py` has those of transformers, `test_attach_ranks.py` DDP and
FSDP, `test_attach_compiled.py` torch.compile, `test_attach_masks.py` padding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attach_models import (
    LAMBDA,
    LAYERS,
    RECOMPUTED,
    Decoder,
    WithLoss,
    WithMask,
    assert_differ,
    assert_equal,
    cross_entropy,
    dispersions,
    explicit,
    gradients,
    made,
    masked,
    plain,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodisp.dispersion import DispersionLoss, attach

# --- gradients and value -----------------------------------------------------------------------------


@RECOMPUTED
@pytest.mark.parametrize(("variant", "n_tokens"), [("angular", 0), ("angular", 5), ("condition", 5), ("sigreg", 5)])
def test_the_gradients_and_the_value_are_those_of_the_explicit_sum(
    variant: str, n_tokens: int, recompute: bool | None
) -> None:
    model, idx = made(recompute=recompute), tokens()
    handle = attach(model, variant=variant, lambda_disp=LAMBDA, max_tokens=n_tokens or None)
    for step in (1, 2):
        model.zero_grad()
        loss = cross_entropy(model(idx), idx)
        assert loss.item() == cross_entropy(made()(idx), idx).item(), "the loss that the loop sees stays as it is"
        loss.backward()
        assert_equal(gradients(model), explicit(idx, variant=variant, n_tokens=n_tokens, step=step))
        right = torch.stack(dispersions(made(), idx, variant, n_tokens, step)).mean().item()
        assert handle.value == pytest.approx(right, rel=1e-10)
    assert math.isnan(handle.value), "nothing since it was read"


def test_other_tokens_and_directions_are_drawn_in_each_pass() -> None:
    for variant, n_tokens in (("angular", 5), ("sigreg", 0)):
        first, second = (explicit(tokens(), variant=variant, n_tokens=n_tokens, step=step) for step in (1, 2))
        assert_differ(first, second)


def test_the_value_is_the_mean_since_it_was_last_read() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    right = []
    for seed in (1, 2, 3):
        cross_entropy(model(tokens(seed=seed)), tokens(seed=seed)).backward()
        right.append(torch.stack(dispersions(made(), tokens(seed=seed))).mean().item())
    assert handle.value == pytest.approx(sum(right) / 3, rel=1e-10)
    cross_entropy(model(tokens()), tokens()).backward()
    assert handle.value == pytest.approx(torch.stack(dispersions(made(), tokens())).mean().item(), rel=1e-10)


def test_float32_and_bfloat16_models_are_measured_in_float32() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-4)):
        model = made(dtype=dtype)
        handle = attach(model, lambda_disp=LAMBDA, backend="reference")
        cross_entropy(model(tokens()).float(), tokens()).backward()
        states: list[Tensor] = []
        made(dtype=dtype)(tokens(), states=states)
        right = sum(DispersionLoss(backend="reference")(state.float()).item() for state in states[1:]) / LAYERS
        assert handle.value == pytest.approx(right, rel=tolerance)
        assert all(p.grad.dtype == dtype for p in model.parameters())
    model = made(dtype=torch.float32)
    attach(model, lambda_disp=LAMBDA)
    cross_entropy(model(tokens()), tokens()).backward()
    assert_equal(gradients(model), explicit(tokens(), model=made(dtype=torch.float32)), 1e-5)


# --- how the loss is scaled -----------------------------------------------------------------------------


@RECOMPUTED
@pytest.mark.parametrize("kind", [Decoder, WithLoss])
def test_accumulation_and_the_scale_of_float16_reach_the_dispersion(kind: Any, recompute: bool | None) -> None:
    model, n, scaler = made(kind, recompute=recompute), 4, torch.amp.GradScaler("cpu", init_scale=2.0**14)
    handle = attach(model, lambda_disp=LAMBDA)
    right = [torch.zeros_like(p) for p in made().parameters()]
    for seed in range(n):
        idx = tokens(seed=seed)
        loss = model(idx)[0] if kind is WithLoss else handle.follow(cross_entropy(model(idx), idx))
        scaler.scale(loss / n).backward()
        right = [a + b for a, b in zip(right, explicit(idx, times=2.0**14 / n), strict=True)]
    assert_equal(gradients(model), right)


def test_a_loss_that_is_already_divided_has_a_share() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    (3 * handle.follow(cross_entropy(model(tokens()), tokens()) / 4, share=torch.tensor(0.25))).backward()
    assert_equal(gradients(model), explicit(tokens(), times=3 / 4))


def test_a_loss_that_is_followed_by_hand_and_by_itself_counts_once() -> None:
    model = made(WithLoss)
    handle = attach(model, lambda_disp=LAMBDA)
    for _ in range(3):
        model.zero_grad()
        (handle.follow(model(tokens())[0]) / 5).backward()
        assert_equal(gradients(model), explicit(tokens(), times=1 / 5))


def test_without_a_loss_to_follow_the_scale_is_given() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.scale = 1 / 4
    for _ in range(2):
        model.zero_grad()
        (cross_entropy(model(tokens()), tokens()) / 4).backward()
        assert_equal(gradients(model), explicit(tokens(), times=1 / 4))
    handle.scale = 1
    model.zero_grad()
    cross_entropy(model(tokens()), tokens()).backward()
    assert_equal(gradients(model), explicit(tokens()))


@RECOMPUTED
def test_two_passes_before_one_backward(recompute: bool | None) -> None:
    """Of other lengths, weights and masks: a recomputed block must belong to its own pass."""
    batches = tokens(length=12), tokens(n=3, length=9, seed=1)
    masks = [torch.ones(batch.shape) for batch in batches]
    masks[0][:2, 5:] = 0
    masks[1][2, :4] = 0
    model = made(WithMask, recompute=recompute)
    attach(model, lambda_disp=LAMBDA, max_tokens=6)
    losses = [model(batch, mask)[0] for batch, mask in zip(batches, masks, strict=True)]
    (losses[0] / 2 + 3 * losses[1]).backward()
    right = made()
    for step, (batch, mask, times) in enumerate(zip(batches, masks, (1 / 2, 3), strict=True), start=1):
        (times * (cross_entropy(right(batch), batch) + LAMBDA * masked(right, batch, mask, 6, step))).backward()
    assert_equal(gradients(model), gradients(right))


class Recomputed(nn.Module):
    """Recomputes all of its model at once."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def forward(self, idx: Tensor) -> Tensor:
        return checkpoint(self.model, idx, use_reentrant=False)


def test_a_model_that_is_recomputed_as_a_whole() -> None:
    model, idx = made(Recomputed), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    for step in (1, 2):
        model.zero_grad()
        (handle.follow(cross_entropy(model(idx), idx)) / 3).backward()
        assert_equal(gradients(model), explicit(idx, times=1 / 3, n_tokens=5, step=step))
    assert handle.passes == 2


@RECOMPUTED
def test_one_loss_may_cover_two_passes(recompute: bool | None) -> None:
    batches = tokens(), tokens(seed=1)
    model = made(recompute=recompute)
    handle = attach(model, lambda_disp=LAMBDA)
    for _ in range(2):
        model.zero_grad()
        loss = sum(cross_entropy(model(batch), batch) for batch in batches)
        (handle.follow(loss) / 2).backward()
        right = [sum(pair) for pair in zip(*(explicit(batch, times=1 / 2) for batch in batches), strict=True)]
        assert_equal(gradients(model), right)


# --- when nothing is added ------------------------------------------------------------------------------------


def test_in_eval_mode_nothing_is_added() -> None:
    model, idx = made().eval(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))
    assert math.isnan(handle.value)


def test_without_gradients_nothing_is_computed_or_drawn() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    with torch.no_grad():
        assert torch.equal(model(idx), made()(idx))
    assert handle.passes == 0
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=1))


def test_detached_the_model_is_as_before() -> None:
    model, idx = made(), tokens()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with attach(model, lambda_disp=LAMBDA, layers=[0, 1, 3]) as handle:
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] != before
    handle.detach()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))


def test_lambda_can_follow_a_schedule() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=0)
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))
    handle.lambda_disp = LAMBDA
    model.zero_grad()
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx))
    with pytest.raises(ValueError, match="lambda_disp=-1 must be"):
        handle.lambda_disp = -1
    assert handle.lambda_disp == LAMBDA


def test_the_global_generator_is_not_used_and_passes_can_be_resumed() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    handle.passes = 41
    before = torch.get_rng_state()
    cross_entropy(model(idx), idx).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert handle.passes == 42
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=42))


def test_a_pass_that_failed_does_not_disturb_the_next() -> None:
    def fail(*_: Any) -> None:
        raise ValueError("in the middle of a pass")

    model, idx = made(), tokens()
    last = attach(model, lambda_disp=LAMBDA, max_tokens=5).states[-1].module
    with pytest.raises(IndexError):
        model(tokens() + 100)
    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        model(idx)
    hook.remove()
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=3))
