"""What a run's folder says to the same command, another one, and after damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import records, weights, write_corpus
from tiny_models import write_ranks_file

from nanodisp.condensation import __main__ as condensation
from nanodisp.errors import UserError
from nanodisp.runs import checkpoint
from nanodisp.runs.metrics import Metrics
from nanodisp.runs.read import read_run

Run = Callable[..., Path]


@pytest.mark.parametrize(
    "options",
    [(), ("optim=muon",), ("model.dropout=0.1",), ("train.dtype=float16",), ("model.causal=false",)],
    ids=str,
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(run: Run, options: tuple[str, ...]) -> None:
    settings = ("train.steps=20", "train.checkpoint_interval=10", "train.eval_interval=5", "train.log_interval=3")
    folder = run(*settings, *options)
    whole, lines = weights(folder), records(folder, "train") + records(folder, "val")
    shutil.rmtree(folder / "checkpoints" / "step_00000020")  # as if it had been killed after step 10
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "split": "tra')  # in the middle of a line
    run(*settings, *options)
    again, lines_again = weights(folder), records(folder, "train") + records(folder, "val")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    for line in lines + lines_again:
        line.pop("seconds"), line.pop("tokens_per_second", None)
    assert sorted(map(str, lines)) == sorted(map(str, lines_again))


def test_repeating_the_command_of_a_complete_run_says_so_and_changes_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("train.steps=5")
    before = (folder / "metrics.jsonl").read_text(), (folder / "checkpoints" / "step_00000005").stat().st_mtime_ns
    capsys.readouterr()
    run("train.steps=5")
    assert "the run is complete at step 5" in capsys.readouterr().out
    assert before == (
        (folder / "metrics.jsonl").read_text(),
        (folder / "checkpoints" / "step_00000005").stat().st_mtime_ns,
    )


def test_a_complete_run_whose_records_are_gone_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train.steps=2")
    (folder / "metrics.jsonl").unlink()
    capsys.readouterr()
    run("train.steps=2")
    printed = capsys.readouterr().out
    assert f"{folder / 'metrics.jsonl'} holds no validation: it was deleted" in printed
    assert f"delete {folder} and run the same command again" in printed
    assert "not finite" not in printed


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda file: file.write_text(""),
    "no yaml": lambda file: file.write_text("model: ["),
    "cut": lambda file: file.write_text(file.read_text()[:200]),
    "binary": lambda file: file.write_bytes(b"\xff\0\xff"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_the_configuration_of_a_complete_run_is_written_again_if_it_is_damaged(run: Run, damage: str) -> None:
    settings = ("dispersion.layers=[1,2]", "train.dtype=auto")
    folder = run("train.steps=2", *settings)
    before = (folder / "config.yaml").read_text()
    DAMAGES[damage](folder / "config.yaml")
    assert read_run(folder).config["model.n_layer"] == 2, "the report reads it from the checkpoint"
    assert (read_run(folder).status, read_run(folder).total_steps) == ("finished", 2)
    with pytest.raises(UserError, match="resume=auto"):
        run("train.steps=2", *settings, "resume=never")
    run("train.steps=1", *settings)
    assert (folder / "config.yaml").read_text() == before


def test_a_checkpoint_of_another_run_is_rejected_and_kept(run: Run) -> None:
    folder = run("train.steps=2")
    before = weights(folder)
    with pytest.raises(UserError, match=r"another run: model.n_embd=16 \(now 32\)"):
        run("train.steps=4", "model.n_embd=32")
    with pytest.raises(UserError, match=r"another run: optim.name=adamw \(now muon\), .*seed=1337 \(now 1\)"):
        run("train.steps=4", "seed=1", "optim=muon")
    with pytest.raises(UserError, match="resume=auto"):
        run("train.steps=4", "resume=never")
    assert all(torch.equal(before[key], value) for key, value in weights(folder).items())


def test_a_dry_run_is_refused_where_the_run_would_be(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("train.steps=2")
    capsys.readouterr()
    run("train.steps=2", "dry_run=true")
    assert "done already" in capsys.readouterr().out
    for options, words in ((("optim.lr=1",), "another run: optim.lr="), (("resume=never",), "resume=auto resumes it")):
        with pytest.raises(UserError, match=words):
            run("train.steps=2", "dry_run=true", *options)
    run("train.steps=4")
    for step, printed in ((4, "from step 2"), (2, None)):
        state = folder / "checkpoints" / f"step_{step:08d}" / "state.json"
        state.write_text(state.read_text()[:-9])
        if printed is None:
            with pytest.raises(UserError, match=r"state.json cannot be read"):
                run("train.steps=4", "dry_run=true")
        else:
            capsys.readouterr()
            run("train.steps=4", "dry_run=true")
            assert printed in capsys.readouterr().out


def test_a_run_on_shards_that_decide_their_tokenizer_is_resumed(run: Run, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "fineweb" / "gpt2-3")
    settings = ("data=fineweb10B", "data.chunks=3", f"data.folder={tmp_path / 'fineweb'}", "data.path=null")
    folder = run("train.steps=2", *settings)
    run("train.steps=4", *settings)
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 4]


@pytest.mark.parametrize(
    ("switch", "words"),
    [
        ("model.mlp=relu2", r"model.mlp=relu2 \(now gelu\)"),  # tensors of the same names and shapes
        ("model.norm_eps=1e-3", r"model.norm_eps=0.001 \(now 1e-05\)"),
        ("model.n_kv_head=1", r"model.n_kv_head=1 \(now None\)"),
    ],
)
def test_a_run_is_not_resumed_without_a_switch_that_it_began_with(run: Run, switch: str, words: str) -> None:
    run("train.steps=2", switch)
    with pytest.raises(UserError, match=f"another run: {words}"):
        run("train.steps=4")


def test_a_run_is_not_resumed_with_another_switch(run: Run) -> None:
    run("train.steps=2")
    with pytest.raises(UserError, match=r"another run: model.mlp=gelu \(now relu2\)"):
        run("train.steps=4", "model.mlp=relu2")


def test_other_text_makes_it_another_run(run: Run, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", n_train=3000)
    run("train.steps=2")
    with pytest.raises(UserError, match=r"another run: .*corpus="):
        run("train.steps=2", f"data.path={other}")


def test_a_run_is_resumed_on_the_same_tokens_in_another_place(run: Run, corpus: Path, tmp_path: Path) -> None:
    folder = run("train.steps=2")
    moved = shutil.copytree(corpus, tmp_path / "moved")
    run("train.steps=4", f"data.path={moved}")
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 4]


def test_a_run_is_resumed_when_its_shards_have_moved_with_the_file_of_their_tokenizer(run: Run, tmp_path: Path) -> None:
    ranks = write_ranks_file(tmp_path / "own.tiktoken")
    (tmp_path / "text.txt").write_text("the cat and the dog\n" * 300)
    text = ("data=text", f"data.path={tmp_path / 'text.txt'}", f"data.tokenizer={ranks}", "train.sample_tokens=0")
    folder = run("train.steps=2", *text, f"data.folder={tmp_path / 'here'}")
    (tmp_path / "here").rename(tmp_path / "there")
    run("train.steps=4", *text, f"data.folder={tmp_path / 'there'}")
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 4]
    (tmp_path / "text.txt").write_text("the dog and the cat\n" * 300)
    with pytest.raises(UserError, match=r"^the text has changed"):
        run("train.steps=6", *text, f"data.folder={tmp_path / 'there'}")


def test_a_text_that_has_changed_under_the_same_command_is_rejected(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    own = ("data=text", f"data.path={text}", f"data.folder={tmp_path / 'prepared'}", "train.steps=1")
    text.write_text("some words " * 200)
    run(*own)
    text.write_text("other words " * 200)
    with pytest.raises(
        UserError, match=r"^the text has changed: .*step_00000001 was trained on a-byte-\w+, .*run_name="
    ):
        run(*own)


@pytest.mark.parametrize("named", [True, False], ids=["manifest", "nanoGPT"])
def test_shards_that_have_changed_under_the_same_folder_are_rejected(run: Run, tmp_path: Path, named: bool) -> None:
    folder = write_corpus(tmp_path / "own", n_train=3000)
    if not named:
        (folder / "manifest.json").unlink()
    own = (f"data.path={folder}", *(() if named else ("data.tokenizer=none", "model.vocab_size=257")))
    trained = run("train.steps=2", *own)
    run("train.steps=2", *own)
    shard = folder / "train_000000.bin"
    before = shard.read_bytes()
    shard.write_bytes(before[:-4] + b"a\0b\0")  # of the same size, and the manifest unchanged
    message = rf"^the shards in {folder} have changed since .*step_00000002 was saved: .*run_name=<another>"
    for steps in (2, 4):
        with pytest.raises(UserError, match=message):
            run(f"train.steps={steps}", *own)
    with pytest.raises(UserError, match="own has changed since run at step 2 was trained on it: give text="):
        condensation.main([f"checkpoint={trained}"])
    shard.write_bytes(before)
    run("train.steps=4", *own)


def test_a_budget_may_grow_and_a_smaller_one_changes_nothing(run: Run) -> None:
    folder = run("train.steps=4")
    run("train.steps=6")
    assert checkpoint.find(folder).name == "step_00000006"
    config = (folder / "config.yaml").read_text()
    run("train.steps=3")
    assert (folder / "config.yaml").read_text() == config


def test_a_second_process_in_the_same_folder_is_rejected(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        Metrics(tmp_path / "run"),
        pytest.raises(UserError, match="another process is training into"),
    ):
        run("train.steps=1")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    run("train.steps=1")


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(run: Run) -> None:
    settings = ("train.steps=20", "train.checkpoint_interval=5", "train.log_interval=1")
    folder = run(*settings)
    whole, lines = weights(folder), records(folder, "train")
    (checkpoint.find(folder) / "optimizer.safetensors").write_bytes(b"not this")
    run(*settings)
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())
    assert [{**a, "seconds": 0, "tokens_per_second": 0} for a in records(folder, "train")] == [
        {**a, "seconds": 0, "tokens_per_second": 0} for a in lines
    ]


@pytest.mark.parametrize("change", [{"config": [1]}, {"bad_steps": None}, {"seconds": None}, {"corpus": None}], ids=str)
def test_a_foreign_checkpoint_with_right_checksums_is_rejected_in_one_line(run: Run, change: dict[str, object]) -> None:
    folder = run("train.steps=2")
    saved = checkpoint.load(checkpoint.find(folder))
    state = {key: value for key, value in {**saved.state, **change}.items() if value is not None and key != "sha256"}
    checkpoint.save(folder / "checkpoints", saved.model, saved.optimizer, state)
    with pytest.raises(UserError, match=r"step_00000002 cannot be resumed|is of another run") as error:
        run("train.steps=4")
    assert "\n" not in str(error.value)
