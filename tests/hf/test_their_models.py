"""Condensation of transformers' own models, tiny and random: measured right, or rejected in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny_models import export, write_checkpointed_run, write_ranks_file

from nanodisp.condensation import __main__ as condensation
from nanodisp.condensation.cosine import mean_cosine
from nanodisp.data.shards import open_split
from nanodisp.errors import UserError
from nanodisp.hf.open import open_for_measuring

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # transformers takes seconds to load

CONTEXT = 24
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 300}
WIDE = {**SHAPE, "intermediate_size": 32, "max_position_embeddings": CONTEXT}
BLOOM = {"n_layer": 2, "n_head": 2, "hidden_size": 16, "vocab_size": 300}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=CONTEXT, vocab_size=300)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=CONTEXT)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**WIDE)),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**{**WIDE, "max_position_embeddings": CONTEXT + 2})
    ),
}

FAMILIES = ("gpt2", "llama", "qwen3", "opt", "bloom", "bert")  # that are compared


OTHERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5Model(
        transformers.T5Config(num_layers=1, num_heads=2, d_model=16, d_ff=16, d_kv=8, vocab_size=300)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=2)),
    "xlnet": lambda: transformers.XLNetModel(
        transformers.XLNetConfig(n_layer=1, n_head=2, d_model=16, d_inner=16, vocab_size=300)
    ),
}


def save(name: str, folder: Path) -> Path:
    """The folder of a random model, without a tokenizer."""
    torch.manual_seed(0)
    (MODELS | OTHERS)[name]().save_pretrained(folder)
    return folder


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    condensation.main([f"checkpoint=hf:{folder}", "device=cpu", *arguments])
    return json.loads((folder / "condensation.json").read_text())


def states_of(folder: Path, corpus: Path, n_windows: int) -> tuple[torch.Tensor, ...]:
    """Of windows of the whole context, spread over the validation split."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = open_split(corpus, "val")
    starts = np.arange(n_windows) * ((len(tokens) - 1) // CONTEXT) // n_windows * CONTEXT
    idx = torch.from_numpy(np.stack([tokens.read(s, s + CONTEXT) for s in starts.tolist()]).astype(np.int64))
    with torch.no_grad():
        return model(idx, output_hidden_states=True).hidden_states


def rejected(folder: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        measure(folder, *arguments)
    assert "\n" not in str(error.value) and not (folder / "condensation.json").exists()
    return str(error.value)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("the first and the second " * 20)
    return f"text={tmp_path / 'text.txt'}"


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_is_measured_over_its_whole_context(
    name: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(name, tmp_path / name)
    capfd.readouterr()
    found = measure(folder, f"data={corpus}", "windows=3", *(["block=24"] if name == "bloom" else []))
    assert capfd.readouterr().err == "", "transformers is silent"
    assert (found["block"], found["windows"]) == (CONTEXT, 3)
    states = states_of(folder, corpus, 3)
    assert len(states) == 3
    expected = [mean_cosine(z).item() for z in states]
    assert [layer["mean"] for layer in found["layers"]] == pytest.approx(expected, abs=1e-6)


def test_six_families_are_compared_in_one_table(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save(name, tmp_path / name) for name in FAMILIES]
    names = [f"hf:{folder}" for folder in folders]
    out = tmp_path / "compared"
    data = (f"data={corpus}", f"block={CONTEXT}", "device=cpu")
    condensation.main(["compare", f"checkpoint={','.join(names)}", "texts=5", f"out={out}", *data])
    content = json.loads((out / "compare.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    assert [found["name"] for found in content["models"]] == names
    for name, folder, found in zip(names, folders, content["models"], strict=True):
        means = [(mean_cosine(z).item() * (CONTEXT - 1) + 1) / CONTEXT for z in states_of(folder, corpus, 5)]
        assert found["mean"] == pytest.approx(means, abs=1e-6)
        assert found["rho"] == pytest.approx(stats.spearmanr(range(3), means).statistic)
        assert found["tau"] == pytest.approx(stats.kendalltau(range(3), means).statistic)
        model = open_for_measuring(name).model
        assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert f"{found['parameters']:,}" in rows[name] and f"{means[-1]:.4f}" in rows[name]
    assert content["models"][0]["paper"] == [0.38, 0.26], "its folder has the name of the published model"
    assert content["models"][0]["difference"][0] == pytest.approx(content["models"][0]["rho"] - 0.38)
    assert "0.38 / 0.26" in rows[names[0]] and rows[names[1]].endswith("\N{EN DASH}")
    with np.load(tmp_path / "compared" / "compare.npz") as arrays:
        assert arrays["5/averaged"].shape == arrays["5/histogram"].shape == (3, 128)
    for name in ("heatmaps", "layers"):
        assert (tmp_path / "compared" / "figures" / f"{name}.png").stat().st_size > 1000


def test_an_encoder_decoder_is_rejected_with_what_is_supported(corpus: Path, tmp_path: Path) -> None:
    message = rejected(save("t5", tmp_path / "t5"), f"data={corpus}")
    assert "is an encoder-decoder (t5)" in message and "decoders (GPT-2" in message and "encoders (BERT" in message


def test_a_model_of_images_is_rejected(corpus: Path, tmp_path: Path) -> None:
    assert "(ViTModel) gives no hidden states of tokens" in rejected(save("vit", tmp_path / "vit"), f"data={corpus}")


@pytest.mark.parametrize("size", [3, 3000])
def test_truncated_weights_are_rejected(size: int, corpus: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])
    assert "llama cannot be loaded" in rejected(folder, f"data={corpus}")


def test_weights_that_transformers_would_invent_are_missed(corpus: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = rejected(folder, f"data={corpus}")
    assert "is incomplete: as a LlamaModel it lacks weights, such as layers.1.mlp.up_proj.weight" in message


def test_states_that_are_not_finite_are_reported(corpus: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "layer 1 of the model gives NaN or infinite values" in rejected(folder, f"data={corpus}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_folder_without_a_tokenizer_is_not_measured_on_text(name: str, text: str, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer for some of them: every word of BERT's is then unknown."""
    assert "has no tokenizer" in rejected(save(name, tmp_path / name), text)


def test_a_folder_with_its_tokenizer_is_measured_on_text(text: str, tmp_path: Path) -> None:
    folder = export(write_checkpointed_run(tmp_path / "run", "byte"), tmp_path / "exported")
    found = measure(folder, text)
    assert (found["windows"], found["block"]) == (500 // 32, 32)
    assert "tokenizer=… is for runs" in rejected(save("gpt2", tmp_path / "gpt2"), text, "tokenizer=byte")


def test_a_bert_with_its_word_pieces_is_measured_on_text_without_special_tokens(text: str, tmp_path: Path) -> None:
    """As MiniLM's folder is."""
    folder = save("bert", tmp_path / "bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "first", "and", "sec", "##ond"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    found = measure(folder, text, "windows=2", "block=10")
    ids = torch.tensor([5, 6, 7, 5, 8, 9] * 20)  # the first and the sec ##ond
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(
            torch.stack([ids[:10], ids[60:70]]), output_hidden_states=True
        )
    expected = [mean_cosine(z).item() for z in states.hidden_states]
    assert [layer["mean"] for layer in found["layers"]] == pytest.approx(expected, abs=1e-6)


def test_shards_of_another_tokenizer_are_rejected(corpus: Path, tmp_path: Path) -> None:
    ranks = write_ranks_file(tmp_path / "tiny.tiktoken")
    run = write_checkpointed_run(tmp_path / "run", str(ranks))
    folder = export(run, tmp_path / "exported")
    assert "was made with another tokenizer than that of" in rejected(folder, f"data={corpus}")
    with pytest.raises(UserError, match="another tokenizer than that of run at step 3"):
        condensation.main([f"checkpoint={run}", f"data={corpus}"])
    assert measure(export(write_checkpointed_run(tmp_path / "byte", "byte"), tmp_path / "same"), f"data={corpus}")


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(text: str, tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", str(write_ranks_file(tmp_path / "tiny.tiktoken")))
    folder = export(run, tmp_path / "exported")
    small = write_checkpointed_run(tmp_path / "byte", "byte")
    tensors = load_file(export(small, tmp_path / "small") / "model.safetensors")
    save_file(
        {**tensors, "transformer.wte.weight": torch.zeros(60, 16)}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    assert "the model has 60" in rejected(folder, text)


def test_a_context_of_minus_one_means_that_there_is_no_limit(tmp_path: Path) -> None:
    assert open_for_measuring(str(save("xlnet", tmp_path / "xlnet"))).context == 512
