"""`attach` to models of transformers: found blocks, `hidden_states[1:]`, the Trainer's ways to divide a loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_models import gradients
from torch import Tensor

from nanodisp.dispersion import DispersionLoss, attach
from nanodisp.dispersion.placement import sample_positions

transformers = pytest.importorskip("transformers")

V, LAMBDA = 61, 0.7
SHAPE = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": V}
STATES = {
    "gpt2": ["transformer.h.0", "transformer.h.1", "transformer.ln_f"],
    "llama": ["model.layers.0", "model.layers.1", "model.norm"],
    "qwen3": ["model.layers.0", "model.layers.1", "model.norm"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"],
}
TOLERANCE = 1e-6  # they compute the loss in float32
KINDS = pytest.mark.parametrize("kind", STATES)


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": V}
        none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **none)).to(dtype).train()
    if kind == "bert":
        none = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE, **none)).to(dtype).train()
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    name = {"llama": "Llama", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, f"{name}Config")(**SHAPE, **heads)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).train()


def tokens(n: int = 4, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (n, length), generator=torch.Generator().manual_seed(seed))


def assert_equal(found: list[Tensor], right: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def explicit(
    kind: str, idx: Tensor, *, times: float = 1.0, n_tokens: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], float]:
    """Gradients and dispersion of times * (loss + lambda * mean dispersion of hidden_states[1:])."""
    model = tiny(kind, dtype)
    out = model(idx, labels=idx, output_hidden_states=True)
    positions = sample_positions(0, 1, [1, 2, 3], idx.size(1), n_tokens)
    parts = [DispersionLoss()(h[:, at]) for h, at in zip(out.hidden_states[1:], positions, strict=True)]
    dispersion = torch.stack(parts).mean()
    (times * (out.loss + LAMBDA * dispersion)).backward()
    return gradients(model), dispersion.item()


@KINDS
@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_the_gradients_are_those_of_the_explicit_sum(kind: str, recompute: bool | None) -> None:
    model, idx = tiny(kind), tokens()
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=7)
    assert handle.names == STATES[kind]
    out = model(idx, labels=idx, attention_mask=torch.ones_like(idx))
    assert out.hidden_states is None
    (out.loss / 4).backward()
    right, dispersion = explicit(kind, idx, times=1 / 4, n_tokens=7)
    assert_equal(gradients(model), right)
    assert handle.value == pytest.approx(dispersion, rel=1e-10)


@KINDS
def test_in_float32(kind: str) -> None:
    model, idx = tiny(kind, torch.float32), tokens()
    attach(model, lambda_disp=LAMBDA)
    model(idx, labels=idx).loss.backward()
    assert_equal(gradients(model), explicit(kind, idx, dtype=torch.float32)[0], 1e-5)


@KINDS
def test_padding_is_found_in_the_attention_mask(kind: str) -> None:
    """The dispersion of each text alone, whatever it is padded with on the right."""
    model, idx, lengths = tiny(kind), tokens(), (12, 7, 12, 5)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    handle = attach(model, lambda_disp=LAMBDA)
    model(idx, labels=idx, attention_mask=mask).loss.backward()
    alone = tiny(kind)
    out = alone(idx, labels=idx, attention_mask=mask, output_hidden_states=True)
    each = [[DispersionLoss()(h[i : i + 1, :n]) for i, n in enumerate(lengths)] for h in out.hidden_states[1:]]
    dispersion = torch.stack([torch.stack(layer).mean() for layer in each]).mean()
    (out.loss + LAMBDA * dispersion).backward()
    assert_equal(gradients(model), gradients(alone))
    assert handle.value == pytest.approx(dispersion.item(), rel=1e-10)


def test_the_inner_model_may_be_called_by_itself() -> None:
    """As trainers do that compute their loss in chunks, without logits."""
    model, idx = tiny("llama"), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=7)
    hidden = model.model(input_ids=idx, attention_mask=torch.ones_like(idx)).last_hidden_state
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    (handle.follow(loss) / 3).backward()
    assert_equal(gradients(model), explicit("llama", idx, times=1 / 3, n_tokens=7)[0])


def test_a_model_that_returns_a_tuple() -> None:
    model, idx = tiny("gpt2"), tokens()
    attach(model, lambda_disp=LAMBDA)
    (model(idx, labels=idx, return_dict=False)[0] / 3).backward()
    assert_equal(gradients(model), explicit("gpt2", idx, times=1 / 3)[0])


def test_our_own_model_has_the_gradients_of_its_objective() -> None:
    from nanodisp.models.gpt import GPT, GPTConfig
    from nanodisp.training.objective import Terms

    def ours() -> GPT:
        torch.manual_seed(0)
        return GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=V))

    x, y, model = tokens(seed=1), tokens(seed=2), ours()
    attach(model, lambda_disp=LAMBDA, max_tokens=7)
    model(x, y).loss.backward()
    right = ours()
    terms = Terms(right, DispersionLoss(), [1, 2, 3])(x, y, sample_positions(0, 1, [1, 2, 3], 12, 7))
    (terms["loss"] + LAMBDA * terms["dispersion"]).backward()
    assert_equal(gradients(model), gradients(right), 1e-5)


@pytest.mark.slow
def test_a_compiled_model_of_transformers() -> None:
    torch._dynamo.reset()
    model, idx = tiny("llama"), tokens()
    attach(model, lambda_disp=LAMBDA, max_tokens=7)
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="aot_eager")(idx, labels=idx, use_cache=False).loss.backward()
    assert_equal(gradients(model), explicit("llama", idx, n_tokens=7)[0])
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


# --- the Trainer ----------------------------------------------------------------------------------------------


def trained(to: Path, model: Any, rows: list[dict[str, Tensor]], *, follow: bool, n: int = 1, **settings: Any) -> Any:
    """One step of gradient descent with rate 1, from which the gradients follow."""
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(to),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        max_grad_norm=0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=n,
    )
    handle = attach(model, lambda_disp=LAMBDA)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, **settings)
    if follow:
        handle.follow_trainer(trainer)
    trainer.train()
    return handle


def rows(labels: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Sequences of which only so many tokens at the end are labels."""
    made = []
    for seed, n in enumerate(labels):
        idx = tokens(1, seed=seed)[0]
        made.append({"input_ids": idx, "labels": torch.where(torch.arange(12) < 12 - n, -100, idx)})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(12, 12, 12, 12), (3, 10, 5, 8)], ids=["full", "unequal"])
@pytest.mark.parametrize("follow", [False, True], ids=["by itself", "trainer"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_trainer_that_accumulates(tmp_path: Path, kind: str, follow: bool, labels: tuple[int, ...]) -> None:
    """Cross-entropy is the mean over all tokens of all micro-batches.

    The dispersion is the mean over micro-batches: with `follow_trainer` all are equal, else they weigh as their tokens.
    BERT's own loss is not divided by anything.
    """
    data, before, model = rows(labels), tiny(kind), tiny(kind)
    trained(tmp_path, model, data, follow=follow, n=4)
    counts = torch.tensor([(row["labels"][int(kind != "bert") :] != -100).sum() for row in data])
    right = tiny(kind)
    for row, n in zip(data, counts, strict=True):
        out = right(row["input_ids"][None], labels=row["labels"][None], output_hidden_states=True)
        dispersion = torch.stack([DispersionLoss()(h) for h in out.hidden_states[1:]]).mean()
        weight = 1 / 4 if follow else n / counts.sum()
        (out.loss * (1 if kind == "bert" else n / counts.sum()) + LAMBDA * weight * dispersion).backward()
    found = [a.detach() - b.detach() for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    assert_equal(found, gradients(right))


@pytest.mark.slow
def test_a_trainer_with_a_loss_function_of_its_own(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    model, before = tiny("llama"), tiny("llama")
    data = rows((12, 12))
    handle = trained(tmp_path, model, data, follow=True, n=2, compute_loss_func=own)
    found = [a.detach() - b.detach() for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    halves = [explicit("llama", row["input_ids"][None], times=1 / 2) for row in data]
    assert_equal(found, [a + b for a, b in zip(halves[0][0], halves[1][0], strict=True)])
    assert handle.value == pytest.approx((halves[0][1] + halves[1][1]) / 2, rel=1e-9)
    assert math.isnan(handle.value)
