"""LLaMA and Qwen3 to and from Hugging Face: the same function and the same bits, or rejected in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records
from safetensors.torch import load_file, save_file
from test_export_import import change_config, close, logits, random_tokens, theirs
from tiny_models import export, model_of, write_checkpointed_run, write_json_tokenizer
from torch import Tensor

import sample
from nanodisp.condensation import __main__ as condensation
from nanodisp.data.batches import spread_windows
from nanodisp.data.shards import open_split
from nanodisp.errors import UserError
from nanodisp.hf import __main__ as hf
from nanodisp.hf.open import open_run
from nanodisp.models.blocks import rotations
from nanodisp.models.generate import generate
from nanodisp.models.gpt import GPT, GPTConfig

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

Run = Callable[..., Path]
CONTEXT = 64
STD = 0.8  # of the weights: so large that greedy text varies
SHAPE = {
    **{"vocab_size": 257, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT},
    **{"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
}
THEIRS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama with biases, tied": lambda: transformers.LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "qwen3, tied": lambda: transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True),
}
LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "rope_theta": 50.0, "block_size": CONTEXT}
GROUPED = {"n_head": 4, "n_kv_head": 2, "head_dim": 6, "norm_eps": 1e-2}
OURS = {
    "LlamaForCausalLM": {**LLAMA, "bias": False},
    "LlamaForCausalLM with biases": {**LLAMA, **GROUPED, "bias": True, "tie_embeddings": False},
    "Qwen3ForCausalLM": {**LLAMA, **GROUPED, "bias": False, "qk_norm": True, "dropout": 0.1},
    "Qwen3ForCausalLM untied": {**LLAMA, "bias": False, "qk_norm": True, "tie_embeddings": False},
    "GPT2LMHeadModel untied": {"tie_embeddings": False, "norm_eps": 1e-2, "block_size": CONTEXT},
    "GPT2LMHeadModel without biases": {"tie_embeddings": False, "bias": False, "block_size": CONTEXT},
}


@pytest.fixture(params=THEIRS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model as transformers saves it."""
    return save(request.param, tmp_path)


def save(name: str, tmp_path: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS[name]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=STD)
    model.save_pretrained(tmp_path / "theirs", **options)
    return tmp_path / "theirs"


def imported(folder: Path) -> Path:
    hf.main(["import", f"checkpoint={folder}", f"to={folder.parent / 'run'}", "tokenizer=byte"])
    return folder.parent / "run"


def assert_same_function(ours: GPT, model: Any) -> None:
    """The same logits, and the same 50 tokens after each of three prompts."""
    idx = random_tokens(257, 3, CONTEXT)
    assert close(logits(ours, idx)[..., :257], logits(model, idx))
    prompt = idx[:, :10]
    model.generation_config.eos_token_id = None  # our generate does not stop at end-of-text
    expected = model.generate(prompt, do_sample=False, max_new_tokens=50, pad_token_id=0)[:, 10:]
    assert torch.equal(torch.stack(list(generate(ours, prompt, 50, temperature=0)), dim=1), expected)
    assert len(expected.unique()) > 3, "a constant text would prove little"


def rejected(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        imported(folder)
    assert "\n" not in str(error.value) and not (folder.parent / "run" / "config.yaml").exists()
    return str(error.value)


# --- the same function ------------------------------------------------------------------------


def test_an_imported_model_computes_what_transformers_does(folder: Path) -> None:
    assert_same_function(model_of(imported(folder)), theirs(folder))


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_what_an_exported_model_does(name: str, tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", std=STD, **OURS[name])
    model = theirs(export(run, tmp_path / "exported"))
    assert type(model).__name__ == name.split()[0]
    assert_same_function(model_of(run), model)


@pytest.mark.parametrize("name", OURS)
def test_export_then_import_restores_every_bit(name: str, tmp_path: Path) -> None:
    before = model_of(write_checkpointed_run(tmp_path / "run", "byte", **OURS[name]))
    hf.main(["import", f"checkpoint={export(tmp_path / 'run', tmp_path / 'exported')}", f"to={tmp_path / 'back'}"])
    after = model_of(tmp_path / "back")
    ignored = {"bias"} if "without biases" in name else set()
    shapes = [{k: v for k, v in model.config.shape().items() if k not in ignored} for model in (before, after)]
    assert shapes[0] == shapes[1] and after.config.dropout == before.config.dropout
    restored = after.state_dict()
    for key, tensor in before.state_dict().items():
        rows = 257 if key in ("wte.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(restored[key][:rows], tensor[:rows]), key


def test_a_sharded_model_is_read_from_all_of_its_files(tmp_path: Path) -> None:
    folder = save("llama", tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    idx = random_tokens(257, 2, CONTEXT)
    assert close(logits(model_of(imported(folder)), idx)[..., :257], logits(theirs(folder), idx))
    (tmp_path / "again").mkdir()
    folder = folder.rename(tmp_path / "again" / "theirs")
    next(folder.glob("model-00002*")).unlink()
    assert "the weights of" in rejected(folder)


def test_a_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    """rope_theta on its own; no head_dim, no num_key_value_heads; buffers of rotations among the weights."""
    folder = tmp_path / "theirs"
    torch.manual_seed(1)
    values = {key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(folder)
    expected = logits(theirs(folder), idx := random_tokens(257, 2, CONTEXT))
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads"):
        del config[key]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 50.0, "rope_scaling": None}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    ours = model_of(imported(folder))
    assert (ours.config.rope_theta, ours.config.kv_heads, ours.config.head_width) == (50.0, 4, 4)
    assert close(logits(ours, idx)[..., :257], expected)


def test_names_without_the_prefix_are_read(tmp_path: Path) -> None:
    folder = save("qwen3, tied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    expected = logits(theirs(folder), idx := random_tokens(257, 2, CONTEXT))
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert close(logits(model_of(imported(folder)), idx)[..., :257], expected)


def test_weights_in_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    weight = model_of(imported(folder)).wte.weight[:257]
    assert weight.dtype == torch.float32 and torch.equal(weight, tensors["model.embed_tokens.weight"].float())


def test_positions_are_rotated_as_in_transformers_to_the_last_bit() -> None:
    """Other rounding of the frequencies turns a head by some 1e-4 at the end of a long context."""
    shape = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 8192}
    theirs_ = transformers.LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs_)
    expected = torch.stack(embedding(torch.zeros(1), torch.arange(8192)[None]))[:, 0]
    config = GPTConfig(n_head=1, n_embd=64, block_size=8192, position="rotary", rope_theta=1e5)
    assert torch.equal(rotations(config), expected)


def test_the_base_of_the_rotations_is_written_for_transformers_4_and_5(tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", **OURS["Qwen3ForCausalLM"])
    config = json.loads((export(run, tmp_path / "exported") / "config.json").read_text())
    assert config["rope_theta"] == 50.0 and config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50.0}


# --- what is rejected -------------------------------------------------------------------------

SCALED = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("llama", {"rope_parameters": SCALED}, r"its rotary positions are scaled \(llama3\)"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, r"scaled \(linear\)"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "its partial_rotary_factor is 0.5"),
        ("qwen3", {"use_sliding_window": True}, "its use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "its layer_types have sliding_attention"),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is gelu, not silu"),
        ("llama", {"attention_bias": True}, "its mlp_bias is False, not True"),
        ("qwen3", {"attention_bias": True}, "its attention_bias is True, not False"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "is quantized"),
        ("llama", {"hidden_size": None}, "its hidden_size is None, not an integer"),
        ("llama", {"num_key_value_heads": 3}, "is not divisible by model.n_kv_head=3"),
        ("llama", {"rms_norm_eps": None}, "cannot be read as a LLaMA"),
        ("qwen3", {"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ should be .*, is none"),
        ("qwen3", {"num_key_value_heads": 1}, r"self_attn\.k_proj\.weight should be \[6, 16\], is \[12, 16\]"),
        ("llama", {"tie_word_embeddings": True}, "its output head is not its token embedding, although"),
        ("llama, tied", {"tie_word_embeddings": False}, r"lm_head\.weight should be \[257, 16\], is none"),
        ("llama", {"model_type": "mistral"}, "is of the model_type mistral: supported are gpt2, llama, qwen3"),
        ("llama", {"model_type": None}, "is of the model_type None"),
        ("llama", {"model_type": "qwen3"}, r"k_norm\.weight should be \[6\], is none"),
    ],
    ids=str,
)
def test_unsupported_variants_are_rejected(name: str, values: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save("qwen3, tied" if name == "llama, tied" else name, tmp_path)
    change_config(folder, **values)
    message = rejected(folder)
    assert re.search(words, message), message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_rejected(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert "has quantized weights (model.layers.1.mlp.up_proj.weight is" in rejected(folder)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"mlp": "relu2"}, ["model.mlp=relu2 has no counterpart", "the nearest, GPT-2, has mlp=gelu;"]),
        ({"position": "none"}, ["model.position=none", "GPT-2, has position=learned"]),
        ({"position": "rotary"}, ["model.position=rotary", "GPT-2, has position=learned"]),
        ({"n_kv_head": 1}, ["model.n_kv_head=1", "GPT-2, has n_kv_head=2"]),
        ({"head_dim": 6}, ["model.head_dim=6", "GPT-2, has head_dim=8"]),
        ({"qk_norm": True}, ["model.qk_norm=true", "GPT-2, has qk_norm=false"]),
        ({**LLAMA, "mlp": "gelu", "bias": False}, ["model.mlp=gelu", "LLaMA, has mlp=swiglu"]),
        ({**LLAMA, "norm": "layernorm"}, ["model.norm=layernorm", "LLaMA, has norm=rmsnorm"]),
        ({**LLAMA, "n_embd": 18, "n_head": 4, "head_dim": 6}, ["needs model.n_embd=18 divisible by model.n_head=4"]),
    ],
    ids=str,
)
def test_switches_without_a_counterpart_are_named(shape: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", **shape)
    with pytest.raises(UserError) as error:
        export(run, tmp_path / "exported")
    assert "\n" not in str(error.value) and not (tmp_path / "exported").exists()
    assert all(word in str(error.value) for word in words), error.value


def test_qwen3_has_no_biases(tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", **LLAMA, qk_norm=True, bias=True)
    with pytest.raises(UserError, match="has no counterpart"):
        export(run, tmp_path / "exported")


def test_the_card_names_the_family(tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", **OURS["Qwen3ForCausalLM"])
    card = (export(run, tmp_path / "exported") / "README.md").read_text()
    assert "tags: [nanodisp, qwen3]" in card and "A Qwen3 trained with nanodisp for 3 steps" in card


def test_the_weights_of_a_padded_vocabulary_are_padded_with_zeros(tmp_path: Path) -> None:
    state: dict[str, Tensor] = open_run(str(imported(save("llama", tmp_path)))).saved.model
    assert len(state["wte.weight"]) == len(state["lm_head.weight"]) == 320
    assert not state["wte.weight"][257:].any() and not state["lm_head.weight"][257:].any()


# --- a model with its own tokenizer.json ------------------------------------------------------


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A LLaMA with more tokens than its tokenizer, as Qwen's models have."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 320}, eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "with_tokenizer")
    return write_json_tokenizer(tmp_path / "with_tokenizer")


def test_an_imported_run_keeps_its_tokenizer(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", (with_tokenizer / "tokenizer.json").read_bytes()
    sample.main([f"checkpoint=hf:{with_tokenizer}", "prompt=the", "max_new_tokens=5", "device=cpu", "temperature=0"])
    text = capsys.readouterr().out
    hf.main(["import", f"checkpoint={with_tokenizer}", f"to={run}"])
    assert (run / "tokenizer.json").read_bytes() == file
    shutil.rmtree(with_tokenizer)
    tokenizer = open_run(str(run)).load_tokenizer()
    assert tokenizer.eot == 1 and tokenizer.encode("12<|end|>").tolist()[:2] == [51, 52]
    capsys.readouterr()
    sample.main([f"checkpoint={run}", "prompt=the", "max_new_tokens=5", "device=cpu", "temperature=0"])
    assert capsys.readouterr().out == text
    sample.main([f"checkpoint={run}", "prompt=the <|end|>", "max_new_tokens=5", "device=cpu"])
    assert capsys.readouterr().out.startswith("the <|end|>")
    (tmp_path / "text.txt").write_text("the first and the second " * 20)
    condensation.main([f"checkpoint={run}", f"text={tmp_path / 'text.txt'}", "windows=3", "block=16", "device=cpu"])
    exported = export(run, tmp_path / "exported")
    assert (exported / "tokenizer.json").read_bytes() == file
    theirs_ = transformers.AutoTokenizer.from_pretrained(exported)
    assert (theirs_.eos_token, theirs_.bos_token) == ("<|end|>", "<|start|>")
    assert theirs(exported).config.eos_token_id == 1


def test_training_goes_on_from_a_model_with_its_own_tokenizer(run: Run, with_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text("the first and the second of " * 10 + name)
    text = [f"data.path={tmp_path / 'texts'}", f"data.folder={tmp_path / 'prepared'}", "data.val_fraction=0.5"]
    shape = [f"model.{key}={value}" for key, value in LLAMA.items()]
    shape += ["model.n_head=4", "model.n_kv_head=2", "model.head_dim=6", "model.d_ff=40", "model.norm_eps=1e-2"]
    shape += ["model.bias=false", "model.tie_embeddings=false", "model.vocab_size=320", "model.block_size=16"]
    given = ["data=text", *text, *shape, f"init_from=hf:{with_tokenizer}", "train.steps=2"]
    given += [f"intervention.teacher=hf:{with_tokenizer}", "intervention.distillation_alpha=0.5"]
    folder = run(*given, f"data.tokenizer={with_tokenizer}")
    assert (folder / "tokenizer.json").read_bytes() == (with_tokenizer / "tokenizer.json").read_bytes()
    assert open_run(str(folder)).spec == str(folder / "tokenizer.json")
    [prepared] = (tmp_path / "prepared").iterdir()
    tokens = open_split(prepared, "val")
    n = min(8, (len(tokens) - 1) // 16)
    starts = torch.from_numpy(spread_windows((len(tokens) - 1) // 16, n)) * 16
    rows = torch.stack([torch.from_numpy(tokens.read(s, s + 17).astype("int64")) for s in starts.tolist()])
    predicted = logits(theirs(with_tokenizer), rows[:, :-1]).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(predicted, rows[:, 1:].flatten()).item()
    assert records(folder, "val")[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert records(folder, "train")[0]["distillation"] == pytest.approx(0, abs=1e-6), "it begins as its teacher"
    with pytest.raises(UserError, match=r"was trained with another tokenizer than data\.tokenizer=byte"):
        run(*given, "data.tokenizer=byte", name="other")


def test_a_model_that_is_smaller_than_its_tokenizer_is_rejected(with_tokenizer: Path, tmp_path: Path) -> None:
    change_config(with_tokenizer, vocab_size=300)
    tensors = load_file(with_tokenizer / "model.safetensors")
    cut = {name: t[:300] if t.shape[0] == 320 else t for name, t in tensors.items()}
    save_file(cut, with_tokenizer / "model.safetensors")
    with pytest.raises(UserError, match="has a vocabulary of 300 tokens, its tokenizer of 301"):
        hf.main(["import", f"checkpoint={with_tokenizer}", f"to={tmp_path / 'run'}"])
