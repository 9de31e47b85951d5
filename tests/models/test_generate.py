"""Generation: the same with a cache as without, compiled, and sampled at random."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_gpt import small_model, tokens
from torch import nn

from nanodisp.models import cache
from nanodisp.models.generate import generate, sample_token
from nanodisp.models.gpt import GPT


def without_cache(model: GPT, prompt: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Greedy tokens [B, n_tokens], each from all before it; a full context is cut to its last half."""
    context, new = prompt, []
    for _ in range(n_tokens):
        if context.size(1) > model.config.block_size:
            context = context[:, -(model.config.block_size // 2) :]
        new.append(model(context).logits[:, -1].argmax(-1))
        context = torch.cat([context, new[-1][:, None]], dim=1)
    return torch.stack(new, dim=1)


def greedy(model: GPT, prompt: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, n_tokens, temperature=0)), dim=1)


def lively() -> GPT:
    """Weights so large that greedy text does not repeat one token."""
    model = small_model().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("length", [1, 5, 12])
def test_generation_with_the_cache_equals_recomputing_the_context(length: int) -> None:
    model, prompt = lively(), tokens(3, length)
    new = greedy(model, prompt, 30)  # twice beyond the context
    assert torch.equal(new, without_cache(model, prompt, 30))
    assert all(len(set(row.tolist())) > 3 for row in new), "a repeated token would prove little"


def test_the_span_of_the_cache_does_not_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SPAN", 2)  # 2, 4, 8 and 16, the last one wider than the context
    model, prompt = lively(), tokens(2, 1)
    assert torch.equal(greedy(model, prompt, 30), without_cache(model, prompt, 30))


@torch.no_grad()
def test_a_cache_takes_any_number_of_tokens_at_a_time() -> None:
    model, idx = lively(), tokens(2, 12)
    cache = model.new_cache(2)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        logits = model(idx[:, start:stop], cache=cache).logits
        assert logits.shape == (2, 1, 128)
        torch.testing.assert_close(logits, model(idx).logits[:, stop - 1 : stop])
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        model(idx[:, :1], cache=cache)


@pytest.mark.slow
def test_compiled_generation_gives_the_same_tokens_and_compiles_once_per_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SPAN", 6)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    model, prompt = lively(), tokens(2, 3)
    expected = greedy(model, prompt, 30)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_one_token()
    assert torch.equal(greedy(model, prompt, 30), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of 3 layers and 30 tokens


@torch.no_grad()
def test_bfloat16_weights_give_the_same_logits_with_the_cache_as_without() -> None:
    model, idx = lively().bfloat16(), tokens(1, 12)
    cache = model.new_cache(1)
    for position in range(12):
        logits = model(idx[:, position : position + 1], cache=cache).logits
    torch.testing.assert_close(logits[..., :70], model(idx).logits[:, -1:, :70], rtol=0.05, atol=0.2)


def test_a_sample_does_not_depend_on_the_others_in_its_batch() -> None:
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
