"""The tasks on embeddings from the command to evaluation.json, on tiny data sets."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_retrieval import write_beir
from tiny_models import export, write_checkpointed_run

from nanodisp.errors import UserError
from nanodisp.evaluate import __main__ as command
from nanodisp.evaluate import held_out, text_tasks
from nanodisp.evaluate.embeddings import Embeddings
from nanodisp.evaluate.grid import Grid, entry, make_grid
from nanodisp.evaluate.held_out import passages
from nanodisp.runs.evaluation import read_evaluation

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

WORDS = [*("alpha", "beta", "gamma", "delta", "wing", "flow", "heat", "shock", "plate"), *("jet", "drag", "lift")]


def sentences(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 5))) for _ in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a data set of each kind, and a dev split for retrieval."""
    root = tmp_path_factory.mktemp("data")
    texts = sentences(30, seed=1)
    queries = {f"q{i}": text.split()[0] + " " + text.split()[-1] for i, text in enumerate(texts[:12])}
    judged = [(f"q{i}", f"d{i}", 1) for i in range(12)]
    documents = {f"d{i}": text for i, text in enumerate(texts)} | {"empty": ""}
    write_beir(root / "retrieval" / "tiny", documents, queries, test=judged[:6], dev=judged[6:])
    write_beir(root / "retrieval" / "other", documents, queries, test=judged)
    write_beir(root / "swapped", documents, queries, test=judged[6:])
    (root / "sts" / "pairs").mkdir(parents=True)
    for split, seed in (("test", 2), ("dev", 3)):
        pair = sentences(20, seed), sentences(20, seed + 9)
        rows = [f"{a},{b},{i % 5}" for i, (a, b) in enumerate(zip(*pair, strict=True))]
        (root / "sts" / "pairs" / f"pairs-{split}.csv").write_text("\n".join(rows))
    folder = root / "classification" / "nested" / "greek"
    folder.mkdir(parents=True)
    for name, words in (("greek", WORDS[:4]), ("other", WORDS[4:])):
        lines = [" ".join(random.Random(i).choices(words, k=3)) for i in range(20)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpointed_run(tmp_path_factory.mktemp("model") / "run", "byte", block_size=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text(". ".join(sentences(400, seed=5)))
    return file


def go(checkpoint: Path, *arguments: str) -> None:
    command.main([f"checkpoint={checkpoint}", "device=cpu", *arguments])


def test_two_folders_of_one_name_are_two_probes(run: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("imdb/test", "sst/test", "sst/train")):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("neg", "pos"):
            (tmp_path / folder / f"{name}.txt").write_text("\n".join(sentences(6, seed=number)))
    go(run, "tasks=probes", f"data={tmp_path}", f"out={tmp_path / 'out.json'}")
    assert list(read_evaluation(tmp_path / "out.json")["tasks"]) == ["probe_imdb_test", "probe_sst_test", "probe_train"]


def test_one_command_runs_all_tasks_and_the_report_reads_them(
    run: Path, data: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # is not needed
    out = tmp_path / "evaluation.json"
    go(run, "tasks=retrieval,similarity,probes", f"data={data}", f"text={text}", f"out={out}")
    found = read_evaluation(out)["tasks"]
    assert list(found) == ["retrieval_other", "retrieval_tiny", "similarity_pairs", "probe_greek"]
    tiny = found["retrieval_tiny"]
    transforms = ["raw", "centred", "top removed", "whitened"]
    expected = [f"{m} {t}" for m in ("ndcg@10", "mrr", "recall@100") for t in [*transforms, "bm25"]]
    assert list(tiny["metrics"]) == expected
    assert tiny["notes"][:2] == ["6 queries, 30 documents", "1 empty left out, 0 texts cut to 48 tokens"]
    assert "passages of held_out.txt" in tiny["notes"][2]
    assert np.array(tiny["grid"]["mrr"]["whitened"]["weighted"]).shape == (3,), "a number for each layer"
    assert (tiny["chosen"]["by"], found["retrieval_other"]["chosen"]["by"]) == ("dev", "nothing")
    assert found["retrieval_other"]["chosen"]["raw"] == {"layer": 2, "pooling": "mean"}
    assert found["probe_greek"]["metrics"]["acc"]["value"] > 0.9
    printed = capsys.readouterr().out
    assert "probe_greek: 40 texts of 2 classes; 5 folds, mean pooling; 0 empty left out" in printed
    assert f"wrote {out}" in printed
    for name, entry_of in found.items():
        for metric, value in entry_of["metrics"].items():
            assert value["higher_is_better"] is True, (name, metric)
    assert '"last": [0.' in out.read_text(), "a list of numbers is one line"


def test_the_dev_split_chooses_and_transforms_are_fitted_on_the_held_out_text(
    run: Path, data: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Any] = []
    original = text_tasks.make_grid
    monkeypatch.setattr(text_tasks, "make_grid", lambda sets, x, score: (fitted.append(x), original(sets, x, score))[1])
    for folder in ("retrieval/tiny", "swapped"):
        go(run, "tasks=retrieval", f"data={data / folder}", f"text={text}", f"out={tmp_path / 'out.json'}")
    tiny, swapped = read_evaluation(tmp_path / "out.json")["tasks"].values()
    assert {**swapped["best"], "by": "dev"} == tiny["chosen"]
    assert {**tiny["best"], "by": "dev"} != tiny["chosen"], "the test split would have chosen others"
    assert tiny["notes"][-1].startswith(f"fitted on {fitted[0].size(2):,} passages")
    assert all(torch.equal(x, fitted[0]) and x.size(2) > 100 for x in fitted)


def test_tasks_are_added_to_those_of_the_harness_and_an_encoder_has_them_too(data: Path, tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "encoder", "byte", causal=False)
    before = {"metrics": {"acc": {"value": 0.5, "stderr": None, "higher_is_better": True}}, "shots": 0, "examples": 1}
    content = {"model": "encoder at step 3", "harness": "0.4.13", "tasks": {"hellaswag": before}}
    (run / "evaluation.json").write_text(json.dumps(content))
    go(run, "tasks=similarity", f"data={data / 'sts' / 'pairs'}")
    found = read_evaluation(run / "evaluation.json")
    assert found["harness"] == "0.4.13"
    assert found["tasks"]["hellaswag"] == before
    similarity = found["tasks"]["similarity_pairs"]
    assert list(similarity["metrics"]) == ["spearman raw"], "the run has no data, and no text was given"
    assert "only raw embeddings are scored" in similarity["notes"][-1]


def test_the_figures_of_an_exported_run_are_those_of_the_run(run: Path, data: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for checkpoint in (run, export(run, tmp_path / "exported")):
        go(checkpoint, "tasks=similarity", f"data={data}", f"text={text}", f"out={tmp_path / checkpoint.name}.json")
    one, other = (read_evaluation(tmp_path / f"{name}.json")["tasks"] for name in ("run", "exported"))
    values = [[m["value"] for m in tasks["similarity_pairs"]["metrics"].values()] for tasks in (one, other)]
    assert values[0] == pytest.approx(values[1], abs=2e-2)


def test_a_run_is_scored_on_halves_of_its_validation_split_and_fitted_on_its_training_split(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    embed = held_out.embed
    for module in (held_out, text_tasks):
        monkeypatch.setattr(
            module, "embed", lambda e, texts, **kw: (seen.append(list(texts)), embed(e, texts, **kw))[1]
        )
    go(trained, "tasks=retrieval", "limit=20", f"out={tmp_path / 'out.json'}")
    queries, documents, fitted = seen
    assert len(queries) == len(documents) == 20
    found = read_evaluation(tmp_path / "out.json")["tasks"]["retrieval_halves"]
    assert "of the training split of" in found["notes"][-1]
    assert "ndcg@10 whitened" in found["metrics"]
    assert not set(fitted) & {*queries, *documents}
    assert "retrieval_halves: 20 queries, 20 documents" in capsys.readouterr().out


def test_transforms_are_fitted_on_the_validation_split_where_the_data_are_given(trained: Path, data: Path) -> None:
    embedder = command.open_embedder(str(trained))
    val = held_out.open_held_out(embedder, None, "val")
    train = held_out.open_held_out(embedder, None, "train")
    assert "validation split" in val.source
    assert sum(map(len, val.documents)) == 1000
    assert sum(map(len, train.documents)) == 5000
    assert not set(val.documents) & set(train.documents)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=similarity"], "tasks=similarity needs data=<folder>"),
        (["tasks=retrieval"], "run at step 3 cannot be read|comes without data|tasks=retrieval needs data"),
        (["tasks=retrieval", "data=nowhere"], "data=nowhere is not a folder"),
        (["tasks=retrieval", "data={tmp}"], "has no corpus.jsonl: a folder in BEIR's layout"),
        (["tasks=similarity", "data={tmp}"], r"has 0 files \*test.csv"),
        (["tasks=probes", "data={tmp}"], "has no folder with two classes or more"),
        (["tasks=similarity", "data={data}", "text=nowhere"], "text=nowhere cannot be read"),
        (["tasks=hellaswag", "data={data}"], "data=.* is for tasks=retrieval, similarity, probes: leave it out"),
        (["tasks=paper", "text=x"], "text=x is for tasks=retrieval"),
        (["tasks=probes", "data={data}", "text=x"], "text=x is for tasks=retrieval"),
        (["tasks=retrieval,loss", "task_data={data}"], "task_data=.* is for benchmarks: leave it out"),
        (["tasks=probes", "data={data}", "num_fewshot=0"], "num_fewshot=0 is for benchmarks"),
        (["tasks=mteb:STS12", "limit=5"], "limit=5 is not for tasks=mteb"),
        (["tasks=paper,loss"], "tasks=paper,loss: paper and paper14 are given alone"),
        (["tasks=retreival"], "tasks=retreival is unknown; did you mean retrieval"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    run: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    given = [argument.format(tmp=tmp_path / "empty", data=data) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        go(run, *given, f"out={tmp_path / 'out.json'}")
    assert "\n" not in str(error.value)


def test_the_other_tasks_are_evaluated_all_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no corpus.jsonl"):
        go(run, "tasks=retrieval,similarity", f"data={data / 'sts' / 'pairs'}", f"out={tmp_path / 'out.json'}")
    assert list(read_evaluation(tmp_path / "out.json")["tasks"]) == ["similarity_pairs"]


# --- the grid, and held-out passages --------------------------------------------------------------


def grid_of(score: Callable[[int, int], float]) -> Grid:
    """Two layers; x holds its layer and pooling."""
    x = torch.tensor([[[[10.0 * layer + pooling, 0.0]] for pooling in range(3)] for layer in range(2)])
    return make_grid([x], None, lambda z: {"m": (score(*divmod(int(z[0, 0]), 10)), 0.1)})


def test_dev_chooses_and_without_it_the_last_layer_is_reported() -> None:
    test = grid_of(lambda layer, pooling: 0.5 - layer / 10 + pooling / 100)
    dev = grid_of(lambda layer, pooling: float((layer, pooling) == (1, 1)))
    kind = {"examples": 5, "seed": 1, "notes": []}
    alone = entry(test, None, {}, **kind)
    assert alone["metrics"]["m raw"]["value"] == pytest.approx(0.4)
    assert alone["chosen"] == {"raw": {"layer": 1, "pooling": "mean"}, "by": "nothing"}
    assert alone["best"] == {"raw": {"layer": 0, "pooling": "weighted"}}
    chosen = entry(test, dev, {}, **kind)
    assert chosen["metrics"]["m raw"]["value"] == pytest.approx(0.41)
    assert chosen["chosen"] == {"raw": {"layer": 1, "pooling": "last"}, "by": "dev"}
    assert alone["grid"]["m"]["raw"]["last"] == [0.51, 0.41]


def test_each_layer_and_pooling_has_its_own_transform() -> None:
    """The held-out texts are around the mean of each layer and pooling, which centring takes away."""
    x = torch.arange(6.0).reshape(2, 3, 1, 1).expand(2, 3, 4, 2)
    around = x[:, :, :1] + torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    grid = make_grid([x], around, lambda z: {"m": (float(z.abs().max()), 0.1)})
    assert grid.values["m"][..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not grid.values["m"][..., 1].any()


def test_a_score_that_is_not_a_number_is_null_and_never_the_best() -> None:
    grid = grid_of(lambda layer, pooling: float("nan") if (layer, pooling) != (0, 2) else -1.0)
    assert grid.best("raw") == (0, 2)
    assert entry(grid, None, {}, examples=1, seed=1, notes=[])["metrics"]["m raw"]["value"] is None


def test_passages_are_sentences_joined_to_a_length() -> None:
    document = "One two. Three four! Five? " + "x" * 25 + "\n\nlast"
    assert list(passages([document, "other"], 10)) == [
        "One two. Three four!",
        "Five? xxxx",
        "x" * 10,
        "x" * 11,
        "last",
        "other",
    ]
    assert "".join(passages(["a b c"], 100)) == "a b c"


def test_too_little_text_leaves_only_raw(run: Path) -> None:
    embedder = command.open_embedder(str(run))
    scored = Embeddings(torch.zeros(3, 3, 2, 16), 0, 1.0)
    vectors, line = held_out.embed_held_out(embedder, held_out.HeldOut(["a. b."], "some.txt"), ["ab", "cd"], scored)
    assert vectors is None
    assert line == "only raw embeddings are scored: some.txt has 2 passages, 16 are needed"
    many = held_out.HeldOut(["ab cd. " * 20], "some.txt")
    vectors, line = held_out.embed_held_out(embedder, many, ["abcdef"] * 2, scored)
    assert vectors is not None
    assert vectors.shape == (3, 3, 20, 16)
    assert "20 passages of some.txt; too few for 16 features" in line


def test_passages_are_as_long_as_what_is_left_of_the_scored_texts(run: Path) -> None:
    embedder = command.open_embedder(str(run))
    text = held_out.HeldOut(["x" * 400], "some.txt")
    for share, n_passages in ((1.0, 19), (0.5, 39)):
        scored = Embeddings(torch.zeros(3, 3, 2, 16), 0, share)
        vectors, _ = held_out.embed_held_out(embedder, text, ["y" * 20] * 2, scored)
        assert vectors is not None
        assert vectors.size(2) == n_passages, "the last passage may be twice as long"


def test_embeddings_of_several_lists_are_stacked() -> None:
    parts = [Embeddings(torch.full((1, 1, n, 2), n), n, share) for n, share in ((3, 1.0), (1, 0.2))]
    both = held_out.stack(*parts)
    assert both.vectors[0, 0].tolist() == [[3, 3]] * 3 + [[1, 1]]
    assert (both.n_cut, both.share) == (4, pytest.approx(0.8))
