"""The layout: which module may import which, and how long things may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up. An import points to a lower floor, or stays in its own folder.
FLOORS = [
    {"errors"},
    {"files", "cli", "process", "dispersion", "models", "distributed"},
    {"condensation", "data"},
    {"training"},
    {"config"},
    {"plan", "overrides"},
    {"runs"},
    {"hf"},
    {
        "evaluate",
        "explore",
        "report",
        "launch",
        "condensation.__main__",
        "condensation.compare",
        "condensation.over_training",
        "condensation.windows",
        "hf.__main__",
    },
    {"train", "sample", "__main__"},
]
LONGEST_MODULE, LONGEST_FUNCTION, LONGEST_TRAIN = 400, 80, 125


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below nanodisp, train.py and sample.py beside them."""
    package = ROOT / "nanodisp"
    files = {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
        if file != package / "__init__.py"
    }
    files |= {name: ROOT / f"{name}.py" for name in ("train", "sample")}
    return {name: ast.parse(file.read_text()) for name, file in files.items()}


MODULES = modules()


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in it, by the same names."""
    is_package = (ROOT / "nanodisp" / Path(*name.split("."))).is_dir()
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["nanodisp", *name.split(".")]
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        for target in found:
            while target and target.removeprefix("nanodisp.") not in MODULES:
                target = target.rpartition(".")[0]
            if target.startswith("nanodisp."):
                yield target.removeprefix("nanodisp.")


def floor_of(name: str) -> int:
    """The floor of a module: its own, or that of its folder."""
    for floor, rooms in enumerate(FLOORS):
        if name in rooms:
            return floor
    return next(floor for floor, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


ARROWS = sorted({(name, target) for name, tree in MODULES.items() for target in imports(name, tree) if name != target})


def test_the_walk_sees_the_imports() -> None:
    assert ("train", "training.objective") in ARROWS
    assert ("dispersion.kernels.cpu", "dispersion.formulas") in ARROWS, "a relative import"
    assert ("training.objective", "dispersion.placement") in ARROWS
    assert len(ARROWS) > 100


def test_no_import_points_upward() -> None:
    upward = [
        f"{name} imports {target}"
        for name, target in ARROWS
        if name.split(".")[0] != target.split(".")[0] and floor_of(name) <= floor_of(target)
    ]
    assert upward == []


def test_there_is_no_circle() -> None:
    graph = {name: {target for source, target in ARROWS if source == name} for name in MODULES}
    for package in {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}:
        for children in graph.values():  # a folder's __init__ imports its modules, and each is imported through it
            if any(child.startswith(f"{package}.") for child in children):
                children.discard(package)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_ground_floor_knows_torch_and_numpy_and_no_hydra_or_wandb() -> None:
    for name, tree in MODULES.items():
        if floor_of(name) > 1 or name == "cli":
            continue
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"hydra", "omegaconf", "wandb", "rich", "transformers", "scipy", "matplotlib"}, name


def test_only_the_models_and_hugging_face_name_gpt2s_modules() -> None:
    names = {"wte", "wpe", "ln_f", "ln_1", "ln_2", "c_attn", "c_proj", "c_fc"}
    for name, tree in MODULES.items():
        if name.split(".")[0] in ("models", "hf"):
            continue
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        strings = " ".join(
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        assert not named & names, name
        assert not [word for word in names if f"{word}." in strings or f".{word}" in strings], name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_functions_fit(name: str) -> None:
    tree = MODULES[name]
    assert max((node.end_lineno or 0 for node in tree.body), default=0) <= LONGEST_MODULE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = LONGEST_TRAIN if (name, node.name) == ("train", "train") else LONGEST_FUNCTION
            assert (node.end_lineno or 0) - node.lineno + 1 <= limit, node.name


def test_recorded_results_name_no_folder_of_a_machine() -> None:
    recorded = [*(ROOT / "bench" / "results").glob("*.json"), *(ROOT / "docs" / "study" / "records").glob("*.jsonl")]
    assert len(recorded) > 10
    for path in recorded:
        assert re.findall(r"[\s\"=](/\w+/[^\s\"]*)", path.read_text(encoding="utf-8")) == [], path.name
