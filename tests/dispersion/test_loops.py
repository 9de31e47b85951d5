"""The CPU kernel's loops: the compiled ones against those in PyTorch operations, and how they are compiled."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_kernels import check, tokens
from torch import Tensor

from nanodisp.dispersion import DispersionLoss
from nanodisp.dispersion.kernels import FAMILY, compiled, loops

needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="no compiler")
DTYPES = [torch.float32, torch.bfloat16]
# Two results that differ before rounding to bfloat16 may round to neighbours.
NEIGHBOURS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def cosines(n: int, n_tokens: int, dtype: torch.dtype) -> Tensor:
    """From -1 to 1, symmetric."""
    c = torch.rand(n, n_tokens, n_tokens, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (c.triu() + c.triu(1).mT).to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 37), (3, 65, 768)], ids=str)
def test_compiled_directions(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    z = tokens(*shape)
    ours, right = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    torch.testing.assert_close(compiled.directions(z, ours), loops.directions(z, right))
    torch.testing.assert_close(ours, right, rtol=NEIGHBOURS[dtype], atol=0)


@needs_compiler
@pytest.mark.parametrize("dtypes", [DTYPES[:1] * 2, DTYPES[1:] * 2, DTYPES], ids=str)
@pytest.mark.parametrize("n_tokens", [2, 63, 64, 130, 300])
@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("clamp", [0.1, 0.25])
@pytest.mark.parametrize("variant", FAMILY)
def test_compiled_pairs(variant: str, clamp: float, tau: float, n_tokens: int, dtypes: list[torch.dtype]) -> None:
    c = cosines(2, n_tokens, dtypes[0])
    ours, right = (torch.empty(c.shape, dtype=dtypes[1]) for _ in range(2))
    found = (run.pairs(c, h, variant, tau, clamp) for run, h in ((compiled, ours), (loops, right)))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))
    torch.testing.assert_close(ours, right, rtol=NEIGHBOURS[dtypes[1]], atol=1e-7)
    assert torch.equal(ours, ours.mT)


@pytest.mark.parametrize("run", [loops, pytest.param(compiled, marks=needs_compiler)], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_in_place_and_without_what_lies_left_of_the_diagonal(run: ModuleType, dtype: torch.dtype) -> None:
    c = cosines(2, 300, dtype)
    strip = torch.arange(300) // loops.STRIP
    right, in_place = torch.empty_like(c), c.masked_fill(strip[None, :] < strip[:, None], torch.nan)
    results = run.pairs(c, right, "angular", 1.0, 0.25), run.pairs(in_place, in_place, "angular", 1.0, 0.25)
    assert torch.equal(in_place, right)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_compiled_unround() -> None:
    z = tokens(3, 65, 37)
    product = tokens(3, 65, 37, seed=1).bfloat16()
    norm, rounded, exact, scale = (tokens(3, 65, 1, seed=seed).abs() for seed in range(2, 6))
    ours, right = torch.empty_like(z), torch.empty_like(z)
    for run, result in ((compiled, ours), (loops, right)):
        run.unround(product, z, norm, rounded, exact, scale, result)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@needs_compiler
@pytest.mark.parametrize("matmul_dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(matmul_dtype: torch.dtype) -> None:
    c = cosines(3, 300, matmul_dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            h = torch.empty_like(c)
            results.append([*compiled.pairs(c, h, "angular", 1.0, 0.25), h])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- without a compiler -------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(2, 130, 96), (1, 515, 96)], ids=str)
@pytest.mark.parametrize("matmul_dtype", DTYPES)
@pytest.mark.parametrize("variant", FAMILY)
def test_the_gradient_without_a_compiler(
    variant: str, matmul_dtype: torch.dtype, shape: tuple[int, ...], cosine: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    check(tokens(*shape, cosine=cosine), variant, 1.0, "cpu", matmul_dtype)


@pytest.fixture
def uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, empty, in a process that has not loaded the loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path / "nanodisp"
    compiled.library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_a_failing_compiler_costs_one_warning(compiler: str, uncompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DispersionLoss(backend="reference")(tokens(1, 5, 4))
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=f"runs uncompiled, which takes longer: .*{compiler}"):
        torch.testing.assert_close(DispersionLoss(backend="cpu")(tokens(1, 5, 4)), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DispersionLoss(backend="cpu")(tokens(1, 5, 4))
    assert list(uncompiled.iterdir()) == []


@pytest.mark.slow
@needs_compiler
def test_loops_are_compiled_once(uncompiled: Path) -> None:
    assert compiled.library() is not None
    (built,) = uncompiled.iterdir()
    written = built.stat().st_mtime_ns
    compiled.library.cache_clear()
    time.sleep(0.01)
    assert compiled.library() is not None
    assert [file.stat().st_mtime_ns for file in uncompiled.iterdir()] == [written]
    assert uncompiled.stat().st_mode & 0o077 == 0


@pytest.mark.slow
@needs_compiler
def test_a_changed_source_is_compiled_again(uncompiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled.build(uncompiled)
    changed = tmp_path / "changed.cpp"
    changed.write_text(compiled.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(compiled, "SOURCE", changed)
    assert compiled.build(uncompiled) != first


def test_a_folder_that_others_may_have_written_into_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    with pytest.raises(OSError, match="others may write into it"):
        compiled.build(shared)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        compiled.build(tmp_path)
