"""The figures that training tracks for every layer, and how to add one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import records

from nanodisp.condensation.cosine import mean_cosine
from nanodisp.condensation.layers import LAYER_FIGURES, NOT_ON_THE_TERMINAL, figures_of
from nanodisp.condensation.measure import measure
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.report import __main__ as report
from nanodisp.runs.trackers import scalars


def largest_entry(z: torch.Tensor) -> torch.Tensor:
    return z.float().abs().max()


def test_figures_are_those_of_every_layer_in_the_order_of_their_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_FIGURES, "largest_entry", largest_entry)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 6, 5, generator=generator) for _ in range(3)]
    figures = dict(zip(LAYER_FIGURES, figures_of(states), strict=True))
    assert figures["mean_cosine"].tolist() == [mean_cosine(z).item() for z in states]
    assert figures["largest_entry"].tolist() == [largest_entry(z).item() for z in states]


def test_mean_cosine_agrees_with_the_measuring_command() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=24, vocab_size=50)).eval()
    windows = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        figures = dict(zip(LAYER_FIGURES, figures_of(model.hidden_states(windows)), strict=True))
    assert figures["mean_cosine"].tolist() == pytest.approx(measure(model, windows).mean.tolist(), abs=1e-6)


@pytest.mark.slow
def test_a_registered_figure_reaches_records_terminal_trackers_and_report(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other module has to change: every one of them takes the figure by its name."""
    monkeypatch.setitem(LAYER_FIGURES, "largest_entry", largest_entry)
    folder = run("train.steps=2", "train.sample_tokens=0", "train.condensation_interval=1")
    terminal = capsys.readouterr().out

    for split, steps in (("val", [0, 2]), ("condensation", [0, 1, 2])):
        found = records(folder, split)
        assert [record["step"] for record in found] == steps
        for record in found:
            assert len(record["largest_entry"]) == len(record["mean_cosine"]) == 3
            assert min(record["largest_entry"]) > 0
            assert record["largest_entry"] != record["mean_cosine"]
            for name in NOT_ON_THE_TERMINAL:
                assert len(record[name]) == 3
                assert name.replace("_", " ") not in terminal

    last = records(folder, "val")[-1]
    assert "largest entry by layer " + " ".join(f"{value:.2f}" for value in last["largest_entry"]) in terminal
    tracked = scalars(last)
    assert [tracked[f"val/largest_entry/layer_{layer:02d}"] for layer in range(3)] == last["largest_entry"]

    report.main([str(folder.parent)])
    page, markdown, csv = (
        (folder.parent / "report" / name).read_text() for name in ("index.html", "report.md", "runs.csv")
    )
    assert "<h2>Largest entry by layer</h2>" in page
    table = markdown.split("## Largest entry by layer\n\n")[1].split("\n\n")[0]
    for layer, value in enumerate(last["largest_entry"]):
        assert re.search(rf'data-column="layer {layer}">{value:.4f}<', page)
        assert f"| {value:.4f} |" in table
    assert "largest_entry_by_layer" in csv.splitlines()[0]
    assert " ".join(map(str, last["largest_entry"])) in csv
