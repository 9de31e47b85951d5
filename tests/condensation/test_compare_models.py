"""`compare`: the paper's table and heatmaps, of ours before training; tests/hf/test_their_models.py has others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_measure import WINDOWS, lookup
from tiny_models import write_checkpointed_run

from nanodisp.condensation import __main__ as condensation
from nanodisp.condensation import compare, figures
from nanodisp.condensation.compare import CompareConfig, in_the_paper
from nanodisp.condensation.measure import sum_layers
from nanodisp.condensation.sums import CosineSums
from nanodisp.condensation.windows import first_tokens, read_texts
from nanodisp.errors import UserError


def run_compare(tmp_path: Path, names: list[str], *arguments: str) -> dict[str, Any]:
    out = tmp_path / "compared"
    condensation.main(["compare", f"checkpoint={','.join(names)}", "device=cpu", f"out={out}", *arguments])
    return json.loads((out / "compare.json").read_text())


def sums(include_diagonal: bool) -> tuple[list[CosineSums], list[np.ndarray]]:
    """The sums of each layer over batches of unequal size, and its matrices of cosines, [W, N, N]."""
    model = lookup().requires_grad_(False)
    batches = [(None, model(part)) for part in WINDOWS.split(4)]
    layers = sum_layers(batches, lambda depth, z: CosineSums(z.device, include_diagonal, z.size(1)))
    directions = [torch.nn.functional.normalize(z, dim=-1) for z in model(WINDOWS)]
    return layers, [(u @ u.mT).numpy() for u in directions]


@pytest.mark.parametrize("include_diagonal", [True, False])
def test_the_papers_heatmap_averages_position_by_position_before_it_counts(include_diagonal: bool) -> None:
    layers, matrices = sums(include_diagonal)
    chosen = np.ones((24, 24), dtype=bool) if include_diagonal else ~np.eye(24, dtype=bool)
    for layer, cosines in zip(layers, matrices, strict=True):
        expected, _ = np.histogram(cosines.mean(axis=0)[chosen], bins=128, range=(-1, 1), density=True)
        found = compare.averaged(layer)
        assert found.sum() * 2 / 128 == pytest.approx(1)
        assert np.abs(found - expected).sum() * 2 / 128 < 2 / 24, "all but 1s that rounding moves over an edge"
        raw, _ = np.histogram(cosines[:, chosen].clip(-1, 1), bins=128, range=(-1, 1), density=True)
        np.testing.assert_allclose(layer.finish()["histogram"], raw, atol=1e-6)
        centres = np.linspace(-1, 1, 257)[1::2]
        spread = [
            np.sqrt((f * centres**2).sum() / f.sum() - ((f * centres).sum() / f.sum()) ** 2) for f in (found, raw)
        ]
        assert spread[0] < spread[1], "averaging narrows the band"
        assert layer.finish()["mean"] == pytest.approx(cosines[:, chosen].mean(), abs=1e-6)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A jsonl of texts, the second one too short."""
    words = ["the first words " * 40, "short", "another text of words " * 30, "a third one " * 50]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return path


@pytest.mark.slow
def test_models_before_training_and_runs_are_compared_on_the_same_texts(texts: Path, tmp_path: Path) -> None:
    run = write_checkpointed_run(tmp_path / "run", "byte")
    arguments = (f"text={texts}", "block=20", "tokenizer=byte")
    content = run_compare(tmp_path, ["init:nano", str(run), "init:nano_encoder"], *arguments)
    nano, trained, encoder = content["models"]
    assert (nano["windows"], nano["block"], len(nano["mean"])) == (3, 20, 7)
    assert trained["mean"][-1] != pytest.approx(nano["mean"][-1])
    assert nano["paper"] is None and encoder["parameters"] > 1e6
    again = run_compare(tmp_path, ["init:nano"], *arguments)["models"][0]
    assert again == nano, "the same weights"
    other = run_compare(tmp_path, ["init:nano"], *arguments, "seed=1")["models"][0]
    assert other["mean"] != nano["mean"]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        compare.open_initial("init:nano", CompareConfig("init:nano", tokenizer="byte"))
        assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_tokens_of_every_text_are_measured(texts: Path, tmp_path: Path) -> None:
    subject = compare.open_initial("init:nano", CompareConfig("init:nano", tokenizer="byte"))
    found = read_texts(texts, 100, 10)
    assert [len(text) for text in found] == [80, 80, 80], "a short one is left out"
    (batch,) = first_tokens(subject, found, 10)
    assert [bytes(row.tolist()).decode() for row in batch] == ["the first ", "another te", "a third on"]
    assert read_texts(texts, 2, 10) == [found[0], found[1]]
    with pytest.raises(UserError, match=r"texts.jsonl has no text of 8,000 characters, which 1000 tokens may need"):
        read_texts(texts, 2, 1000)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_text_is_begun_at_lines_at_equal_distances(name: str, tmp_path: Path) -> None:
    text = "".join(f"line {number:04}\n" for number in range(1000)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = read_texts(tmp_path / name, 4, 10)
    starts = [int(text[5:9]) for text in found]
    assert all(text.startswith("line ") and len(text) == 80 for text in found)
    assert starts == [0, 248, 496, 744]
    (tmp_path / "one.txt").write_text("no line end " * 20)
    assert read_texts(tmp_path / "one.txt", 4, 10) == ["no line end " * 6 + "no line "]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:gpt2", (0.38, 0.26)),
        ("hf:openai-community/gpt2-xl", (-0.59, -0.56)),
        ("hf:Qwen/Qwen2.5-0.5B", (0.95, 0.85)),
        ("hf:Qwen/Qwen2.5-0.5B-Instruct", None),
        ("hf:bigscience/bloom-7b1/", (-0.43, -0.43)),
        ("out/gpt2", None),
        ("init:gpt2", None),
    ],
)
def test_the_papers_figures_are_of_the_published_models(name: str, expected: tuple[float, float] | None) -> None:
    assert in_the_paper(name) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=init:huge", "text={texts}"], "init:huge is unknown; choose one of gpt2, gpt2_large"),
        (["checkpoint=init:nano,init:nano", "text={texts}"], "names no model, or one twice"),
        (["checkpoint=init:nano,", "text={texts}"], "names no model, or one twice"),
        (["checkpoint=init:nano", "texts=0"], "texts=0 must be at least 1"),
        (["checkpoint=init:nano", "block=1"], "a pair needs 2 tokens"),
        (["checkpoint=init:nano", "block=999", "text={texts}"], "longer than the model's context of 256"),
        (["checkpoint=init:nano"], "init:nano comes without data: give text="),
        (["checkpoint=init:nano", "text=nowhere"], ": text=nowhere does not exist"),
        (["checkpoint=init:nano", "data=a", "text=b"], "give one of them"),
    ],
)
def test_mistakes_of_compare_are_reported_in_one_line(
    texts: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    rest = [f"out={tmp_path / 'out'}", "tokenizer=byte"]
    with pytest.raises(UserError, match=message) as error:
        condensation.main(["compare", *(argument.format(texts=texts) for argument in arguments), *rest])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_does_not_keep_the_others_from_the_table(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^1 of 2 models could not be measured: nowhere: nowhere"):
        run_compare(tmp_path, ["nowhere", "init:nano"], f"text={texts}", "block=20", "tokenizer=byte")
    content = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert [found["name"] for found in content["models"]] == ["init:nano"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 8])
def test_two_views_have_a_column_per_model(n: int, tmp_path: Path) -> None:
    histogram = np.full((5, 128), 0.5)
    figure = figures.two_views({f"model {i} with a long name": (histogram * 2, histogram) for i in range(n)})
    panels = [ax for ax in figure.axes if ax.get_images() and ax.get_images()[0].get_array().shape == (128, 5)]
    assert len(panels) == 2 * n
    figures.save(figure, tmp_path / "a")
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.02 and box.x1 <= width + 0.02 and box.y1 <= height + 0.02


@pytest.mark.slow
def test_measures_are_drawn_in_panels_and_only_positive_ones_on_a_logarithmic_scale(tmp_path: Path) -> None:
    values = np.array([1.0, 10.0, np.nan])
    figure = figures.measures({"a": {"x": values, "y": values}, "b": {"x": -values}, "c": {"x": values}}, ("a", "b"))
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "linear"]
    assert figures.save(figure, tmp_path / "a")[0].stat().st_size > 1000
