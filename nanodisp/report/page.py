"""The report's pages: one self-contained HTML file, and the same in Markdown.

Both are templates (`page.html`, `page.md`) over the same `Report`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nanodisp.report.tables import Cell

READING = """Mean ± standard error over seeds. Δ: difference to lambda 0 over the seeds that both have, with the
95% interval of a paired t test. Best of a row in bold: the highest tokens per second, else the lowest value. On
benchmarks, the best of a task; ± of a single run is the standard error over examples; mean and mean rank are over the
tasks that all rows have, the mean over those where higher is better."""


@dataclass
class Report:
    """The content of the pages, as text.

    tables: name -> column heads, and row label -> cells.
    figures: caption and SVG file, with a PNG of the same name beside it.
    runs: the rows of runs.csv.
    """

    title: str
    facts: list[str]
    tables: dict[str, tuple[list[str], dict[str, list[Cell]]]]
    figures: list[tuple[str, Path]]
    runs: list[dict[str, str]]


def render(report: Report, template: str, folder: Path) -> str:
    """The report through the template "page.html" or "page.md", for a file in `folder`."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters |= {
        "plain": lambda text: text.replace("|", "\\|").replace("<", "&lt;"),  # for Markdown
        "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
        "png": lambda path: path.with_suffix(".png").relative_to(folder).as_posix(),
    }
    return pages.get_template(template).render(report=report, reading=READING)
