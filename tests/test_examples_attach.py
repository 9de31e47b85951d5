"""The examples of `attach` in the loops of others: they run, are short, and train on the dispersion as well."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.hf.tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'nanodisp[eval]'")

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "attach"
CPU = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 2}


def example(name: str, *needed: str) -> Any:
    for package in needed:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'nanodisp[examples]'")
    return importlib.import_module(f"examples.attach.{name}")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A tiny GPT-2 with a tokenizer of bytes."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 257}
    config = transformers.GPT2Config(**shape, bos_token_id=256, eos_token_id=256)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(load_tokenizer("byte")))
    tokenizer.add_special_tokens({"eos_token": tokenizer.decode([256]), "pad_token": tokenizer.decode([256])})
    tokenizer.save_pretrained(tmp_path / "model")
    yield tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"the quick brown fox {i} jumps. " for i in range(200)))
    return file


def test_no_example_is_longer_than_40_lines() -> None:
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) == 5
    assert [file.name for file in files if len(file.read_text().splitlines()) > 40] == []


def test_hugging_face_trainer(model: Path, text: Path, tmp_path: Path) -> None:
    trainer = example("trainer", "accelerate").main(
        str(model), str(text), str(tmp_path / "to"), 24, logging_steps=1, **CPU
    )
    logged = [entry["dispersion"] for entry in trainer.state.log_history if "dispersion" in entry]
    assert len(logged) == 2 and all(math.isfinite(value) for value in logged)
    assert (tmp_path / "to" / "model.safetensors").exists()


def test_sft_trainer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = example("sft", "trl", "datasets")
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"What is {i}? ", "completion": "A number. " * (1 + i % 3)} for i in range(16)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sft.main(str(model), str(data), str(tmp_path / "to"), **CPU)
    assert "dispersion -0." in capsys.readouterr().out


def test_lightning(model: Path, text: Path, tmp_path: Path) -> None:
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False, "accelerator": "cpu"}
    module = example("lightning_module", "lightning")
    trained = module.main(str(model), str(text), 24, max_steps=2, default_root_dir=tmp_path, **quiet)
    assert trained.handle.passes == 8, "two steps of four micro-batches"


def test_a_plain_loop(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = example("plain_loop").main(str(model), str(text), steps=2, length=24, batch=2, accumulate=3)
    assert handle.passes == 6
    assert capsys.readouterr().out.count("dispersion -0.") == 2


def test_mid_training(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = example("midtrain_gpt2").main(str(model), str(text), str(tmp_path / "to"), 5, 24, 2, 2)
    assert handle.passes == 10
    assert capsys.readouterr().out.count("dispersion -0.") == 5
    assert (tmp_path / "to" / "model.safetensors").exists()


# --- an update of TRL's and Lightning's is that of the explicit sum --------------------------------------------


def test_an_update_of_sft_is_that_of_the_explicit_sum(model: Path, tmp_path: Path) -> None:
    """TRL divides by the tokens of all micro-batches; the dispersion is their mean, without padding."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'nanodisp[examples]'")
    datasets = pytest.importorskip("datasets")
    from nanodisp.dispersion import DispersionLoss, attach

    def load() -> Any:
        none = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, **none)

    pairs = [{"prompt": f"What is {i}? ", "completion": "A number. " * (1 + i % 3)} for i in range(4)]
    found = []
    for lambda_disp in (0, 3.0):
        trained = load()
        handle = attach(trained, lambda_disp=lambda_disp)
        arguments = trl.SFTConfig(
            **{**CPU, "max_steps": 1},
            output_dir=str(tmp_path),
            gradient_accumulation_steps=2,
            learning_rate=1.0,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=lambda_disp > 0,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        data = datasets.Dataset.from_list(pairs)
        trainer = trl.SFTTrainer(trained, arguments, train_dataset=data, processing_class=tokenizer)
        handle.follow_trainer(trainer)
        seen: list[Any] = []
        compute_loss = trainer.compute_loss

        def spy(model: Any, inputs: Any, *, keep: Any = seen, inner: Any = compute_loss, **kwargs: Any) -> Any:
            keep.append({name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs})
            return inner(model, inputs, **kwargs)

        trainer.compute_loss = spy
        trainer.train()
        found.append((dict(trained.named_parameters()), seen))
    right = load().train()
    assert len(found[1][1]) == 2
    for inputs in found[1][1]:
        hidden = right(**inputs, output_hidden_states=True).hidden_states[1:]
        rows = [row.bool() for row in inputs["attention_mask"]]
        each = [[DispersionLoss()(h[i : i + 1, kept]) for i, kept in enumerate(rows)] for h in hidden]
        (3.0 / 2 * torch.stack([torch.stack(layer).mean() for layer in each]).mean()).backward()
    (plain, _), (dispersed, _) = found
    for name, parameter in right.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(plain[name] - dispersed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
