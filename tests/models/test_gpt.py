"""The model: sizes, hidden states, padding, agreement with transformers' GPT-2, and what a model reports of itself."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import compose
from torch import nn

from nanodisp.models import blocks
from nanodisp.models.gpt import GPT, GPTConfig, TakeTokens

SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=70)


def small_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(SMALL), **changes}))  # type: ignore[arg-type]


def tokens(*shape: int, below: int = 70) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "n_parameters"),
    [("gpt2", 124_439_808), ("gpt2_medium", 354_823_168), ("gpt2_large", 774_030_080), ("gpt2_xl", 1_557_611_200)],
)
def test_published_sizes_have_their_published_parameter_counts(size: str, n_parameters: int) -> None:
    config = compose(f"model={size}", "model.vocab_size=50257").model
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_parameters() == n_parameters
    assert model.wte.num_embeddings == 50304


@pytest.mark.parametrize(("size", "millions"), [("nano", 1), ("micro", 10), ("mini", 30)])
def test_small_sizes_have_about_the_documented_parameter_counts(size: str, millions: int) -> None:
    config = compose(f"model={size}", "model.vocab_size=257").model
    with torch.device("meta"):
        n_parameters = GPT(config).num_parameters()
    assert 0.9 * millions < n_parameters / 1e6 < 1.3 * millions


def test_d_ff_sets_the_width_of_the_mlp() -> None:
    widths = [model.h[0].mlp.c_fc.out_features for model in (small_model(), small_model(d_ff=24))]
    assert widths == [64, 24]


def test_logits_equal_those_of_transformers_with_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers")
    ours = small_model(n_embd=32, n_head=4)
    for parameter in ours.parameters():  # so that biases and LayerNorms matter
        nn.init.normal_(parameter, std=0.3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=70, n_positions=12, n_embd=32, n_layer=3, n_head=4)
    ).eval()
    state = {}
    for name, value in ours.state_dict().items():
        transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))  # Conv1D there
        state[f"transformer.{name}"] = value.T if transposed else value[:70] if name == "wte.weight" else value
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    idx = tokens(2, 12)
    with torch.no_grad():
        reference = theirs(idx, output_hidden_states=True)
        ours.eval()
        torch.testing.assert_close(ours(idx).logits[..., :70], reference.logits, rtol=1e-5, atol=1e-5)
        hidden = ours(idx, return_hidden=True).hidden
    for mine, other in zip(hidden, reference.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_hidden_states_range_from_the_embedding_to_the_final_layer_norm() -> None:
    model, idx = small_model(), tokens(2, 12)
    hidden = model(idx, return_hidden=True).hidden
    torch.testing.assert_close(hidden[0], model.wte(idx) + model.wpe.weight)
    torch.testing.assert_close(hidden[1], model.h[0](hidden[0]))
    torch.testing.assert_close(hidden[3], model.ln_f(model.h[2](hidden[2])))
    torch.testing.assert_close(model(idx).logits[..., :70], hidden[3] @ model.wte.weight[:70].T)
    assert len(hidden) == 4


@pytest.mark.parametrize(
    "positions", [[[0, 5, 11], [1, 2, 3], [4, 9, 10]], [[*range(12)]] * 3], ids=["some", "all tokens"]
)
def test_taken_tokens_equal_indexed_hidden_states_in_value_and_gradient(positions: list[list[int]]) -> None:
    model, idx = small_model(), tokens(2, 12)
    layers = (0, 2, 3)

    def gradient(taken: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (taken.square().sum() + loss).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    out = model(idx, idx, take=(layers, torch.tensor(positions)))
    full = model(idx, idx, return_hidden=True)
    picked = torch.stack([full.hidden[layer][:, row] for layer, row in zip(layers, positions, strict=True)])
    torch.testing.assert_close(out.hidden, picked)
    torch.testing.assert_close(gradient(out.hidden, out.loss), gradient(picked, full.loss))


@pytest.mark.parametrize("layers", [[1, 7], [-1]])
def test_taking_a_layer_that_does_not_exist_is_rejected(layers: list[int]) -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=10))
    with pytest.raises(ValueError, match="hidden states 0 to 2"):
        model(torch.zeros(1, 8, dtype=torch.int64), take=(layers, torch.zeros(len(layers), 2, dtype=torch.int64)))


def test_take_tokens_has_the_gradient_of_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TakeTokens.apply(x, torch.tensor([0, 3])), x)


def test_the_vocabulary_padding_is_never_predicted_and_never_trained() -> None:
    model, idx = small_model(), tokens(2, 12)
    assert (model(idx).logits[..., 70:] == -math.inf).all()
    model(idx, idx).loss.backward()
    assert (model.wte.weight.grad[70:] == 0).all()
    assert model.wte.weight.grad[:70].any(dim=1).all()


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, idx, targets = small_model(), tokens(2, 12), tokens(12, 2).T
    expected = -model(idx).logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(idx, targets).loss, expected)


def test_initialisation_scales_the_projections_into_the_residual_stream() -> None:
    model = small_model(n_embd=128, n_layer=8, block_size=64)
    assert model.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[7].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def differs_between_calls(model: GPT) -> bool:
    idx = tokens(2, 12)
    return not torch.equal(model(idx).logits, model(idx).logits)


def test_dropout_acts_only_in_training() -> None:
    model = small_model(dropout=0.5)
    assert differs_between_calls(model)
    assert not differs_between_calls(model.eval())


def test_dropout_acts_on_attention_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.F, "dropout", lambda x, p, training: x)  # leaves only the one inside attention
    model = small_model(dropout=0.5)
    assert differs_between_calls(model)
    assert not differs_between_calls(model.eval())
    assert not differs_between_calls(small_model(dropout=0.0))


def test_dropout_acts_on_embeddings_and_on_both_branches_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, float, bool]] = []
    monkeypatch.setattr(blocks.F, "dropout", lambda *args: calls.append(args) or args[0])
    model, idx = small_model(dropout=0.5), tokens(2, 12)
    model(idx)
    assert [(x.shape, p, training) for x, p, training in calls] == [((2, 12, 16), 0.5, True)] * (1 + 2 * 3)
    torch.testing.assert_close(calls[0][0], model.embedding(idx) + model.wpe.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 15}, "n_embd=15 is not divisible by model.n_head=2: change one, or give model.head_dim"),
        ({"n_head": 3, "head_dim": 8, "n_kv_head": 2}, "n_head=3 is not divisible by model.n_kv_head=2"),
        ({"n_kv_head": 0}, "n_kv_head=0 must be at least 1, or null"),
        ({"head_dim": 5, "position": "rotary"}, "position=rotary rotates pairs, but a head has 5 features"),
        ({"position": "alibi"}, "position=alibi is unknown; choose one of learned, rotary, none"),
        ({"norm": "batchnorm"}, "norm=batchnorm is unknown; choose one of layernorm, rmsnorm"),
        ({"mlp": "relu"}, "mlp=relu is unknown; choose one of gelu, swiglu, relu2"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"d_ff": 0}, "d_ff=0"),
    ],
)
def test_impossible_shapes_are_rejected(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_flops_count_every_matrix_product_three_times() -> None:
    model = small_model()
    macs = 0

    def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * args[0].size(-1)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(tokens(1, 12))
    c = model.config
    macs += 12 * c.n_embd * c.vocab_size + c.n_layer * 2 * 12 * 12 * c.n_embd  # head, attention
    linear_biases = c.n_layer * (3 + 1 + 4 + 1) * c.n_embd
    layer_norms = (2 * c.n_layer + 1) * 2 * c.n_embd
    assert model.flops_per_token() == 6 * macs // 12 + 6 * (linear_biases + layer_norms)


# --- what a model reports of itself ----------------------------------------------------------


def test_hidden_states_are_those_of_a_forward_pass_without_its_head() -> None:
    model, idx = small_model(), tokens(2, 12)
    expected = model(idx, return_hidden=True).hidden
    del model.never_predicted  # the head cannot be computed without it
    hidden = model.hidden_states(idx)
    assert len(hidden) == 4
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def test_blocks_are_the_layers_in_order() -> None:
    model, idx = small_model(), tokens(2, 12)
    hidden = model.hidden_states(idx)
    assert len(model.blocks) == model.config.n_layer
    x = hidden[0]
    for block, expected in zip(model.blocks[:-1], hidden[1:-1], strict=True):
        x = block(x)
        torch.testing.assert_close(x, expected)


def test_the_transposed_embedding_is_the_output_head() -> None:
    model, idx = small_model(), tokens(2, 12)
    logits = model.hidden_states(idx)[-1] @ model.embedding.weight.T
    torch.testing.assert_close(model(idx).logits[..., :70], logits[..., :70])


def test_the_device_is_that_of_the_weights() -> None:
    assert small_model().device == torch.device("cpu")
    assert small_model().to("meta").device == torch.device("meta")


@pytest.mark.parametrize("bias", [True, False])
def test_each_parameter_is_in_exactly_one_group(bias: bool) -> None:
    model = small_model(bias=bias)
    grouped = [id(p) for group in model.parameter_groups() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_the_groups_are_block_matrices_embeddings_and_vectors(bias: bool) -> None:
    model = small_model(bias=bias)
    names = {id(p): name for name, p in model.named_parameters()}
    block_matrices, other_matrices, vectors = ([names[id(p)] for p in group] for group in model.parameter_groups())
    linear_layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert block_matrices == [f"h.{layer}.{name}.weight" for layer in range(3) for name in linear_layers]
    assert other_matrices == ["wte.weight", "wpe.weight"]
    assert all(name.endswith("bias") or ".ln_" in f".{name}" for name in vectors)
    assert all(p.dim() == 1 for p in model.parameter_groups().vectors)


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = small_model()
    model.embedding.requires_grad_(False)
    model.ln_f.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    grouped = {id(p) for group in model.parameter_groups() for p in group}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_new_cache_is_empty_and_has_the_shape_device_and_dtype_of_the_model() -> None:
    cache = small_model().bfloat16().new_cache(5)
    assert cache.length == 0
    for part in (cache.keys, cache.values):
        assert part.shape == (3, 5, 2, 12, 8)  # [L, B, n_head, block_size, head_dim]
        assert part.dtype == torch.bfloat16
        assert not part.any()
    assert small_model().to("meta").new_cache(1).keys.device == torch.device("meta")


@torch.no_grad()
def test_each_new_cache_is_independent() -> None:
    model, idx = small_model().eval(), tokens(2, 4)
    first, second = model.new_cache(2), model.new_cache(2)
    model(idx, cache=first)
    assert (first.length, second.length) == (4, 0)
    assert not second.keys.any()
