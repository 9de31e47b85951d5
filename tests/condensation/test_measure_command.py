"""`python -m nanodisp.condensation`: what it writes and prints, for runs, texts and Hugging Face models; mistakes."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus

from nanodisp.condensation import __main__ as condensation
from nanodisp.condensation.measure import Condensation
from nanodisp.errors import UserError
from nanodisp.runs import checkpoint


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A run to measure into."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.slow
def test_a_run_is_measured_and_plotted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    condensation.main([f"checkpoint={folder}", "windows=5"])
    out = capsys.readouterr().out
    assert "eff. rank" in out
    summary = json.loads((folder / "condensation.json").read_text())
    assert (summary["windows"], summary["block"]) == (5, 16)
    assert [layer["layer"] for layer in summary["layers"]] == [0, 1, 2]
    assert summary["layers"][-1]["condition"] is None, "JSON has no infinity"
    with np.load(folder / "condensation.npz") as arrays:
        assert arrays["histogram"].shape == (3, 128)
        assert set(arrays) == {name for name in Condensation.__annotations__ if name not in summary}
    for name in ("condensation.png", "condensation.svg", "tokens.png", "tokens.svg"):
        assert (folder / "figures" / name).stat().st_size > 1000


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_text_file_can_be_measured_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 50)
    condensation.main(
        [
            f"checkpoint={folder}",
            f"text={tmp_path / 'text.txt'}",
            "block=8",
            "without=2",
            f"out={tmp_path / 'measured'}",
        ]
    )
    summary = json.loads((tmp_path / "measured" / "condensation.json").read_text())
    assert (summary["windows"], summary["without"]) == (550 // 8, 2)
    assert summary["source"] == "run at step 3 without 2 directions"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_hugging_face_folder_is_measured(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=32, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    condensation.main([f"checkpoint={tmp_path / 'model'}", f"data={corpus}", "windows=3", "device=cpu"])
    summary = json.loads((tmp_path / "model" / "condensation.json").read_text())
    assert (len(summary["layers"]), summary["block"], summary["windows"]) == (3, 32, 3)
    with pytest.raises(UserError, match="give text="):
        condensation.main([f"checkpoint={tmp_path / 'model'}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "holds no checkpoint"),
        (["checkpoint={run}", "block=17"], "longer than the model's context of 16"),
        (["checkpoint=nowhere", "block=1"], "a pair needs 2 tokens"),
        (["checkpoint=nowhere", "windows=0"], "windows=0"),
        (["checkpoint=nowhere", "without=-1"], "without=-1 must not be negative"),
        (["checkpoint={run}", "without=16"], "without=16 directions leaves nothing of the model's 16"),
        (["checkpoint=nowhere", "text=a", "data=b"], "give one of them"),
        (["checkpoint={run}", "text=nowhere"], "text=nowhere cannot be read"),
        (["checkpoint={run}", "text={tmp}/short"], "short has 5 tokens, a window 16: give a longer text, or block=5$"),
        (["checkpoint={run}", "text={tmp}/latin1"], r"latin1 is not UTF-8 \(byte 3\): convert it"),
        (["checkpoint={run}", "data={tmp}/shards"], r"shards has 10 tokens, a window 16: give .* block=10$"),
        (["checkpoint={run}", "out={tmp}/short"], "short cannot be written: File exists; choose another with out="),
        (["checkpoint={run}", "data="], "data= is empty"),
        (["checkpoint={run}", "out="], "out= is empty"),
        (["checkpoint={run}", "tokenizer=gpt"], "tokenizer=gpt is unknown"),
        (["checkpoint={run}@7"], "has checkpoints of steps 3, and @7 is not one"),
        (["checkpoint=nowhere", "projection=sphere"], "choose one of pca, tsne, umap"),
    ],
)
def test_mistakes_are_reported_in_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "short").write_text("words")
    (tmp_path / "latin1").write_bytes(b"caf\xe9 " * 20)
    write_corpus(tmp_path / "shards", n_val=11)
    if arguments[-1] == "tokenizer=gpt":
        arguments = [*arguments, f"text={tmp_path / 'short'}"]
    with pytest.raises(UserError, match=message) as error:
        condensation.main([argument.format(run=folder, tmp=tmp_path) for argument in arguments])
    assert "\n" not in str(error.value) and not (folder / "condensation.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_data_of_a_run_must_be_there_and_the_same(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 500)
    text = ("data=text", f"data.path={tmp_path / 'text.txt'}", f"data.folder={tmp_path / 'prepared'}")
    folder = run("train.steps=1", "train.sample_tokens=0", *text)
    condensation.main([f"checkpoint={folder}"])
    assert json.loads((folder / "condensation.json").read_text())["source"] == "run at step 1"
    (tmp_path / "text.txt").write_text("other words " * 500)
    condensation.main([f"checkpoint={folder}"])  # its shards are still there
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(UserError, match=r"is not what run at step 1 was trained on, .*: give text=<file> or data="):
        condensation.main([f"checkpoint={folder}"])
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"data of run at step 1 cannot be read \(.*\): give text=<file> or data="):
        condensation.main([f"checkpoint={folder}"])


def test_a_mark_of_utf_8_is_no_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\ufeff" + "word" * 3)
    with pytest.raises(UserError, match="has 12 tokens, a window 16"):
        condensation.main([f"checkpoint={folder}", f"text={tmp_path / 'text.txt'}"])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "mark"), [("a.txt.gz", b""), ("A.TXT.GZ", codecs.BOM_UTF8), ("a.txt", "utf-16")])
def test_a_text_is_read_as_data_are(folder: Path, tmp_path: Path, name: str, mark: bytes | str) -> None:
    """Gzip by its name, the encoding by a byte order mark."""
    text, path = "words and more words " * 20, tmp_path / name
    raw = text.encode(mark) if isinstance(mark, str) else mark + text.encode()
    path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    (tmp_path / "plain").write_text(text)
    figures = []
    for file in (path, tmp_path / "plain"):
        condensation.main([f"checkpoint={folder}", f"text={file}"])
        figures.append((folder / "condensation.json").read_text())
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"words", r"a\.txt\.gz cannot be read: Not a gzipped file"),
        (gzip.compress(b"words " * 99)[:-9], r"a\.txt\.gz cannot be read: "),
        (gzip.compress(b"%PDF-1.7"), r"a\.txt\.gz is a PDF \(extract its text first"),
    ],
    ids=["plain", "truncated", "pdf"],
)
def test_what_is_no_text_is_reported(folder: Path, tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.txt.gz").write_bytes(raw)
    with pytest.raises(UserError, match=message):
        condensation.main([f"checkpoint={folder}", f"text={tmp_path / 'a.txt.gz'}"])


@pytest.mark.usefixtures("undrawn")
def test_weights_that_are_not_finite_are_reported(folder: Path) -> None:
    saved = checkpoint.load(checkpoint.find(folder))
    saved.model["ln_f.weight"][0] = math.inf
    state = {key: value for key, value in saved.state.items() if key not in ("sha256", "format_version")}
    checkpoint.save(folder / "checkpoints", saved.model, saved.optimizer, {**state, "step": 4})
    with pytest.raises(UserError, match=r"step_00000004 cannot be used: its ln_f.weight has values that are NaN or"):
        condensation.main([f"checkpoint={folder}"])
    condensation.main([f"checkpoint={folder}@best"])
    assert json.loads((folder / "condensation.json").read_text())["source"] == "run at step 3"


@pytest.mark.usefixtures("undrawn")
def test_results_of_another_checkpoint_are_kept(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("train.steps=2", "train.checkpoint_interval=1", "train.sample_tokens=0")
    for windows in ("windows=3", "windows=4"):
        condensation.main([f"checkpoint={folder}", windows])
    with pytest.raises(UserError, match=r"condensation.json is of run at step 2, this is run at step 1: .*out=…"):
        condensation.main([f"checkpoint={folder}@1"])
    assert json.loads((folder / "condensation.json").read_text())["windows"] == 4
    condensation.main([f"checkpoint={folder}@1", f"out={tmp_path / 'first'}"])
    (folder / "condensation.json").write_text("damaged")
    condensation.main([f"checkpoint={folder}@1"])
    assert json.loads((folder / "condensation.json").read_text())["source"] == "run at step 1"


@pytest.mark.usefixtures("undrawn")
def test_a_quantized_model_is_measured_after_rounding_and_its_results_are_its_own(
    trained: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("null", "int8", "w4a4"):
        condensation.main([f"checkpoint={trained}", "windows=3", f"quantize={name}", f"out={tmp_path / name}"])
        found[name] = json.loads((tmp_path / name / "condensation.json").read_text())
    cosines = {name: np.array([layer["mean"] for layer in content["layers"]]) for name, content in found.items()}
    assert found["w4a4"]["source"] == "run at step 3 in w4a4"
    assert cosines["int8"][0] == cosines["w4a4"][0] == cosines["null"][0], "the embedding is not rounded"
    moved = {name: np.abs(cosines[name] - cosines["null"])[1:].max() for name in ("int8", "w4a4")}
    assert 0 < moved["int8"] < moved["w4a4"]
    with pytest.raises(UserError, match=r"w4a4/condensation.json is of run at step 3 in w4a4, this is run at step 3"):
        condensation.main([f"checkpoint={trained}", f"out={tmp_path / 'w4a4'}"])
