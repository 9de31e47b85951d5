"""Export and import: the same weights, function and tokens; unsupported models are rejected in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, records
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import MERGES, export, model_of, write_checkpointed_run, write_ranks_file
from torch import Tensor

import sample
from nanodisp.condensation import __main__ as condensation
from nanodisp.config import TrainConfig
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError
from nanodisp.hf import __main__ as hf
from nanodisp.hf.open import initial_weights, open_run
from nanodisp.hf.tokenizer import build_tokenizer
from nanodisp.models.generate import generate
from nanodisp.runs.read import read_runs

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

Run = Callable[..., Path]


def theirs(folder: Path) -> Any:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), "no weight is missing, superfluous or of another shape"
    return model.eval()


def random_tokens(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def logits(model: Any, idx: Tensor) -> Tensor:
    with torch.no_grad():
        return model(idx).logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["byte", "tiny"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    spec = "byte" if request.param == "byte" else str(write_ranks_file(folder / "tiny.tiktoken"))
    return write_checkpointed_run(folder / "run", spec)


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    return export(trained, trained.parent / "exported")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2 as transformers saves it."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=24, n_inner=40, vocab_size=257)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


# --- export ----------------------------------------------------------------------------------


def test_transformers_computes_the_same_logits_from_an_exported_folder(trained: Path, exported: Path) -> None:
    idx = random_tokens(256, 3, 32)
    model = theirs(exported)
    assert model.config.vocab_size == model_of(trained).vocab_size
    assert close(logits(model, idx), logits(model_of(trained), idx)[..., : model.config.vocab_size])


def test_transformers_continues_a_prompt_with_the_same_tokens(trained: Path, exported: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = theirs(exported)
    prompt = tokenizer("the first", return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None  # our generate does not stop at end-of-text
    expected = [int(token) for token in generate(model_of(trained), prompt, 20, temperature=0)]
    got = model.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)[0, prompt.size(1) :]
    assert got.tolist() == expected
    assert len(set(expected)) > 1, "a constant text would prove little"


def test_a_model_without_biases_is_exported_with_biases_of_zero(tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", bias=False, d_ff=None)
    folder = export(run, tmp_path / "exported")
    idx = random_tokens(257, 2, 32)
    assert close(logits(theirs(folder), idx), logits(model_of(run), idx)[..., :257])
    biases = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1 and not any(bias.any() for bias in biases)


def test_exported_files_have_the_permissions_that_the_umask_leaves(trained: Path, tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        folder = export(trained, tmp_path / "exported")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}


def test_the_best_checkpoint_can_be_exported(trained: Path, tmp_path: Path) -> None:
    assert "for 3 steps" in (export(Path(f"{trained}@3"), tmp_path / "exported") / "README.md").read_text()
    with pytest.raises(UserError, match="none has a validation loss"):
        export(Path(f"{trained}@best"), tmp_path / "best")


def test_existing_folders_are_not_overwritten(trained: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        export(trained, exported)
    with pytest.raises(UserError, match="is not empty"):
        hf.main(["import", f"checkpoint={exported}", f"to={trained}"])


# --- tokenizers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(trained: Path, exported: Path) -> tuple[Any, Any]:
    return load_tokenizer(open_run(str(trained)).spec), transformers.AutoTokenizer.from_pretrained(exported)


PIECES = st.sampled_from(
    [*(m.decode("utf-8", "ignore") for m in MERGES), "<|endoftext|>", " \n", "'ll", "1234567", "é"]
)


@given(st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join))
def test_an_exported_tokenizer_encodes_any_text_to_the_same_tokens(both: tuple[Any, Any], text: str) -> None:
    assert both[1](text).input_ids == both[0].encode(text).tolist()


@given(st.lists(st.integers(0, 256), max_size=12))
def test_an_exported_tokenizer_decodes_any_tokens_to_the_same_text(both: tuple[Any, Any], tokens: list[int]) -> None:
    expected = both[0].decode_bytes(tokens).decode("utf-8", "replace")
    assert both[1].decode(tokens, skip_special_tokens=True) == expected


def test_an_exported_tokenizer_has_the_id_of_end_of_text(both: tuple[Any, Any]) -> None:
    assert both[1].eos_token_id == both[1].bos_token_id == both[0].eot
    assert len(both[1]) == both[0].vocab_size


# --- import ----------------------------------------------------------------------------------


def test_export_then_import_restores_weights_and_tokenizer(trained: Path, exported: Path, tmp_path: Path) -> None:
    hf.main(["import", f"checkpoint={exported}", f"to={tmp_path / 'back'}"])
    before, after = model_of(trained), model_of(tmp_path / "back")
    assert after.config == before.config
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a[: before.vocab_size] if name == "wte.weight" else a, b[: len(a)][: before.vocab_size])
    specs = [open_run(str(run)).spec for run in (trained, tmp_path / "back")]
    text = "the bab  abaaba éa 12"
    assert load_tokenizer(specs[0]).encode(text).tolist() == load_tokenizer(specs[1]).encode(text).tolist()


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_an_imported_gpt2_computes_the_same_logits(gpt2: Path, tmp_path: Path, prefix: str) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    tensors = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 24, 24), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
    expected = logits(theirs(gpt2), idx := random_tokens(257, 2, 24))
    save_file({**tensors, **mask}, gpt2 / "model.safetensors", metadata={"format": "pt"})
    hf.main(["import", f"checkpoint=hf:{gpt2}", f"to={tmp_path / 'run'}", "tokenizer=byte"])
    got = logits(model_of(tmp_path / "run"), idx)
    assert close(got[..., :257], expected)
    assert got.size(-1) == 320 and got[..., 257:].isneginf().all()


def test_a_gpt2_tokenizer_is_imported_too(gpt2: Path, tmp_path: Path) -> None:
    """As transformers saves GPT-2's: a vocabulary, merges, and no pattern of its own."""
    tokenizer = load_tokenizer(write_ranks_file(tmp_path / "tiny.tiktoken"))
    built = json.loads(build_tokenizer(tokenizer).to_str())["model"]
    reachable = {a + b for a, b in built["merges"]} | {t for t, rank in built["vocab"].items() if rank < 256}
    vocab = {token: rank for rank, token in enumerate(t for t in built["vocab"] if t in reachable)}
    vocab["<|endoftext|>"] = len(vocab)
    merges = [tuple(pair) for pair in built["merges"]]
    saved = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    saved.save_pretrained(gpt2)
    change_config(gpt2, vocab_size=len(vocab))
    tensors = load_file(gpt2 / "model.safetensors")
    save_file(
        {**tensors, "transformer.wte.weight": torch.zeros(len(vocab), 16)}, gpt2 / "model.safetensors", {"format": "pt"}
    )
    hf.main(["import", f"checkpoint={gpt2}", f"to={tmp_path / 'run'}"])
    imported = load_tokenizer(tmp_path / "run" / "tokenizer.tiktoken")
    assert imported.encode("the abab 12é").tolist() == saved("the abab 12é").input_ids


def test_an_imported_run_is_sampled_and_measured(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    hf.main(["import", f"checkpoint={exported}", f"to={run}"])
    sample.main([f"checkpoint={run}", "prompt=the", "max_new_tokens=5", "device=cpu"])
    assert "the" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the first and the second " * 20)
    condensation.main([f"checkpoint={run}", f"text={tmp_path / 'text.txt'}", "windows=3", "device=cpu"])
    assert json.loads((run / "condensation.json").read_text())["windows"] == 3
    with pytest.raises(UserError, match="give text="):
        condensation.main([f"checkpoint={run}", "device=cpu"])
    assert [(found.status, found.problem) for found in read_runs(tmp_path)] == [
        ("unfinished", f"at step 0 of {TrainConfig().steps}")
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"activation_function": "relu"}, "its activation_function is relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight should be \[257, 16\], is none"),
        ({"layer_norm_epsilon": None}, "cannot be read as a GPT-2"),
        ({"attn_pdrop": 0.2}, "its dropouts differ"),
        ({"n_layer": 3}, r"h\.2\.\S+ should be .*, is none"),
        ({"n_layer": 1}, r"h\.1\.\S+ should be none"),
        ({"n_layer": 2.0}, r"its n_layer is 2\.0, not an integer"),
        ({"vocab_size": None}, "its vocab_size is None, not an integer"),
        ({"n_head": 3}, "n_embd=16 is not divisible by model.n_head=3"),
        ({"vocab_size": 300}, "has no tokenizer.json: give tokenizer="),
    ],
    ids=str,
)
def test_unsupported_variants_are_rejected(gpt2: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    change_config(gpt2, **values)
    if values.get("vocab_size"):
        tensors = load_file(gpt2 / "model.safetensors")
        tensors["transformer.wte.weight"] = torch.zeros(300, 16)
        save_file(tensors, gpt2 / "model.safetensors")
    with pytest.raises(UserError, match=words) as error:
        hf.main(["import", f"checkpoint={gpt2}", f"to={tmp_path / 'run'}"])
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "config.yaml").exists()


def test_an_untied_output_head_is_rejected(gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(257, 16)}, gpt2 / "model.safetensors")
    with pytest.raises(UserError, match="its output head is not its token embedding"):
        hf.main(["import", f"checkpoint={gpt2}", f"to={tmp_path / 'run'}", "tokenizer=byte"])


def test_weights_that_are_not_finite_are_rejected(gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = torch.nan
    save_file(tensors, gpt2 / "model.safetensors")
    with pytest.raises(UserError, match=r"its \S+h\.1\.mlp\.c_fc\.weight has values that are NaN or infinite"):
        hf.main(["import", f"checkpoint={gpt2}", f"to={tmp_path / 'run'}", "tokenizer=byte"])


def test_weights_in_pickles_are_not_read(gpt2: Path, tmp_path: Path) -> None:
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        hf.main(["import", f"checkpoint={gpt2}", f"to={tmp_path / 'run'}", "tokenizer=byte"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give export or import"),
        (["out"], "give export or import"),
        (["export", "checkpoint=nowhere", "to={tmp}/a"], "nowhere holds no checkpoint"),
        (["export", "checkpoint=nowhere"], "to is required"),
        (["import", "checkpoint={tmp}", "to={tmp}/a"], "cannot be read as a Hugging Face model"),
        (["export", "checkpoint=hf:gpt2", "to={tmp}/a"], "is a Hugging Face model already"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        hf.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert "\n" not in str(error.value)


def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs tokenizers: pip install 'nanodisp\[eval\]'"):
        export(trained, tmp_path / "exported")


# --- init_from -------------------------------------------------------------------------------

SHORT = ("train.steps=4", "train.checkpoint_interval=2", "train.sample_tokens=0", "train.log_interval=1")


def test_a_run_starts_from_the_weights_of_another(run: Run, tmp_path: Path) -> None:
    source = run(*SHORT, name="source")
    folder = run(*SHORT, f"init_from={source}", "seed=2", name="on")
    assert records(folder, "val")[0]["loss"] == records(source, "val")[-1]["loss"]
    assert records(folder, "train")[0]["loss"] < records(source, "train")[0]["loss"]
    exported = export(source, tmp_path / "exported")
    again = run(*SHORT, f"init_from=hf:{exported}", "seed=2", name="again")
    assert [r["loss"] for r in records(again, "train")] == [r["loss"] for r in records(folder, "train")]


def test_a_resumed_run_does_not_load_the_initial_weights_again(run: Run, tmp_path: Path) -> None:
    source = run(*SHORT, name="source")
    uninterrupted = run(*SHORT, f"init_from={source}", name="uninterrupted")
    run(*SHORT, f"init_from={source}", "train.steps=2", "optim.schedule=constant", name="parts")
    source.rename(tmp_path / "moved")
    parts = run(*SHORT, f"init_from={source}", "optim.schedule=constant", name="parts")
    assert [record["step"] for record in records(parts, "val")] == [0, 2, 4]
    assert records(parts, "val")[0]["loss"] == records(uninterrupted, "val")[0]["loss"]
    with pytest.raises(UserError, match=r"init_from=.* \(now None\)"):
        run(*SHORT, "optim.schedule=constant", name="parts")


def test_a_shorter_context_and_another_dropout_are_accepted(run: Run, gpt2: Path) -> None:
    change_config(gpt2, n_positions=24)
    options = ("model.d_ff=40", "model.dropout=0.2", "train.steps=1", "train.sample_tokens=0")
    folder = run(*options, f"init_from={gpt2}")
    assert model_of(folder).config.block_size == model_of(folder).wpe.weight.size(0) == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "another shape: give model.d_ff=40$"),
        (("model.d_ff=40", "model.n_layer=3"), "give model.n_layer=2$"),
        (("model.d_ff=40", "model.block_size=32"), "give model.block_size=24$"),
        (("model.d_ff=40", "model.bias=false"), "give model.bias=true$"),
        (("model.d_ff=40", "model.norm_eps=1e-6"), "give model.norm_eps=1e-05$"),
        (("model.d_ff=40", "model.vocab_size=300"), r"model.vocab_size=257; another vocabulary is another data.tokeni"),
        (("init_from=nowhere",), "nowhere holds no checkpoint"),
        (("init_from=nowhere", "dry_run=true"), "nowhere holds no checkpoint"),
    ],
    ids=str,
)
def test_another_shape_is_rejected_with_the_keys_to_give(
    run: Run, gpt2: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        run(f"init_from={gpt2}", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_tokenizer_of_the_same_size_is_rejected(tmp_path: Path) -> None:
    spec = str(write_ranks_file(tmp_path / "tiny.tiktoken"))
    shuffled = tmp_path / "other.tiktoken"
    lines = (tmp_path / "tiny.tiktoken").read_bytes().splitlines()
    tokens = [line.split()[0] for line in lines][::-1]
    shuffled.write_bytes(b"".join(b"%s %d\n" % (token, rank) for rank, token in enumerate(tokens)))
    run = write_checkpointed_run(tmp_path / "run", spec)
    model = model_of(run)

    def weights_for(tokenizer: str) -> dict[str, Tensor]:
        config = compose(f"init_from={run}", f"data.tokenizer={tokenizer}")
        return initial_weights(dataclasses.replace(config, model=model.config))

    assert weights_for(spec).keys() == model.state_dict().keys()
    assert weights_for("nowhere.tiktoken"), "a tokenizer that is not available is not compared"
    with pytest.raises(UserError, match=r"another tokenizer than data.tokenizer=.*other\.tiktoken"):
        weights_for(str(shuffled))
