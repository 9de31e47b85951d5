"""`nanodisp/dispersion/` works as a copy in another package, with only torch and numpy (and Triton on a GPU)."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow


def results_of(package: str) -> list[Any]:
    """Losses and gradients of several formulas and backends, and sampled positions, as JSON can hold them."""
    dispersion, placement = import_module(f"{package}.dispersion"), import_module(f"{package}.dispersion.placement")
    results: list[Any] = []
    for variant, backend in (
        ("angular", "reference"),
        ("angular", "cpu"),
        ("cosine", "auto"),
        ("cosine", "reference"),
        ("entropy", "auto"),
    ):
        z = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = dispersion.DispersionLoss(variant, backend=backend)(z)
        results.append([loss.item(), torch.autograd.grad(loss, z)[0].tolist()])
    return [*results, placement.sample_positions(seed=1, step=2, layers=[1, 3], n_tokens=50, max_tokens=10).tolist()]


def installed_modules_without(*needed: str) -> list[str]:
    """The top-level modules of all installed distributions except nanodisp, `needed` and their requirements."""
    allowed, queue = set(), list(needed)
    while queue:
        name = normalised(queue.pop())
        if name in allowed:
            continue
        allowed.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        queue += [re.split("[^A-Za-z0-9._-]", r)[0] for r in requirements if "extra ==" not in r]
    allowed.add("nanodisp")
    modules = metadata.packages_distributions().items()
    return [module for module, owners in modules if not allowed & {normalised(owner) for owner in owners}]


def normalised(distribution: str) -> str:
    return re.sub("[-_.]+", "-", distribution).lower()


def run_python(program: str, path: Path, blocked: Sequence[str] = ()) -> str:
    """Standard output of a program that imports from `path` and cannot import the `blocked` modules."""
    blocking = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    paths = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", blocking + program],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package `theirs`, which contains only a copy of `nanodisp/dispersion/`."""
    shutil.copytree(ROOT / "nanodisp" / "dispersion", tmp_path / "theirs" / "dispersion")
    (tmp_path / "theirs" / "__init__.py").touch()
    return tmp_path


def test_a_copy_in_another_package_gives_the_same_results_with_only_torch_and_numpy(copy: Path) -> None:
    blocked = [*installed_modules_without("torch", "numpy", "triton"), "nanodisp"]
    assert {"hydra", "rich", "pytest"} <= set(blocked)
    program = f"""
import json
from importlib import import_module
from typing import Any
import torch
torch.set_num_threads({torch.get_num_threads()})
{inspect.getsource(results_of)}
print(json.dumps(results_of("theirs")))
"""
    assert json.loads(run_python(program, copy, blocked)) == results_of("nanodisp")


def test_importing_the_package_needs_only_torch_and_numpy() -> None:
    blocked = [*installed_modules_without("torch", "numpy"), "triton"]
    run_python("from nanodisp import DispersionLoss", ROOT, blocked)


def test_a_modified_copy_does_not_change_the_installed_package(copy: Path) -> None:
    formulas = copy / "theirs" / "dispersion" / "formulas.py"
    formulas.write_text(formulas.read_text().replace("NORM_EPS = 1e-2", "NORM_EPS = 1.0"))
    program = """
import torch
from nanodisp.dispersion import DispersionLoss
z = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
before = DispersionLoss(backend="cpu")(z)
from theirs.dispersion import DispersionLoss as Theirs
assert torch.equal(DispersionLoss(backend="cpu")(z), before)
assert not torch.allclose(Theirs(backend="cpu")(z), before)
"""
    run_python(program, copy)
