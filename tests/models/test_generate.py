"""Tokens one after the other: with a cache as without, compiled, and drawn at random."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_gpt import small_model, tokens
from torch import nn

from nanodisp import gpt
from nanodisp.models.generate import generate, sample_token
from nanodisp.models.gpt import GPT, KVCache


def without_cache(model: GPT, prompt: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Greedy tokens [B, n_tokens], each from all before it; a context that is full goes on with its last half."""
    context, made = prompt, []
    for _ in range(n_tokens):
        if context.size(1) > model.config.block_size:
            context = context[:, -(model.config.block_size // 2) :]
        made.append(model(context).logits[:, -1].argmax(-1))
        context = torch.cat([context, made[-1][:, None]], dim=1)
    return torch.stack(made, dim=1)


def greedy(model: GPT, prompt: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, n_tokens, temperature=0)), dim=1)


def lively(**changes: object) -> GPT:
    """Weights so large that greedy text does not repeat one token."""
    model = small_model(**changes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("length", [1, 5, 12])
def test_generation_with_the_cache_equals_recomputing_the_context(length: int) -> None:
    model, prompt = lively(), tokens(3, length)
    new = greedy(model, prompt, 30)  # twice beyond the context
    assert torch.equal(new, without_cache(model, prompt, 30))
    assert all(len(set(row.tolist())) > 3 for row in new), "a token repeated would tell little"


def test_spans_of_the_cache_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "SPAN", 2)  # 2, 4, 8 and 16, the last one wider than the context
    model, prompt = lively(), tokens(2, 1)
    assert torch.equal(greedy(model, prompt, 30), without_cache(model, prompt, 30))


@torch.no_grad()
def test_a_cache_takes_several_tokens_at_any_time() -> None:
    model, idx = lively(), tokens(2, 12)
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        logits = model(idx[:, start:stop], cache=cache).logits
        assert logits.shape == (2, 1, 128)
        torch.testing.assert_close(logits, model(idx).logits[:, stop - 1 : stop])
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        model(idx[:, :1], cache=cache)


def test_compiled_steps_give_the_same_tokens_and_compile_once_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "SPAN", 6)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no C++ to wait for
    model, prompt = lively(), tokens(2, 3)
    expected = greedy(model, prompt, 30)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_one_token()
    assert torch.equal(greedy(model, prompt, 30), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of 3 layers and 30 tokens


@torch.no_grad()
def test_a_model_of_bfloat16_weights_generates_with_its_cache_as_without() -> None:
    model, idx = lively().bfloat16(), tokens(1, 12)
    cache = KVCache(model.config, 1, torch.device("cpu"), torch.bfloat16)
    for position in range(12):
        logits = model(idx[:, position : position + 1], cache=cache).logits
    torch.testing.assert_close(logits[..., :70], model(idx).logits[:, -1:, :70], rtol=0.05, atol=0.2)


def test_the_draws_of_a_sample_do_not_depend_on_the_others() -> None:
    model, prompt = small_model().eval(), tokens(1, 3)

    def drawn(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack(list(generate(model, prompt.expand(len(seeds), -1), 20, generator=generators)), dim=1)

    together = drawn(1, 2, 3)
    assert torch.equal(together, torch.cat([drawn(1), drawn(2), drawn(3)]))
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_sampling_respects_temperature_top_k_top_p_and_the_generator() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, -1)

    def drawn(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> set[int]:
        return set(sample_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == {0}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=100) == {0, 1, 2, 3}
    assert drawn(top_p=0.4) == {0}
    assert drawn(top_p=0.9) == {0, 1, 2}
    same = [sample_token(logits, 1.0, None, 1.0, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*same)
