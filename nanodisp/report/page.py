"""The report's pages: one self-contained HTML file, and the same in Markdown.

Both are templates (`page.html`, `page.md`) over the same `Report`.
"""

from __future__ import annotations

import re
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
    kinds: what the filter goes by: a label of a row, line or run -> key of the configuration -> the values of its runs.
    """

    title: str
    facts: list[str]
    tables: dict[str, tuple[list[str], dict[str, list[Cell]]]]
    figures: list[tuple[str, Path]]
    runs: list[dict[str, str]]
    kinds: dict[str, dict[str, list[str]]]

    @property
    def filters(self) -> dict[str, list[str]]:
        """Key -> its values, in the order of the runs."""
        found: dict[str, dict[str, None]] = {}
        for kind in self.kinds.values():
            for key, values in kind.items():
                found.setdefault(key, {}).update(dict.fromkeys(values))
        return {key: list(values) for key, values in found.items()}


def inline(path: Path) -> str:
    """An SVG file's attributes and content, as they follow `<svg` in a page: without its XML header and metadata."""
    return re.sub(
        "<metadata>.*?</metadata>", "", path.read_text(encoding="utf-8").partition("<svg")[2], flags=re.DOTALL
    )


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
        "svg": inline,
        "png": lambda path: path.with_suffix(".png").relative_to(folder).as_posix(),
    }
    return pages.get_template(template).render(report=report, reading=READING)
