"""The tasks that score embeddings of texts: retrieval, similarity, probes, and those of the mteb package.

`data` is the folder of one data set, or one that holds several: BEIR folders in retrieval/, pairs of sentences in sts/,
and folders of classes anywhere in classification/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import Embedder, Embeddings, embed
from nanodisp.evaluate.grid import VERSION, Grid, Scores, entry, make_grid, table
from nanodisp.evaluate.held_out import HeldOut, embed_held_out, open_held_out, stack
from nanodisp.evaluate.probes import FOLDS, LAYOUT, class_files, probe, read_classes
from nanodisp.evaluate.retrieval import Retrieval, halves, metrics, rank_by_cosine, rank_by_words, read_beir
from nanodisp.evaluate.similarity import find_pairs, read_pairs, spearman
from nanodisp.files import finite
from nanodisp.hf.corpus import folder_of_data, read_some_documents

MTEB = "mteb:"


class Settings(NamedTuple):
    """data, text, limit, seed: the keys of `EvaluateConfig`."""

    data: str | None
    text: str | None
    limit: int | None
    seed: int


class Result(NamedTuple):
    """A data set's name, its entry in evaluation.json, and what is printed."""

    name: str
    entry: dict[str, Any]
    text: str


def is_of_texts(task: str) -> bool:
    return task in TASKS or task.startswith(MTEB)


def evaluate(task: str, embedder: Embedder, settings: Settings) -> Iterator[Result]:
    """The results of a task on each of its data sets; raises UserError for one that cannot be evaluated."""
    if task.startswith(MTEB):
        from nanodisp.evaluate.mteb_model import evaluate_task  # here, because it imports mteb

        name, found, text = evaluate_task(task.removeprefix(MTEB), embedder)
        yield Result(name, found | {"seed": settings.seed}, text)
        return
    if settings.data is None and task != "retrieval":
        raise UserError(f"tasks={task} needs data=<folder>; docs/evaluation.md describes its layout")
    if settings.data is not None and not Path(settings.data).is_dir():
        raise UserError(f"data={settings.data} is not a folder")
    yield from TASKS[task](embedder, settings)


def part_of(settings: Settings, name: str) -> Path:
    """The folder `name` of the data, or the data themselves if they have none."""
    folder = Path(settings.data or "")
    return folder / name if (folder / name).is_dir() else folder


# --- retrieval ---------------------------------------------------------------------------


def evaluate_retrieval(embedder: Embedder, settings: Settings) -> Iterator[Result]:
    if settings.data is None:
        data = halves_of_validation(embedder, settings.limit)
        yield score_retrieval("retrieval_halves", data, embedder, settings, split="train")
        return
    root = part_of(settings, "retrieval")
    folders = sorted(file.parent for file in root.glob("*/corpus.jsonl"))
    for folder in [root] if (root / "corpus.jsonl").is_file() or not folders else folders:
        data = read_beir(folder, settings.limit)
        yield score_retrieval(f"retrieval_{folder.resolve().name}", data, embedder, settings, split="val")


def halves_of_validation(embedder: Embedder, limit: int | None) -> Retrieval:
    """Texts of twice the context in the validation split of a run, cut in halves."""
    subject = embedder.subject
    folder = folder_of_data(subject, "tasks=retrieval needs data=<BEIR folder>")
    assert subject.load_tokenizer is not None  # a run's
    tokenizer = subject.load_tokenizer()
    tokens = list(read_some_documents(folder, "val", tokenizer, subject.vocab_size))
    texts = [tokenizer.decode_bytes(each.tolist()).decode("utf-8", "replace") for each in tokens]
    per_token = sum(map(len, texts)) / max(1, sum(map(len, tokens)))
    return halves(texts, max(2, int(2 * subject.context * per_token)), limit)


def score_retrieval(name: str, data: Retrieval, embedder: Embedder, settings: Settings, split: str) -> Result:
    queries, documents = embed(embedder, data.queries), embed(embedder, data.documents)
    held_out = open_held_out(embedder, settings.text, split)
    fitting, fitted = embed_held_out(embedder, held_out, data.documents, documents)

    def score(relevant: Sequence[dict[int, float]]) -> Any:
        return lambda queries, documents: metrics(rank_by_cosine(queries, documents), relevant)

    grid = make_grid([queries.vectors, documents.vectors], fitting, score(data.relevant))
    dev = None
    if data.dev_queries:
        dev_queries = embed(embedder, data.dev_queries)
        dev = make_grid([dev_queries.vectors, documents.vectors], fitting, score(data.dev_relevant))
    counted = f"{len(data.queries):,} queries, {len(data.documents):,} documents"
    notes = [counted, lost(embedder, data.n_empty, stack(queries, documents)), fitted]
    bm25 = {"bm25": metrics(rank_by_words(data), data.relevant)}
    return finish(name, grid, dev, bm25, len(data.queries), settings, notes)


# --- similarity --------------------------------------------------------------------------


def evaluate_similarity(embedder: Embedder, settings: Settings) -> Iterator[Result]:
    root = part_of(settings, "sts")
    folders = sorted({file.parent for file in root.glob("*/*test.csv")})
    for folder in folders if folders and not list(root.glob("*test.csv")) else [root]:
        yield score_similarity(f"similarity_{folder.resolve().name}", folder, embedder, settings)


def score_similarity(name: str, folder: Path, embedder: Embedder, settings: Settings) -> Result:
    test_file, dev_file = find_pairs(folder)
    test = read_pairs(test_file, settings.limit)
    firsts, seconds = embed(embedder, test.firsts), embed(embedder, test.seconds)
    scored = stack(firsts, seconds)
    held_out: HeldOut = open_held_out(embedder, settings.text, "val")
    fitting, fitted = embed_held_out(embedder, held_out, [*test.firsts, *test.seconds], scored)
    grid = make_grid([firsts.vectors, seconds.vectors], fitting, lambda a, b: spearman(a, b, test.gold))
    dev = None
    if dev_file:
        pairs = read_pairs(dev_file, settings.limit)
        of_dev = [embed(embedder, texts).vectors for texts in (pairs.firsts, pairs.seconds)]
        dev = make_grid(of_dev, fitting, lambda a, b: spearman(a, b, pairs.gold))
    notes = [f"{len(test.gold):,} pairs", lost(embedder, test.n_empty, scored), fitted]
    return finish(name, grid, dev, {}, len(test.gold), settings, notes)


def finish(
    name: str,
    grid: Grid,
    dev: Grid | None,
    baselines: dict[str, Scores],
    examples: int,
    settings: Settings,
    notes: Sequence[str],
) -> Result:
    found = entry(grid, dev, baselines, examples=examples, seed=settings.seed, notes=notes)
    return Result(name, found, "\n".join([f"{name}: {'; '.join(notes)}", table(grid, dev, baselines)]))


def lost(embedder: Embedder, n_empty: int, scored: Embeddings) -> str:
    """A line about texts that were left out or cut."""
    return f"{n_empty:,} empty left out, {scored.n_cut:,} texts cut to {embedder.subject.context:,} tokens"


# --- probes ------------------------------------------------------------------------------


def evaluate_probes(embedder: Embedder, settings: Settings) -> Iterator[Result]:
    root = part_of(settings, "classification")
    folders = [each for each in (root, *sorted(root.rglob("*"))) if each.is_dir() and len(class_files(each)) > 1]
    if not folders:
        raise UserError(f"data={root} has no folder with two classes or more: {LAYOUT}")
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        of_its_own = names.count(name) == 1  # else its path tells it from the others: imdb_test, sst_test
        path = "_".join(folder.relative_to(root).parts)
        yield score_probe(f"probe_{name if of_its_own else path or name}", folder, embedder, settings)


def score_probe(name: str, folder: Path, embedder: Embedder, settings: Settings) -> Result:
    data = read_classes(folder, settings.limit)
    embeddings = embed(embedder, data.texts, poolings=["mean"])
    folds = probe(embeddings.vectors[:, 0], data.labels, settings.seed)  # [layers, FOLDS]
    means, deviations = folds.mean(axis=1), folds.std(axis=1, ddof=1)
    notes = [
        f"{len(data.texts):,} texts of {len(data.names)} classes",
        f"{FOLDS} folds, mean pooling",
        lost(embedder, data.n_empty, embeddings),
    ]
    best = int(means.argmax())
    acc = {"value": float(means[-1]), "stderr": finite(deviations[-1] / FOLDS**0.5), "higher_is_better": True}
    found = {
        "metrics": {"acc": acc},
        "shots": 0,
        "examples": len(data.texts),
        "version": VERSION,
        "seed": settings.seed,
        "notes": notes,
        "chosen": {"raw": {"layer": len(means) - 1, "pooling": "mean"}, "by": "nothing"},
        "best": {"raw": {"layer": best, "pooling": "mean"}},
        "grid": {"acc": {"raw": {"mean": means.round(4).tolist()}}, "deviation": deviations.round(4).tolist()},
    }
    show = lambda values: "".join(f"{value:8.4f}" for value in values)  # noqa: E731
    lines = [
        f"{name}: {'; '.join(notes)}",
        f"{'layer':12}{''.join(f'{layer:8}' for layer in range(len(means)))}",
        f"{'accuracy':12}{show(means)}",
        f"{'deviation':12}{show(deviations)}  (of folds)",
        f"last layer {means[-1]:.4f}, best (exploratory) {means[best]:.4f} of layer {best}, "
        f"largest class {np.bincount(data.labels).max() / len(data.labels):.4f}",
    ]
    return Result(name, found, "\n".join(lines))


TASKS = {"retrieval": evaluate_retrieval, "similarity": evaluate_similarity, "probes": evaluate_probes}
