"""Rounding to a few levels: what it keeps, how far it moves a weight, and which matrices it moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nanodisp.errors import UserError
from nanodisp.models.blocks import GPTConfig
from nanodisp.models.gpt import GPT
from nanodisp.models.quantize import SCHEMES, quantize, round_to_levels

CONFIG = GPTConfig(2, 2, 32, 16, vocab_size=60)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@given(
    st.integers(2, 8),
    st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-20), min_size=1, max_size=40),
    st.sampled_from([None, 1, 3, 7, 128]),
)
def test_a_number_moves_by_at_most_half_a_step_of_its_group(bits: int, numbers: list[float], group: int | None) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    rounded = round_to_levels(x, bits, group)
    for part, moved in zip(x.split(group or len(x)), rounded.split(group or len(x)), strict=True):
        step = part.abs().max().item() / (2 ** (bits - 1) - 1)
        assert (moved - part).abs().max() <= step * (0.5 + 1e-4)
        assert moved.abs().max().item() == pytest.approx(part.abs().max().item(), rel=1e-5, abs=1e-30), "the ends stay"


def test_four_bits_have_fifteen_levels_that_rounding_again_keeps() -> None:
    x = torch.linspace(-1, 1, 5000).repeat(3, 1) * torch.tensor([[0.1], [1.0], [30.0]])
    once = round_to_levels(x, 4)
    assert all(len(row.unique()) == 15 for row in once)
    torch.testing.assert_close(round_to_levels(once, 4), once)
    assert round_to_levels(torch.zeros(2, 4), 4).eq(0).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_only_matrices_in_blocks_are_rounded(name: str) -> None:
    model = GPT(CONFIG)
    before = matrices(model)
    assert quantize(model, name) == 4 * CONFIG.n_layer
    for key, after in matrices(model).items():
        in_block = key.startswith("h.") and after.dim() == 2
        assert torch.equal(after, before[key]) != in_block, key
        if in_block:
            torch.testing.assert_close(after, round_to_levels(before[key], *SCHEMES[name][::2]))


def test_blocks_are_rounded_even_if_each_has_a_longer_list_of_experts() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict(
            {"attention": nn.Linear(8, 8), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(5))}
        )

    assert quantize(nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2))}), "int4") == 12


def test_a_model_moves_more_with_fewer_bits_and_with_rounded_activations() -> None:
    torch.manual_seed(0)
    idx, model = torch.randint(60, (4, 16)), GPT(CONFIG).eval()
    weights = model.state_dict()
    moved = {}
    for name in SCHEMES:
        rounded = GPT(CONFIG).eval()
        rounded.load_state_dict(weights)
        quantize(rounded, name)
        difference = rounded(idx).logits[..., :60] - model(idx).logits[..., :60]
        moved[name] = difference.norm().item() / model(idx).logits[..., :60].norm().item()
    assert 0 < moved["int8"] < moved["w8a8"] < moved["int4"] < moved["w4a4"] < math.inf
    assert moved["w8a8"] < 0.02 < moved["w4a4"], "of 8 bits little, of 4 bits much"


def test_the_inputs_of_a_product_are_rounded_token_by_token() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(8, 3)])
    quantize(model, "w8a8")
    part = model.blocks[0]
    x = torch.randn(2, 5, 8)
    x[0, 0] *= 1000  # no other token becomes coarser
    exact = nn.functional.linear(round_to_levels(x, 8), part.weight, part.bias)
    torch.testing.assert_close(part(x), exact)
    for token in x.flatten(0, 1):
        torch.testing.assert_close(part(token), nn.functional.linear(round_to_levels(token, 8), part.weight, part.bias))


@pytest.mark.parametrize(("name", "bits", "groups"), [("int8", 8, [200]), ("int4", 4, [128, 72])])
def test_a_scale_is_shared_by_a_row_at_8_bits_and_by_128_inputs_at_4(name: str, bits: int, groups: list[int]) -> None:
    torch.manual_seed(0)
    block = nn.Linear(200, 3)
    weight = block.weight.detach() * torch.logspace(-3, 0, 200)  # every part has another largest value
    with torch.no_grad():
        block.weight.copy_(weight)
    quantize(nn.ModuleList([block]), name)
    expected = torch.cat([round_to_levels(part, bits) for part in weight.split(groups, dim=1)], dim=1)
    assert torch.equal(block.weight, expected)


def test_gpt2_of_transformers_is_rounded_by_output_feature() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    before = matrices(model)
    assert quantize(model, "int8") == 8
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(matrices(model)[name], round_to_levels(before[name].T, 8).T)
    assert torch.equal(matrices(model)["transformer.wte.weight"], before["transformer.wte.weight"])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no list of blocks"):
        quantize(nn.Linear(2, 2), "int8")
