"""Benchmarks of local files through the command, against log-likelihoods of one token at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # before their packages are imported

import numpy as np
import pytest
from tiny_models import export, loglikelihood, model_of, write_benchmarks, write_checkpointed_run

from nanodisp.data.benchmarks import BENCHMARKS, read_items
from nanodisp.data.tokenizer import ByteTokenizer
from nanodisp.errors import UserError
from nanodisp.evaluate import __main__ as evaluate
from nanodisp.hf.open import open_run
from nanodisp.runs import checkpoint

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("datasets")

BYTE = ByteTokenizer()
BLOCK = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpointed_run(tmp_path_factory.mktemp("model") / "run", "byte", block_size=BLOCK)


@pytest.fixture(scope="module")
def everything(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The entries of all benchmarks, and the file that they are in."""
    out = tmp_path_factory.mktemp("out") / "evaluation.json"
    return go(run, data, f"tasks={','.join(BENCHMARKS)}", f"out={out}", "batch_size=3"), out


def go(checkpoint: Path, data: Path, *arguments: str) -> dict[str, Any]:
    """Evaluate; return the entries of the file that `out=` names."""
    evaluate.main([f"checkpoint={checkpoint}", f"task_data={data}", "device=cpu", *arguments])
    out = next((Path(each[4:]) for each in arguments if each.startswith("out=")), checkpoint / "evaluation.json")
    return json.loads(out.read_text())["tasks"]


def values(entry: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in entry["metrics"].items()}


def total(run: Path, context: str, continuation: str) -> float:
    start = BYTE.encode(context).tolist() or [BYTE.eot]
    return loglikelihood(model_of(run), start, BYTE.encode(continuation).tolist())[0]


# --- figures ----------------------------------------------------------------------------


def test_choices_by_their_sum_and_by_their_mean_per_character(run: Path, data: Path, everything: Any) -> None:
    by_sum, by_mean = [], []
    for item in read_items("hellaswag", data):
        totals = [total(run, item["context"], f" {choice}") for choice in item["choices"]]
        means = [each / len(choice) for each, choice in zip(totals, item["choices"], strict=True)]
        by_sum.append(totals.index(max(totals)) == item["gold"])
        by_mean.append(means.index(max(means)) == item["gold"])
    assert by_sum != by_mean
    found = values(everything[0]["hellaswag"])
    assert found == pytest.approx({"acc": np.mean(by_sum), "acc_norm": np.mean(by_mean)})
    assert all(metric["higher_is_better"] for metric in everything[0]["hellaswag"]["metrics"].values())
    assert {**everything[0]["hellaswag"], "metrics": 0, "settings": 0} == {
        **{"metrics": 0, "settings": 0, "shots": 0, "examples": 12, "version": 1.0, "seed": 1234, "cut": 0}
    }


def test_a_pair_of_sentences_by_their_log_likelihoods_overall_and_by_field(
    run: Path, data: Path, everything: Any
) -> None:
    items = read_items("blimp", data)
    right = np.array([total(run, "", f" {i['choices'][0]}") > total(run, "", f" {i['choices'][1]}") for i in items])
    fields = np.array([item["field"] for item in items])
    expected = {f"acc_{field}": right[fields == field].mean() for field in set(fields)}
    assert values(everything[0]["blimp"]) == pytest.approx({"acc": right.mean(), **expected})
    assert 0 < right.mean() < 1


def test_contexts_of_one_continuation(run: Path, data: Path, everything: Any) -> None:
    right = []
    for item in read_items("winogrande", data):
        totals = [total(run, context, f" {item['continuation']}") for context in item["contexts"]]
        right.append(totals.index(max(totals)) == item["gold"])
    assert values(everything[0]["winogrande"]) == pytest.approx({"acc": np.mean(right)})
    assert 0 < np.mean(right) < 1


def test_the_last_word(run: Path, data: Path, everything: Any) -> None:
    totals = [total(run, item["context"], item["target"]) for item in read_items("lambada", data)]
    found = values(everything[0]["lambada"])
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(totals)), rel=1e-4)
    assert found == values(everything[0]["lambada_openai"])


def test_truthfulqa(run: Path, data: Path, everything: Any) -> None:
    right = {name: [] for name in ("truthfulqa_binary", "truthfulqa_mc1", "truthfulqa_mc2")}
    for name, found in right.items():
        for item in read_items(name, data):
            p = np.exp([total(run, item["context"], f" {choice}") for choice in item["choices"]])
            found.append(p[: item["n_right"]].sum() / p.sum() if name == "truthfulqa_mc2" else p.argmax() == 0)
        assert values(everything[0][name]) == pytest.approx({"acc": np.mean(found)}, abs=1e-4)
    assert everything[0]["truthfulqa_binary"]["cut"] == 2 * 12, "its prompt is longer than the context"
    assert everything[0]["blimp"]["cut"] == 0


def test_bits_per_byte_of_pages(run: Path, data: Path, everything: Any) -> None:
    bits = n_bytes = 0.0
    for item in read_items("wikitext", data):
        text = item["page"].replace(" , ", ", ").replace(" . ", ". ").replace(" \n", "\n").replace("\n ", "\n")
        row = [BYTE.eot, *BYTE.encode(text.replace("= =", "==")).tolist()]
        for start in range(1, len(row), BLOCK):
            end = min(start + BLOCK, len(row))
            first = 0 if start == 1 else end - BLOCK - 1  # the last window is full
            bits -= loglikelihood(model_of(run), row[first:start], row[start:end])[0] / math.log(2)
        n_bytes += len(item["page"].encode())
    assert values(everything[0]["wikitext"])["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-4)


def test_the_exported_model_has_the_same_items(run: Path, data: Path, everything: Any, tmp_path: Path) -> None:
    """Through the harness's own `hf` model and transformers."""
    pytest.importorskip("accelerate")
    exported = export(run, tmp_path / "exported")
    names = ("blimp", "hellaswag", "winogrande", "truthfulqa_mc1")
    go(exported, data, f"tasks={','.join(names)}", f"out={tmp_path / 'out.json'}")
    with (
        np.load(tmp_path / "out_items.npz") as theirs,
        np.load(everything[1].with_name("evaluation_items.npz")) as ours,
    ):
        assert set(theirs) <= set(ours)
        for key in theirs:
            assert np.array_equal(theirs[key], ours[key]), key


def test_a_text_is_cut_where_its_last_token_needs_more_than_the_context(run: Path) -> None:
    model = evaluate.open_model(evaluate.EvaluateConfig(str(run), tasks="blimp"), str(run), "cpu")
    for n, cut in ((BLOCK - 1, 0), (BLOCK, 0), (BLOCK + 1, 1)):
        model.loglikelihood([SimpleNamespace(args=("a" * n, "b"))], disable_tqdm=True)
        assert model.cut == cut


def test_examples_in_front_are_other_items(data: Path) -> None:
    from nanodisp.evaluate.tasks import FileTask

    items = read_items("openbookqa", data)
    task = FileTask("openbookqa", items)
    task.set_fewshot_seed(seed=1234)
    for item in items:
        prompt = task.fewshot_context(item, num_fewshot=len(items) - 1)
        assert [prompt.count(other["context"]) for other in items] == [1] * len(items), "each once, itself at the end"
        assert prompt.endswith(item["context"])


# --- one call after another ---------------------------------------------------------------


@pytest.mark.parametrize("what", ["tokenizer", "version"])
def test_a_task_is_evaluated_again_with_another_tokenizer_or_in_another_version(
    run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    from nanodisp.evaluate import tasks

    original = tasks.settings_of
    arguments = ("tasks=piqa", "limit=4", f"out={tmp_path / 'out.json'}")
    go(run, data, *arguments, *(["tokenizer=byte"] if what == "tokenizer" else []))
    if what == "version":
        monkeypatch.setattr(tasks, "settings_of", lambda name: {**original(name), "metadata": {"version": 7.0}})
    for done in (False, True):
        capsys.readouterr()
        go(run, data, *arguments)
        assert ("piqa: done already" in capsys.readouterr().out) == done


def test_a_call_that_was_killed_resumes_with_what_is_not_done(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanodisp.evaluate import tasks

    scored: list[str] = []
    original = tasks.score

    def score(model: Any, loaded: Any, **settings: Any) -> Any:
        (name,) = loaded["tasks"]
        if name == "piqa" and "piqa" not in scored:
            scored.append(name)
            raise KeyboardInterrupt
        scored.append(name)
        return original(model, loaded, **settings)

    monkeypatch.setattr(tasks, "score", score)
    arguments = ("tasks=blimp,piqa,lambada", "limit=4", f"out={tmp_path / 'out.json'}")
    with pytest.raises(KeyboardInterrupt):
        go(run, data, *arguments)
    go(run, data, *arguments)
    assert scored == ["blimp", "piqa", "piqa", "lambada"]
    assert "blimp: done already, redo=true evaluates it again" in capsys.readouterr().out
    go(run, data, *arguments, "redo=true")
    assert len(scored) == 7
    go(run, data, "tasks=blimp", "limit=5", f"out={tmp_path / 'out.json'}")
    other = shutil.copytree(data, tmp_path / "data")
    lines = (other / "blimp.jsonl").read_text().splitlines(keepends=True)
    (other / "blimp.jsonl").write_text("".join(reversed(lines)))
    go(run, other, "tasks=blimp", "limit=5", f"out={tmp_path / 'out.json'}")
    assert scored[7:] == ["blimp", "blimp"], "another limit, other data"


def test_other_weights_of_the_same_name_are_not_mixed(run: Path, data: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out.json'}"
    go(run, data, "tasks=piqa", "limit=2", out)
    again = write_checkpointed_run(tmp_path / "run", "byte", block_size=BLOCK, std=0.2)
    with pytest.raises(UserError, match="is of run at step 3, this is run at step 3 with other weights"):
        go(again, data, "tasks=blimp", "limit=2", out)


def test_all_checkpoints_of_a_run_are_evaluated(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", block_size=BLOCK)
    saved = open_run(str(run)).saved
    state = {key: value for key, value in saved.state.items() if key not in ("sha256", "format_version")}
    other = {name: -tensor for name, tensor in saved.model.items()}
    go(run, data, "tasks=piqa", "checkpoints=all")
    checkpoint.save(run / "checkpoints", other, {}, {**state, "step": 5})  # it is trained further
    capsys.readouterr()
    go(run, data, "tasks=piqa,winogrande", "checkpoints=all")
    printed = capsys.readouterr().out
    assert printed.count("piqa: done already") == 1, "step 3"
    assert {file.name for file in run.glob("*.npz")} == {"evaluation_items.npz", "evaluation_step_00000003_items.npz"}
    first, last = (json.loads((run / f"evaluation{of}.json").read_text()) for of in ("_step_00000003", ""))
    assert (first["model"], last["model"]) == ("run at step 3", "run at step 5")
    means = [np.mean([values(each["tasks"][name])["acc"] for name in ("piqa", "winogrande")]) for each in (first, last)]
    assert means[0] != means[1]
    best = 3 if means[0] >= means[1] else 5
    expected = f"best of 2 checkpoints by the mean: {max(means):.4f} at step {best}; last: {means[1]:.4f} at step 5"
    assert expected in printed


# --- mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=blimp", "task_data=nowhere"], "nowhere is not a folder"),
        (["tasks=blimp", "out=."], r"\. is a folder: out=… is the file to write"),
        (["tasks=blimp", "checkpoints=some"], "checkpoints=some is unknown; choose one of one, all"),
        (["tasks=blimp", "checkpoints=all", "out=x"], "checkpoints=all writes a file for each"),
        (["tasks=blimp", "checkpoints=all", "checkpoint=nowhere"], "nowhere holds no checkpoints"),
    ],
)
def test_mistakes_are_reported_in_one_line(run: Path, data: Path, arguments: list[str], message: str) -> None:
    given = {"checkpoint": str(run), "task_data": str(data)} | dict(each.split("=", 1) for each in arguments)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([f"{key}={value}" for key, value in given.items()])
    assert "\n" not in str(error.value)


def test_a_model_that_gives_nan_is_rejected(data: Path, tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte", block_size=BLOCK)
    saved = open_run(str(run)).saved
    saved.model["ln_f.weight"].fill_(3e38)  # finite, but not what follows
    state = {key: value for key, value in saved.state.items() if key not in ("sha256", "format_version")}
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", saved.model, {}, state)
    with pytest.raises(UserError, match=r"the model gives NaN for 24 of 24 texts: .*diverged"):
        go(run, data, "tasks=blimp")
    assert not (run / "evaluation.json").exists()


def test_an_empty_text_of_a_task_is_reported(run: Path, data: Path) -> None:
    from nanodisp.evaluate.tasks import FileTask, score

    items = read_items("blimp", data)
    items[1]["choices"][1] = ""
    loaded = {"tasks": {"blimp": FileTask("blimp", items)}, "groups": {}, "group_map": {}}
    loaded["tasks"]["blimp"].set_config("target_delimiter", "")
    model = evaluate.open_model(evaluate.EvaluateConfig(str(run), tasks="blimp"), str(run), "cpu")
    with pytest.raises(UserError, match="item 1 of blimp has an empty text"):
        score(model, loaded, limit=None, shots=None, seed=0)
