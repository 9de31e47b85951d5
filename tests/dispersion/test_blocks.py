"""The hidden states that `attach` finds in a model, and what it says where it finds none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attach_models import (
    LAMBDA,
    Block,
    C,
    Decoder,
    WithLoss,
    assert_equal,
    cross_entropy,
    gradients,
    made,
    tokens,
)
from torch import Tensor, nn

from nanodisp.dispersion import DispersionLoss, attach


@pytest.mark.parametrize("blocks", [nn.ModuleList, nn.ModuleDict, lambda made: nn.Sequential(*made)])
def test_blocks_and_the_norm_after_them_are_found(blocks: Any) -> None:
    handle = attach(made(WithLoss, blocks=blocks))
    assert handle.names == ["model.layers.0", "model.layers.1", "model.norm"]
    assert repr(handle) == (
        "Attached(angular, lambda_disp=0.1, model.layers.0, model.layers.1, model.norm (3 hidden states))"
    )


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [1, 2, 3]),
        ("last", [3]),
        ("first_half", [1]),
        ([0, 2], [0, 2]),
        ([-1], [3]),
        (["layers.0", "norm"], [1, 3]),
    ],
)
def test_layers_are_chosen(layers: Any, numbers: list[int]) -> None:
    model, idx = made(), tokens()
    attach(model, lambda_disp=LAMBDA, layers=layers)
    cross_entropy(model(idx), idx).backward()
    right, states = made(), []
    loss = cross_entropy(right(idx, states=states), idx)
    (loss + LAMBDA * torch.stack([DispersionLoss()(states[i]) for i in numbers]).mean()).backward()
    assert_equal(gradients(model), gradients(right))


def test_modules_are_taken_as_they_are() -> None:
    model = made(WithLoss)
    handle = attach(model, layers=[model.model.layers[1], model.model.norm])
    assert handle.names == ["model.layers.1", "model.norm"]


class Experts(nn.Module):
    """Blocks with more experts than there are blocks, and one for the norm's place that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.word_norm = nn.LayerNorm(C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(C, C) for _ in range(5))}) for _ in "ab"
        )
        self.emb_norm = nn.LayerNorm(C)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Decoder(), Decoder()


class Shared(nn.Module):
    """A block that runs three times, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()] * 3)
        self.norm = nn.LayerNorm(C)


def test_experts_are_no_blocks_and_the_norm_of_embeddings_is_not_the_last() -> None:
    assert attach(Experts()).names == ["blocks.0", "blocks.1"]


def test_mistakes_are_reported_in_one_line() -> None:
    mistakes: list[tuple[nn.Module, dict[str, Any], str]] = [
        (nn.Linear(2, 2), {}, r"no list of equal blocks found in Linear: give layers=\[…\]"),
        (Two(), {}, r"2 lists of 3 blocks each \(encoder.layers, decoder.layers\): give layers="),
        (made(), {"layers": [4]}, "layers names 4; the model has hidden states 0 to 3"),
        (made(), {"layers": "middle"}, "layers=middle is unknown; choose all, last"),
        (made(), {"layers": 3}, "layers=3 is unknown; choose all, last"),
        (made(), {"layers": ["layers.7"]}, "layers names 'layers.7', which the model does not have"),
        (made(), {"layers": [nn.Linear(2, 2)]}, "layers has Linear.*: give modules of the model"),
        (made(), {"layers": ["layers.0", "norm", "layers.0"]}, "layers names layers.0 twice"),
        (Shared(), {}, "layers has one block several times: give layers="),
        (made(), {"variant": "angles"}, "variant=angles is unknown; choose one of angular"),
        (made(), {"lambda_disp": -0.1}, "lambda_disp=-0.1 must be 0"),
        (made(), {"lambda_disp": math.nan}, "lambda_disp=nan must be 0"),
        (made(), {"tau": 0}, "tau=0 must be a positive number"),
        (made(), {"max_tokens": 1}, "max_tokens=1: a pair needs 2 tokens"),
        (made(), {"max_tokens": "a"}, "max_tokens=a: a pair needs 2 tokens; a whole number"),
    ]
    for model, settings, message in mistakes:
        with pytest.raises(ValueError, match=message) as error:
            attach(model, **settings)
        assert "\n" not in str(error.value)
    model, idx = made(), tokens()
    for layers, mask, message in (
        (["head"], torch.ones(4, 3), r"mask \[4, 3\] does not fit the hidden states \[4, 10\] of head"),
        ([model.layers[0].out, nn.Identity()], None, "layers has Identity"),
    ):
        with pytest.raises(ValueError, match=message):
            handle = attach(model, layers=layers)
            handle.mask = mask
            model(idx)


def test_a_state_that_does_not_pass_once_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.final_norm = nn.LayerNorm(C)

        def forward(self, x: Tensor, again: bool) -> Tensor:
            x = self.layers[1](self.layers[0](x))
            return self.layers[1](x) if again else x

    x = torch.randn(2, 5, C, requires_grad=True)
    attached = Odd()
    attach(attached)
    with pytest.raises(ValueError, match=r"final_norm did not run in a forward pass: name others in layers=\[…\]"):
        attached(x, again=False)
    attached = Odd()
    attach(attached, layers=["layers.0", "layers.1"])
    with pytest.raises(ValueError, match=r"layers.1 ran twice in one forward pass"):
        attached(x, again=True)
