"""Every family goes through every door: GPT-2, LLaMA, Qwen3, other combinations of switches, an encoder."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import compose
from omegaconf import OmegaConf
from test_generate import greedy, without_cache
from test_gpt import SMALL, small_model, tokens
from torch import nn

from nanodisp.launch import CONF
from nanodisp.models.blocks import SWITCHES, architecture, rotate, rotations
from nanodisp.models.gpt import GPT, GPTConfig, SoftTargets
from nanodisp.training.optim import OptimConfig, build_optimizers

LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False}
FAMILIES = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "n_kv_head": 1, "head_dim": 12, "tie_embeddings": False},
    "nope": {"position": "none", "mlp": "relu2", "qk_norm": True},
    "gqa": {"n_head": 4, "n_kv_head": 2, "norm": "rmsnorm"},
}
DECODERS = pytest.mark.parametrize("family", FAMILIES)
ALL = pytest.mark.parametrize("family", [*FAMILIES, "encoder"])
FAMILIES_AND_ENCODER = {**FAMILIES, "encoder": {"causal": False}}


def model_of(family: str, **changes: object) -> GPT:
    """A tiny model with weights so large that every part matters."""
    model = small_model(**{**FAMILIES_AND_ENCODER[family], **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)  # after small_model has seeded
    return model


def gradients(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_switch_is_turned_in_some_family() -> None:
    turned = {key for family in FAMILIES_AND_ENCODER.values() for key in family}
    assert turned >= set(SWITCHES) - {"norm_eps", "rope_theta", "init_std"}


@DECODERS
@torch.no_grad()
def test_generation_with_the_cache_equals_recomputing_the_context(family: str) -> None:
    model, prompt = model_of(family).eval(), tokens(3, 5)
    new = greedy(model, prompt, 30)  # twice beyond the context
    assert torch.equal(new, without_cache(model, prompt, 30))
    assert len({tuple(row) for row in new.T.tolist()}) > 1, "a repeated token would prove little"


@DECODERS
@torch.no_grad()
def test_a_decoder_does_not_see_later_tokens(family: str) -> None:
    model, idx = model_of(family).eval(), tokens(1, 12)
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % 70
    difference = (model.hidden_states(idx)[-1] - model.hidden_states(changed)[-1]).abs().amax(dim=-1)[0]
    assert (difference[:7] == 0).all()
    assert (difference[7:] > 0).all()


@torch.no_grad()
def test_an_encoder_sees_all_tokens_and_has_no_cache() -> None:
    model, idx = model_of("encoder").eval(), tokens(1, 12)
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % 70
    assert (model.hidden_states(idx)[-1] != model.hidden_states(changed)[-1]).any(dim=-1).all()
    with pytest.raises(ValueError, match="bidirectional model"):
        model.new_cache(1)


@ALL
def test_taken_tokens_equal_indexed_hidden_states_in_value_and_gradient(family: str) -> None:
    model, idx = model_of(family), tokens(2, 12)
    layers, positions = (0, 2, 3), torch.tensor([[0, 5, 11], [1, 2, 3], [4, 9, 10]])
    out = model(idx, idx, take=(layers, positions))
    (out.hidden.square().mean() + out.loss).backward()
    taken = gradients(model)
    model.zero_grad()
    full = model(idx, idx, return_hidden=True)
    picked = torch.stack([full.hidden[layer][:, row] for layer, row in zip(layers, positions, strict=True)])
    (picked.square().mean() + full.loss).backward()
    torch.testing.assert_close(out.hidden, picked)
    torch.testing.assert_close(taken, gradients(model))


@ALL
@pytest.mark.slow
def test_the_model_compiles_without_a_graph_break_to_the_same_loss_and_gradients(family: str) -> None:
    model, idx = model_of(family), tokens(2, 12)
    model(idx, idx).loss.backward()
    eager = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(idx, idx).loss.backward()
    torch.testing.assert_close(gradients(model), eager)


@pytest.mark.slow
def test_the_head_of_masked_tokens_compiles_without_a_graph_break() -> None:
    model, (idx, targets) = model_of("encoder"), masked_case()
    soft = SoftTargets(model.hidden_states(idx)[-1].detach(), model.head_weight.detach() * 2, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    plain, fast = (m(idx, targets, n_targets=3, soft_targets=soft) for m in (model, compiled))
    torch.testing.assert_close((fast.loss, fast.divergence), (plain.loss, plain.divergence))


@ALL
def test_every_parameter_gets_a_gradient_and_is_updated_by_one_optimizer(family: str) -> None:
    model, idx = model_of(family), tokens(4, 12)
    optimizers = build_optimizers(model, OptimConfig(name="muon", lr=0.1, muon_lr=1e-3))
    updated = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, updated)) == sorted(map(id, model.parameters()))
    model(idx, idx.flip(1)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@ALL
def test_parameters_and_flops_are_those_of_the_tensors(family: str) -> None:
    model = model_of(family)
    padding = 58 * 16 * (1 if model.config.tie_embeddings else 2) - 16 * (family == "encoder")  # its mask is one
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) - padding
    tables = {"wte.weight", "wpe.weight", "lm_head.weight"}
    elsewhere = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    width = model.config.n_head * model.config.head_width
    assert model.flops_per_token() == 6 * (elsewhere + 70 * 16) + 12 * 3 * width * 12


@pytest.mark.parametrize(("vocab_size", "padded"), [(70, 128), (63, 64), (64, 128), (128, 192)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_an_encoder_has_a_mask_that_it_never_predicts(vocab_size: int, padded: int, tied: bool) -> None:
    model = model_of("encoder", vocab_size=vocab_size, tie_embeddings=tied).eval()
    decoder = model_of("gpt2", vocab_size=vocab_size, tie_embeddings=tied)
    assert model.num_parameters() == decoder.num_parameters() + 16
    assert model.wte.num_embeddings == padded
    idx = tokens(2, 12, below=vocab_size)
    idx[:, 3] = vocab_size
    logits = model(idx).logits
    assert logits[..., :vocab_size].isfinite().all() and (logits[..., vocab_size:] == -torch.inf).all()
    hidden = model.hidden_states(idx)
    model.wte.weight[vocab_size] += 1
    assert not torch.equal(hidden[0][:, 3], model.hidden_states(idx)[0][:, 3])


def masked_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [4, 12], and targets of which each sequence has 3."""
    idx, places = tokens(4, 12), torch.tensor([[0, 1, 2], [9, 10, 11], [0, 5, 11], [4, 6, 8]])
    return idx, torch.full_like(idx, -100).scatter(1, places, tokens(4, 3))


def test_the_head_of_masked_tokens_alone_gives_their_loss_divergence_and_gradient() -> None:
    model, teacher, (idx, targets) = model_of("encoder"), model_of("encoder", n_layer=1), masked_case()
    with torch.no_grad():
        teacher.wte.weight *= 2
        soft = SoftTargets(teacher.hidden_states(idx)[-1], teacher.head_weight, 2.0)
    out = model(idx, targets, n_targets=3, soft_targets=soft)
    (out.loss + out.divergence).backward()
    ours = gradients(model)
    model.zero_grad()
    chosen = targets != -100
    logits = [m(idx).logits[chosen][:, :70] for m in (model, teacher)]
    q, p = ((each / 2).log_softmax(-1) for each in logits)
    loss = F.cross_entropy(logits[0], targets[chosen])
    divergence = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    (loss + divergence).backward()
    torch.testing.assert_close((out.loss, out.divergence), (loss, divergence))
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-5)


@ALL
def test_distillation_from_a_model_itself_has_no_divergence(family: str) -> None:
    model, idx = model_of(family).eval(), tokens(2, 12)
    hidden = model.hidden_states(idx)[-1].detach()
    out = model(idx, idx, soft_targets=SoftTargets(hidden, model.head_weight.detach(), 2.0))
    assert out.divergence.item() == pytest.approx(0, abs=1e-6)
    other = SoftTargets(hidden, model.head_weight.detach() * 2, 2.0)
    assert model(idx, idx, soft_targets=other).divergence.item() > 0.01


@torch.no_grad()
def test_an_untied_head_is_a_matrix_of_its_own() -> None:
    model, idx = model_of("qwen3").eval(), tokens(2, 12)
    expected = model.hidden_states(idx)[-1] @ model.lm_head.weight[:70].T
    torch.testing.assert_close(model(idx).logits[..., :70], expected)
    assert (model(idx).logits[..., 70:] == -torch.inf).all()


@torch.no_grad()
def test_grouped_query_attention_shares_each_head_of_keys_and_values_among_consecutive_heads() -> None:
    few, many = model_of("gqa").eval(), model_of("gqa", n_kv_head=None).eval()
    state = few.state_dict()
    for name in [name for name in state if "c_attn" in name]:
        q, k, v = state[name].split([16, 8, 8])
        repeat = lambda x: x.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)  # noqa: E731
        state[name] = torch.cat([q, repeat(k), repeat(v)])
    many.load_state_dict(state)
    idx = tokens(2, 12)
    torch.testing.assert_close(few(idx).logits, many(idx).logits)


def test_rotated_queries_and_keys_have_products_that_depend_on_the_distance_only() -> None:
    config = GPTConfig(n_head=2, n_embd=16, block_size=12, position="rotary", rope_theta=100.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).expand(-1, -1, -1, 12, -1)
    products = rotate(q, rotations(config))[0, 0] @ rotate(k, rotations(config))[0, 0].T  # [T, T]
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.1


def test_rotations_have_the_published_wavelengths() -> None:
    cos, sin = rotations(GPTConfig(n_head=2, n_embd=16, block_size=12, position="rotary", rope_theta=10_000.0))
    angle = 7 * torch.tensor([1.0, 0.1, 0.01, 0.001])  # position 7; pair i turns by theta^(-2i/8)
    torch.testing.assert_close(cos[7], torch.cat([angle, angle]).cos())
    torch.testing.assert_close(sin[7], torch.cat([angle, angle]).sin())


@torch.no_grad()
def test_without_positions_the_last_token_does_not_know_the_order_of_the_others() -> None:
    idx = tokens(1, 12)
    shuffled = torch.cat([idx[:, :11].flip(1), idx[:, 11:]], dim=1)
    for family, same in (("nope", True), ("llama", False), ("gpt2", False)):
        model = model_of(family, n_layer=1).eval()
        a, b = (model(x).logits[0, -1, :70] for x in (idx, shuffled))
        assert torch.allclose(a, b, atol=1e-4) == same, family


@torch.no_grad()
def test_norms_and_activations_are_the_published_formulas() -> None:
    block = model_of("qwen3").h[0]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    rms = (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block.ln_1(x), x / rms * block.ln_1.weight)
    gate, up = block.mlp.c_fc.weight.chunk(2)
    assert gate.shape == (48, 16)  # 8/3 * 16 = 42.7, to the nearest multiple of 16
    torch.testing.assert_close(block.mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ block.mlp.c_proj.weight.T)
    mlp = model_of("nope").h[0].mlp
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.c_fc(x).clamp(min=0) ** 2))


@torch.no_grad()
def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys() -> None:
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    for qk_norm in (True, False):
        attn = model_of("gpt2", qk_norm=qk_norm, norm_eps=1e-12, bias=False).h[0].attn.eval()
        before = attn(x, None, None)
        attn.c_attn.weight[:32] *= 3
        assert torch.allclose(attn(x, None, None), before, atol=1e-5) == qk_norm


def test_init_std_is_the_standard_deviation_of_initial_weights() -> None:
    model = small_model(n_embd=128, n_layer=8, block_size=64, init_std=0.1)
    assert model.wte.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.h[7].mlp.c_proj.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_has_as_many_parameters_as_in_transformers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = compose("model=qwen3_0_6b", "model.vocab_size=151936", f"model.tie_embeddings={str(tied).lower()}").model
    published = transformers.Qwen3Config(
        **{"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied},
    )
    with torch.device("meta"), contextlib.redirect_stderr(None):
        theirs = transformers.Qwen3ForCausalLM(published)
        assert GPT(ours).num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(
    ("preset", "vocab_size", "n_parameters"),
    [("qwen3_0_6b", 151_936, 596_049_920), ("smollm2_135m", 49_152, 134_515_008)],
)
def test_published_shapes_have_their_published_parameter_counts(
    preset: str, vocab_size: int, n_parameters: int
) -> None:
    config = compose(f"model={preset}", f"model.vocab_size={vocab_size}").model
    with torch.device("meta"):
        assert GPT(config).num_parameters() == n_parameters


@pytest.mark.parametrize(("base", "family"), [("nano", "nano_qwen3"), ("nano", "nano_llama"), ("micro", "micro_qwen3")])
def test_families_of_one_size_differ_by_at_most_a_hundredth_in_parameters(base: str, family: str) -> None:
    counts = []
    for name in (base, family):
        with torch.device("meta"):
            counts.append(GPT(compose(f"model={name}", "model.vocab_size=257").model).num_parameters())
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_the_shape_ignores_what_does_not_change_a_trained_model() -> None:
    spelled = dataclasses.replace(SMALL, d_ff=64, n_kv_head=2, head_dim=8, dropout=0.3, init_std=0.1)
    assert spelled.shape() == SMALL.shape()
    assert dataclasses.replace(SMALL, norm="rmsnorm").shape() != SMALL.shape()


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("gpt2", {"dropout": 0.1, "n_kv_head": 2}, "GPT-2"),
        ("gpt2", {"n_kv_head": 1}, "GPT-2, n_kv_head=1"),
        ("gpt2", {"position": "rotary", "bias": False}, "GPT-2, position=rotary, bias=false"),
        ("llama", {}, "LLaMA"),
        ("qwen3", {}, "Qwen3, tie_embeddings=false"),
        ("qwen3", {"tie_embeddings": True, "norm": "layernorm"}, "Qwen3, norm=layernorm"),
        ("qwen3", {"tie_embeddings": True, "qk_norm": False}, "Qwen3, qk_norm=false"),
        ("encoder", {}, "GPT-2, causal=false"),
    ],
)
def test_an_architecture_is_named_by_its_nearest_family(family: str, changes: dict[str, object], name: str) -> None:
    assert architecture(model_of(family, **changes).config) == name


def test_the_architecture_sweep_turns_one_switch_at_a_time() -> None:
    sweep = OmegaConf.load(CONF / "experiment" / "architecture.yaml").hydra.sweeper.params
    assert {file.stem for file in (CONF / "switch").glob("*.yaml")} == set(sweep.switch.split(","))
    models: dict[tuple[str, str], GPTConfig] = {}
    for base in sweep.model.split(","):
        for switch in sweep.switch.split(","):
            model = compose("experiment=architecture", f"model={base}", f"switch={switch}").model
            models[base, architecture(model)] = model
    assert len(models) == 14
    for (base, _), model in models.items():
        unchanged = models[base, "GPT-2" if base == "nano" else "Qwen3"]
        assert sum(value != vars(unchanged)[key] for key, value in vars(model).items()) == (model != unchanged)
