"""The report: a folder of runs becomes tables, figures and one page."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_run
from matplotlib.figure import Figure

from nanodisp.condensation import figures
from nanodisp.errors import UserError
from nanodisp.report import __main__ as report
from nanodisp.report import draw
from nanodisp.report.tables import (
    QUANTITIES,
    make_rows,
)
from nanodisp.runs.read import read_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(sweep: Path) -> Path:
    report.main([str(sweep)])
    return sweep / "report"


class Page(HTMLParser):
    """What a page loads, and which tags it does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_self_contained(pages: Path) -> None:
    text = (pages / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert text.count("<svg role=img") == text.count("<figure") == 10
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)
    assert "UserError: &lt;b&gt;no space&lt;/b&gt; &amp; more" in text
    assert "12 runs: 3 failed, 8 finished, 1 unfinished" in text


def test_every_number_of_the_page_is_in_the_markdown(pages: Path) -> None:
    numbers = r"\d\.\d{3,4} ± \d\.\d{3,4}"
    markdown = (pages / "report.md").read_text()
    assert re.findall(numbers, (pages / "index.html").read_text()) == re.findall(numbers, markdown) != []
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (pages / picture).stat().st_size > 1000


def test_the_csv_has_a_line_per_run(pages: Path, sweep: Path) -> None:
    with (pages / "runs.csv").open(newline="") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert set(lines) == {run.folder.name for run in read_runs(sweep)}
    assert lines["disp0.1-s2"]["loss"] == "1.92"
    assert lines["nan"]["loss"] == ""
    plain = r"-?\d+(\.\d+)?(e[-+]\d+)?|"  # what float() and a spreadsheet read
    assert all(re.fullmatch(plain, line[key]) for line in lines.values() for key in (*QUANTITIES, "parameters", "step"))
    assert lines["disp0.1-s2"]["mean_cosine"] == str(0.3 + 40 / 1000), "in full precision"
    assert (lines["disp0.1-s2"]["parameters"], lines["disp0.1-s2"]["tokens_per_second"]) == ("10960", "4000.0")
    assert lines["disp0.1-s2"]["differs"] == "dispersion.lambda_disp=0.1 seed=2"
    assert all(line["command"] == "" for line in lines.values()), "these runs were not launched by a command"


@pytest.mark.usefixtures("no_figures")
def test_the_command_of_a_run_is_shown_as_it_was_launched(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run") / "config.yaml"
    config.write_text(re.sub("^command: .*$", "command: python train.py 'a=<b>'", config.read_text(), flags=re.M))
    report.main([str(tmp_path)])
    assert "<code>python train.py &#39;a=&lt;b&gt;&#39;</code>" in (tmp_path / "report" / "index.html").read_text()
    assert "  - `python train.py 'a=<b>'`" in (tmp_path / "report" / "report.md").read_text()
    with (tmp_path / "report" / "runs.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["command"] == "python train.py 'a=<b>'"


def test_a_second_report_is_identical(pages: Path, sweep: Path) -> None:
    before = (pages / "index.html").read_bytes()
    report.main([str(sweep)])
    assert (pages / "index.html").read_bytes() == before


def test_a_measured_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    np.savez(folder / "condensation.npz", histogram=np.full((3, 128), 0.5))
    (folder / "condensation.json").write_text('{"source": "run at step 40"}')
    (write_run(tmp_path / "other", "seed=2") / "condensation.npz").write_bytes(b"PK\x03\x04 cut short")
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "density", lambda shown: drawn.append(list(shown)) or Figure())
    report.main([str(tmp_path)])
    assert drawn == [["run at step 40"]], "with the step that was measured"
    assert (tmp_path / "report" / "figures" / "density.svg").exists()


def test_the_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    for number in range(16):
        settings = (f"seed={number % 2}", f"optim.lr={1e-3 * (1 + number // 2)}")
        write_run(tmp_path / f"r{number}", *settings, steps=2000)
    report.main([str(tmp_path)])
    assert (tmp_path / "report" / "index.html").stat().st_size < 16 * 5_000_000 / 200


@pytest.mark.usefixtures("no_figures")
def test_the_command_of_the_sweep_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: [experiment=lambda, 'seed=1,2']}}")
    report.main([str(tmp_path)])
    assert "python train.py -m experiment=lambda seed=1,2" in (tmp_path / "report" / "index.html").read_text()


def test_many_runs_are_read_quickly(tmp_path: Path) -> None:
    template = write_run(tmp_path / "r000")
    text, metrics = ((template / name).read_text() for name in ("config.yaml", "metrics.jsonl"))
    for number in range(1, 40):
        folder = tmp_path / f"r{number:03}"
        folder.mkdir()
        edited = text.replace("seed: 1337", f"seed: {number}")
        (folder / "config.yaml").write_text(edited.replace("lambda_disp: 0.1", f"lambda_disp: 0.{number % 7}"))
        (folder / "metrics.jsonl").write_text(metrics)
    began = time.process_time()
    rows = make_rows(read_runs(tmp_path))
    assert time.process_time() - began < 40 * 0.3, "0.3 s a run is a minute for 200"
    assert sum(len(seeds) for row in rows for seeds in row.cells.values()) == 40


def test_a_folder_without_runs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="give one folder"):
        report.main([])


def test_a_runs_own_folder_is_told_from_the_folder_of_a_sweep(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run is a single run: give the folder that it is in, {tmp_path}$"):
        report.main([str(run)])


def test_losses_over_steps_have_a_line_per_run_named_by_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "MOST_LINES", 12)
    for seed in range(13):
        write_run(tmp_path / f"s{seed}", f"seed={seed}", loss=2.0 + seed, steps=20 if seed == 12 else 40)
    (write_run(tmp_path / "damaged") / "config.yaml").unlink()
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "losses", lambda runs, _: drawn.append(runs) or Figure())
    report.main([str(tmp_path)])
    names = [name for runs in drawn for name in runs]
    assert sorted(names) == sorted(f"seed={seed}" for seed in range(13))
    assert [len(runs) for runs in drawn] == [12, 1], "at most 12 lines in a figure"
    curves = {name: curve for runs in drawn for name, curve in runs.items()}
    assert [part.tolist() for part in curves["seed=3"]["train"]] == [[20, 40], [3.0, 3.0]]
    assert [part.tolist() for part in curves["seed=12"]["val"]] == [[0, 20], [14.0, 14.0]], "an unfinished run too"
    assert "figures/steps_2.png" in (tmp_path / "report" / "report.md").read_text()


def test_a_single_run_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "alone")
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "losses", lambda runs, _: drawn.append(list(runs)) or Figure())
    report.main([str(tmp_path)])
    assert drawn == [["alone"]]
    assert "1 run: 1 finished" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_figures")
def test_failed_runs_alone_make_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.txt").write_text("")
    report.main([str(tmp_path)])
    assert "1 run: 1 failed" in (tmp_path / "report" / "report.md").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>
addEventListener("load", () => {
  const page = document.documentElement, pictures = [...document.querySelectorAll("figure svg")];
  const cut = [...document.querySelectorAll("td, th, code, figcaption")].filter(e => e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display != "inline");
  document.title = [page.scrollWidth <= innerWidth, pictures.length > 0,
    pictures.every(p => p.getBoundingClientRect().width > 200 && p.getBBox().width > 200), cut.length].join(" ");
})</script>"""
FILTER = """<script>
addEventListener("load", () => {
  const count = of => [...document.querySelectorAll(of)].filter(e => e.style.display != "none").length;
  const line = "figure g[id='lambda_disp=0.1 seed=1']";
  const seen = () => [count("article"), count("tr[data-kind]"), count(line)].join(" ");
  const choose = (key, value) => {
    const select = document.querySelector(`select[data-key="${key}"]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const steps = [seen()];
  for (const [key, value] of [["dispersion.lambda_disp", "0.1"], ["seed", "2"], ["dispersion.lambda_disp", ""]]) {
    choose(key, value);
    steps.push(seen());
  }
  document.title = steps.join("; ");
})</script>"""


def title_in_browser(page: Path, script: str, folder: Path, width: int = 1280) -> str:
    """The title of a page in Chromium after a script that is added to it."""
    looked = folder / "index.html"
    looked.write_text(page.read_text().replace("</html>", script + "</html>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    options = (*options, f"--user-data-dir={folder}", f"--window-size={width},900", "--dump-dom")
    command = [str(CHROMIUM), *options, str(looked)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return "".join(re.findall("<title>(.*?)</title>", shown)[:1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser_nothing_is_cut_off_or_missing(pages: Path, tmp_path: Path, width: int) -> None:
    assert title_in_browser(pages / "index.html", LOOK, tmp_path, width) == "true true true 0"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_the_filter_hides_what_it_excludes(pages: Path, tmp_path: Path) -> None:
    everything, tenth, second, all_lambdas = title_in_browser(pages / "index.html", FILTER, tmp_path).split("; ")
    assert everything == "12 9 4"  # runs, rows, and parts of one run's line
    assert tenth == "5 7 4", "the rows of the other lambdas are hidden; a run without a configuration too"
    assert second == "1 7 0"
    assert all_lambdas == "3 9 0"
