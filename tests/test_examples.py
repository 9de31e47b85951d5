"""The examples run, and add exactly the dispersion loss to another training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import export, write_checkpointed_run

from nanodisp import DispersionLoss
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError
from nanodisp.hf.tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from examples import classify, hf_trainer, semantic_search  # noqa: E402

pytestmark = pytest.mark.slow

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "max_grad_norm": 0,
}


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
        dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **shape, **dropout))
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=257, **shape, **heads))


def blocks(n: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(257, (n, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(kind: str, data: Any, to: Path, *, rows: int, accumulate: int, lambda_disp: float) -> dict[str, Any]:
    """The weights after one step of plain gradient descent."""
    settings = transformers.TrainingArguments(
        **SETTINGS,
        output_dir=str(to),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
    )
    trainer = hf_trainer.DispersionTrainer(tiny(kind), settings, train_dataset=data, lambda_disp=lambda_disp)
    trainer.train()
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
@pytest.mark.parametrize(("rows", "accumulate"), [(4, 1), (1, 4)])
def test_a_step_adds_the_gradient_of_dispersion_with_and_without_accumulation(
    tmp_path: Path, kind: str, rows: int, accumulate: int
) -> None:
    data = blocks(4)
    plain = trained(kind, data, tmp_path, rows=rows, accumulate=accumulate, lambda_disp=0)
    found = trained(kind, data, tmp_path, rows=rows, accumulate=accumulate, lambda_disp=2.0)
    model = tiny(kind)
    hidden = model(torch.stack([row["input_ids"] for row in data]), output_hidden_states=True).hidden_states
    torch.stack([DispersionLoss()(h) for h in hidden[1:]]).mean().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name] - plain[name], -0.5 * 2.0 * gradient, rtol=1e-4, atol=1e-6), name
        assert not torch.equal(plain[name], parameter)


def test_evaluation_is_cross_entropy_alone(tmp_path: Path) -> None:
    settings = transformers.TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    trainer = hf_trainer.DispersionTrainer(tiny("qwen3"), settings, eval_dataset=blocks(4), lambda_disp=100.0)
    idx = torch.stack([row["input_ids"] for row in blocks(4)])
    with torch.no_grad():
        expected = tiny("qwen3").eval()(idx, labels=idx).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_the_command_trains_a_saved_model_and_writes_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    source, to = tmp_path / "source", tmp_path / "to"
    tiny(kind).save_pretrained(source)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(load_tokenizer("byte")))
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 100)
    settings = ("steps=3", "batch_size=2", "accumulate=2", "block_size=24", "max_tokens=8")
    hf_trainer.main([f"model={source}", f"data={tmp_path / 'text.txt'}", f"to={to}", *settings])
    after = transformers.AutoModelForCausalLM.from_pretrained(to)
    assert any(not torch.equal(p, q) for p, q in zip(after.parameters(), tiny(kind).parameters(), strict=True))
    assert {path.suffix for path in to.iterdir() if path.is_file()} == {".json", ".safetensors"}
    assert transformers.AutoTokenizer.from_pretrained(to).decode([102, 111, 120]) == "fox"


def test_mistakes_are_reported_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("gpt2").save_pretrained(source)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(load_tokenizer("byte")))
    tokenizer.save_pretrained(source)
    (tmp_path / "short.txt").write_text("short")
    for given, message in (
        ({"model": tmp_path / "missing"}, "model=.* cannot be loaded"),
        ({"data": tmp_path / "missing"}, "data=.* cannot be read: No such file"),
        ({}, "has 5 tokens: block_size=24 needs more text"),
        ({"block_size": 999}, "block_size=999 is longer than the model's context"),
        ({"to": tmp_path / "short.txt"}, "to=.* is a file"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"lr": "nan"}, "lr=nan must be a finite number"),
    ):
        values = {"model": source, "data": tmp_path / "short.txt", "to": tmp_path / "to", "block_size": 24, **given}
        with pytest.raises(UserError, match=message) as error:
            hf_trainer.main([f"{key}={value}" for key, value in values.items()])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("trap", ["code", "pickle"])
def test_custom_code_and_pickles_are_rejected(tmp_path: Path, trap: str) -> None:
    source = tmp_path / "source"
    tiny("gpt2").save_pretrained(source)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(load_tokenizer("byte")))
    tokenizer.save_pretrained(source)
    if trap == "pickle":
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
    else:
        config = json.loads((source / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (source / "config.json").write_text(json.dumps(config))
        (source / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        hf_trainer.load(str(source))
    assert not (tmp_path / "executed").exists()


# --- embeddings -----------------------------------------------------------------------------------

TOPICS = {"numbers": "1234 5678 {} 90.", "letters": "abcd efgh {} ij."}


@pytest.fixture(scope="module", params=["run", "hugging face"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run = write_checkpointed_run(folder / "run", "byte", block_size=48)
    return run if request.param == "run" else export(run, folder / "exported")


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """A folder with a file for each topic, ten lines each."""
    (tmp_path / "topics").mkdir()
    for name, line in TOPICS.items():
        (tmp_path / "topics" / f"{name}.txt").write_text("\n".join(line.format(i * 7) for i in range(10)) + "\n")
    return tmp_path / "topics"


def test_a_search_finds_the_nearest_passages(model: Path, topics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (topics / "notes.md").write_text("abcd efgh 3 ij. " * 9)
    given = [f"checkpoint={model}", f"texts={topics}", "characters=12"]
    semantic_search.main([*given, "query=1234 5678 21 90.", "n=3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"1.0000  {topics / 'numbers.txt'}: 1234 5678 21 90."
    assert all("numbers.txt" in line for line in lines)
    semantic_search.main([*given, "query=abcd", "transform=raw", "n=99", "layer=0", "pooling=last", "files=*.md"])
    assert len(capsys.readouterr().out.splitlines()) == 9
    for extra, message in (
        ("transform=none", "transform=none is unknown; choose one of raw, centred"),
        ("n=0", "n=0 must be at least 1"),
        ("files=*.pdf", r"has 0 passages in files=\*\.pdf"),
        ("pooling=median", "pooling=median is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            semantic_search.main([*given, "query=x", extra])


def test_a_classifier_learns_from_lines(
    model: Path, topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "texts").write_text("abcd efgh 99 ij.\n\n1234 5678 99 90.\n")
    given = [f"checkpoint={model}", f"labelled={topics}"]
    classify.main([*given, f"texts={tmp_path / 'texts'}"])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == "accuracy in five folds of the labelled texts: 1.0000, deviation 0.0000"
    assert first.startswith("letters.txt  0.9") and first.endswith("  abcd efgh 99 ij.")
    assert second.startswith("numbers.txt  0.9")
    (tmp_path / "empty").write_text("\n")
    for arguments, message in (
        ([*given, f"texts={tmp_path / 'empty'}"], "has no line to classify"),
        ([given[0], f"labelled={tmp_path / 'texts'}", "texts=x"], "labelled=.* is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            classify.main(arguments)
