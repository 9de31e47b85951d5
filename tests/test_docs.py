"""README, CONTRIBUTING and docs/ name only files, keys, commands and targets that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import ROOT

from nanodisp.config import SECTIONS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("nanodisp", "conf", "data", "tests", "bench", "examples", "docs")
FILES = [*ROOT.iterdir(), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pages
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pages
def test_files_that_a_page_names_exist(page: Path) -> None:
    paths = [file.as_posix() for file in FILES]
    for name in in_backticks(TEXTS[page]):
        if re.fullmatch(r"[\w./-]+\.(py|yaml)", name) and name != "config.yaml":
            assert any(path.endswith(f"/{name}") for path in paths), name


@pages
def test_keys_that_a_page_names_exist(page: Path) -> None:
    for section, key in re.findall(rf"\b({'|'.join(SECTIONS)})\.([a-z]\w*)", TEXTS[page]):
        known = {field.name for field in dataclasses.fields(SECTIONS[section])}
        assert key in known | {"py", "md", "bin", "safetensors", "sbatch"}, f"{section}.{key}"


@pages
def test_commands_that_a_page_gives_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:nanodisp|bench|tests)[\w.]*)", TEXTS[page]):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", TEXTS[page]):
        assert target in targets, target


@pytest.mark.parametrize("group", ["model", "data", "dispersion", "intervention", "optim"])
def test_every_choice_of_a_group_is_documented(group: str) -> None:
    page = TEXTS[ROOT / "docs" / "configuration.md"]
    for file in (ROOT / "conf" / group).glob("*.yaml"):
        assert f"`{file.stem}`" in page, file


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


def test_the_readme_names_every_module() -> None:
    """By its name or, for a folder's __init__.py and its fused kernels, by its folder."""
    readme = TEXTS[ROOT / "README.md"]
    for module in (ROOT / "nanodisp").rglob("*.py"):
        if module.name not in ("__init__.py", "errors.py", "files.py", "cli.py") and module.parent.name != "kernels":
            assert f"`{module.name}`" in readme or f"nanodisp/{module.name}`" in readme, module
