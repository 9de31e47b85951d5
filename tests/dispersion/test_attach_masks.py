"""`attach` leaves padding out."""

from __future__ import annotations

import math

import pytest
import torch
from attach_models import (
    LAMBDA,
    RECOMPUTED,
    WithLabels,
    WithMask,
    Wrapped,
    assert_differ,
    assert_equal,
    cross_entropy,
    dispersions,
    explicit,
    gradients,
    made,
    masked,
    tokens,
)

from nanodisp.dispersion import attach


@RECOMPUTED
@pytest.mark.parametrize("n_tokens", [100, 6])
@pytest.mark.parametrize("given", ["argument", "keyword", "handle"])
def test_padding_is_left_out(given: str, n_tokens: int, recompute: bool | None) -> None:
    model, idx, mask = made(WithMask, recompute=recompute), tokens(n=5, length=12), torch.ones(5, 12)
    mask[0, 7:] = 0
    mask[1, :5] = 0
    mask[2, 4:] = 0
    mask[3, 1:] = 0  # one token is no pair
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=n_tokens)
    if given == "handle":
        handle.mask = mask.bool()
        loss, _ = model(idx, torch.ones(5, 12))
    else:
        loss, _ = model(idx, mask) if given == "argument" else model(idx, attention_mask=mask.long())
    loss.backward()
    right = made()
    dispersion = masked(right, idx, mask, n_tokens)
    (cross_entropy(right(idx), idx) + LAMBDA * dispersion).backward()
    assert_equal(gradients(model), gradients(right))
    assert handle.value == pytest.approx(dispersion.item(), rel=1e-10)
    assert_differ(gradients(model), explicit(idx))


def test_a_mask_holds_for_one_pass() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.mask = torch.arange(10).expand(4, 10) < 5
    for right in (torch.stack(dispersions(made(), idx[:, :5])).mean(), torch.stack(dispersions(made(), idx)).mean()):
        cross_entropy(model(idx), idx).backward()
        assert handle.value == pytest.approx(right.item(), rel=1e-10)


def test_another_argument_is_no_mask() -> None:
    model, idx = Wrapped(made(WithLabels)), tokens()
    attach(model, lambda_disp=LAMBDA)
    model(idx, idx, torch.zeros(4, 10))[0].backward()
    assert_equal(gradients(model), explicit(idx))


def test_a_batch_of_padding_alone_adds_nothing() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.mask = torch.zeros(4, 10)
    cross_entropy(model(idx), idx).backward()
    right = made()
    cross_entropy(right(idx), idx).backward()
    assert_equal(gradients(model), gradients(right))
    assert math.isnan(handle.value)


def test_a_batch_of_single_tokens_adds_nothing() -> None:
    model, idx = made(), tokens(length=1)
    handle = attach(model, lambda_disp=LAMBDA)
    model(idx).square().sum().backward()
    right = made()
    right(idx).square().sum().backward()
    assert_equal(gradients(model), gradients(right))
    assert math.isnan(handle.value)
