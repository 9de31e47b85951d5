"""The adapter gives mteb the vectors of the model; a task of mteb has our own figure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_text_tasks import sentences
from tiny_models import write_checkpointed_run

from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import Embedder, embed, open_embedder
from nanodisp.evaluate.mteb_model import MtebModel, evaluate_task
from nanodisp.evaluate.similarity import spearman

pytestmark = pytest.mark.slow

mteb, datasets = pytest.importorskip("mteb"), pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return open_embedder(str(write_checkpointed_run(tmp_path_factory.mktemp("model") / "run", "byte")))


def test_texts_in_batches_become_vectors(embedder: Embedder) -> None:
    model = MtebModel(embedder, layer=1, pooling="last")
    assert isinstance(model, mteb.EncoderProtocol)
    found = model.encode([{"text": ["a", ""]}, {"text": ["abc"]}], task_metadata=None, hf_split="test", hf_subset="x")
    expected = embed(embedder, ["a", "abc"]).vectors[1, 1].numpy()
    assert np.array_equal(found[[0, 2]], expected)
    assert not found[1].any()
    assert model.similarity(found[:1], found).shape == (1, 3)
    assert model.similarity(found[2:], found[2:]).item() == pytest.approx(1)
    assert np.allclose(model.similarity_pairwise(found, found), [1, 0, 1])


def test_a_task_has_the_figure_of_our_own(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, seconds = sentences(20, seed=1), sentences(20, seed=2)
    gold = [float(i % 5) for i in range(20)]

    def load(self: Any, **_: Any) -> None:
        pairs = {"sentence1": firsts, "sentence2": seconds, "score": gold}
        self.dataset, self.data_loaded = {"test": datasets.Dataset.from_dict(pairs)}, True

    monkeypatch.setattr(type(mteb.get_task("STSBenchmark")), "load_data", load)
    name, entry, line = evaluate_task("STSBenchmark", embedder)
    a, b = (embed(embedder, texts).vectors[-1, 0] for texts in (firsts, seconds))
    expected = spearman(a, b, gold)["spearman"][0]
    assert name == "mteb_STSBenchmark"
    assert entry["metrics"]["cosine_spearman"]["value"] == pytest.approx(expected, abs=1e-6)
    assert entry["examples"] == 40
    assert line == f"mteb_STSBenchmark: cosine_spearman {expected:.4f}; last layer, mean pooling, raw"


def test_mistakes_are_reported_in_one_line(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tasks=mteb:STSBenchmrk is unknown to mteb; did you mean STSBenchmark"):
        evaluate_task("STSBenchmrk", embedder)

    def offline(self: Any, **_: Any) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(type(mteb.get_task("STS12")), "load_data", offline)
    with pytest.raises(UserError, match=r"task mteb:STS12 cannot be run.*: ConnectionError no network") as error:
        evaluate_task("STS12", embedder)
    assert "\n" not in str(error.value)


def test_the_command_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedder: Embedder) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError, match=r"this needs mteb: pip install 'nanodisp\[mteb\]'"):
        evaluate_task("STS12", embedder)
