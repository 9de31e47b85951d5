"""Vectors of texts are the pooled hidden states of each text alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import export, model_of, write_checkpointed_run, write_ranks_file

from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import POOLINGS, Embedder, embed, is_empty, open_embedder

TEXTS = ["abc", "a longer text", "xyz", "é", "0123456789" * 5]  # the last is longer than the context of 32 bytes


@pytest.fixture(scope="module", params=[True, False], ids=["decoder", "encoder"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpointed_run(tmp_path_factory.mktemp("model") / "run", "byte", causal=request.param)


@pytest.fixture(scope="module")
def embedder(run: Path) -> Embedder:
    return open_embedder(str(run))


def test_a_vector_is_the_pooled_hidden_state_of_its_text_alone(run: Path) -> None:
    found = embed(open_embedder(str(run)), TEXTS)
    assert list(POOLINGS) == ["mean", "last", "weighted"]
    assert found.vectors.shape == (3, 3, len(TEXTS), 16)
    for number, text in enumerate(TEXTS):
        idx = torch.tensor([list(text.encode())[:32]])
        with torch.no_grad():
            states = torch.stack(model_of(run).hidden_states(idx))[:, 0]  # [L + 1, T, F]
        weight = torch.arange(1, idx.size(1) + 1)
        weighted = (states * weight[:, None]).sum(dim=1) / weight.sum()
        expected = torch.stack([states.mean(dim=1), states[:, -1], weighted], dim=1)
        assert torch.allclose(found.vectors[:, :, number], expected, atol=1e-5)


def test_cut_texts_are_counted(run: Path) -> None:
    found = embed(open_embedder(str(run)), TEXTS)
    assert found.n_cut == 1
    n_tokens = sum(len(text.encode()) for text in TEXTS)
    assert found.share == pytest.approx((n_tokens - 18) / n_tokens)


def test_layers_and_poolings_are_chosen_by_name(run: Path) -> None:
    embedder = open_embedder(str(run))
    every = embed(embedder, TEXTS).vectors
    some = embed(embedder, TEXTS, layers=[-1, 0], poolings=["weighted", "mean"]).vectors
    assert torch.equal(some, every[[2, 0]][:, [2, 0]])
    with pytest.raises(UserError, match="pooling=median is unknown; choose one of mean, last, weighted"):
        embed(embedder, TEXTS, poolings=["median"])
    with pytest.raises(UserError, match=r"layer=3: run at step 3 has hidden states 0 to 2"):
        embed(embedder, TEXTS, layers=[3])


@settings(max_examples=10)
@given(st.lists(st.text("abé ", min_size=1, max_size=40), min_size=1, max_size=6))
def test_the_texts_beside_it_do_not_change_a_vector(embedder: Embedder, texts: list[str]) -> None:
    together = embed(embedder, texts).vectors
    alone = torch.cat([embed(embedder, [text]).vectors for text in texts], dim=2)
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_text_without_tokens_is_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="text 1 has no tokens"):
        embed(open_embedder(str(run)), ["a", ""])
    assert [is_empty(text) for text in ("", " \n", "a")] == [True, True, False]


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_that_is_not_finite_is_named(run: Path, layer: int) -> None:
    embedder = open_embedder(str(run))
    embedder.model.blocks[layer - 1].register_forward_hook(lambda module, given, out: out * torch.nan)
    with pytest.raises(UserError, match=f"layer {layer} of run at step 3 gives NaN or infinite values") as error:
        embed(embedder, TEXTS)
    assert "\n" not in str(error.value)


def test_a_run_without_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    ranks = write_ranks_file(tmp_path / "tiny.tiktoken")
    folder = write_checkpointed_run(tmp_path / "run", str(ranks))
    moved = ranks.rename(tmp_path / "moved.tiktoken")
    with pytest.raises(UserError, match=r"tiny\.tiktoken cannot be read.*; tokenizer=… replaces the run's own"):
        open_embedder(str(folder))
    assert embed(open_embedder(str(folder), str(moved)), ["the"]).vectors.shape == (3, 3, 1, 16)


# --- of Hugging Face ------------------------------------------------------------------------------


def write_bert(folder: Path) -> Path:
    """A tiny BERT whose tokenizer puts special tokens around a text, and a context of 12 tokens."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "mat",
        ":",
    ]  # PROBE has ":"
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    built.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names).save_pretrained(folder)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(**shape, vocab_size=len(words), max_position_embeddings=12)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_encoder_equals_mean_pooling_with_padding_and_an_attention_mask(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    import transformers

    texts = ["the cat sat", "a dog", "the dog ran on the mat", "the cat sat on a mat " * 3]
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    batch = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"][..., None]
    expected = torch.stack([(z * mask).sum(dim=1) / mask.sum(dim=1) for z in states])
    found = embed(open_embedder(str(folder)), texts)
    assert torch.allclose(found.vectors[:, 0], expected, atol=1e-5)
    assert found.n_cut == 1


@pytest.mark.slow
def test_an_exported_run_has_the_vectors_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = write_checkpointed_run(tmp_path / "run", "byte")
    folder = export(run, tmp_path / "exported")
    ours, theirs = (embed(open_embedder(str(name)), TEXTS) for name in (run, folder))
    assert torch.allclose(ours.vectors, theirs.vectors, atol=1e-4)
    assert ours.n_cut == theirs.n_cut == 1
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"].fill_(np.nan)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layer 1 of .*exported gives NaN"):
        embed(open_embedder(str(folder)), TEXTS)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        open_embedder(str(folder))
