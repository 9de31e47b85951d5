"""Plants small bugs and reports those that the tests do not notice: `make mutants`.

    python -m tests.mutants [--most 40] [--seed 0] [--workers 2] [nanodisp/training/optim.py ...]

A mutation changes one operator, comparison, constant or call of a module (`mutations_of`). Each is loaded in place of
the module in a process of its own, which runs the module's tests until one fails. `survivors.txt` lists mutations that
are known to change nothing that a quick test could see, with the reason above each.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")
TIMEOUT = 300  # seconds: an endless loop is a bug that was noticed

# Module -> the tests that know it.
TESTS = {
    "nanodisp/dispersion/formulas.py": ["tests/dispersion/test_loss.py", "tests/dispersion/test_rivals.py"],
    "nanodisp/dispersion/loss.py": ["tests/dispersion/test_loss.py", "tests/dispersion/test_kernels.py"],
    "nanodisp/dispersion/placement.py": ["tests/dispersion/test_loss.py", "tests/test_config.py"],
    "nanodisp/dispersion/kernels/pairwise.py": ["tests/dispersion/test_kernels.py", "tests/dispersion/test_loss.py"],
    "nanodisp/dispersion/kernels/cpu.py": ["tests/dispersion/test_kernels.py"],
    "nanodisp/data/batches.py": ["tests/data/test_batches.py"],
    "nanodisp/training/optim.py": ["tests/training/test_optim.py", "tests/training/test_objective.py"],
    "nanodisp/runs/checkpoint.py": ["tests/runs/test_checkpoint.py"],
    "nanodisp/training/objective.py": [
        *("tests/training/test_objective.py", "tests/training/test_randomness.py"),
        "tests/training/test_interventions.py",
    ],
}

SWAPS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.BitXor: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}


class Mutant(NamedTuple):
    """A module's source with one change."""

    path: str
    line: int
    change: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}: {self.change}"

    @property
    def key(self) -> str:
        """What survivors.txt calls it: without the line's number, which moves."""
        return f"{self.path}: {self.change}"


def mutations_of(path: str) -> Iterator[Mutant]:
    """Every mutation of a module, but those inside annotations, error messages and docstrings."""
    text = (ROOT / path).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    annotations = {
        inner
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if (outer := getattr(node, field, None)) is not None
        for inner in ast.walk(outer)
    }

    def is_text(node: ast.AST) -> bool:
        while node in parents:
            if node in annotations or isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
                return True
            node = parents[node]
        return False

    for index, node in enumerate(ast.walk(tree)):
        for change, field, value in () if is_text(node) else changes(node):
            mutated = copy.deepcopy(tree)
            twin = next(itertools.islice(ast.walk(mutated), index, None))
            setattr(twin, field, value)
            source = ast.unparse(ast.fix_missing_locations(mutated))
            where = lines[getattr(node, "lineno", 1) - 1].strip()[:90]
            yield Mutant(path, getattr(node, "lineno", 0), f"{change} in {where}", source)


def changes(node: ast.AST) -> Iterator[tuple[str, str, Any]]:
    """What can be done to a node: a word for it, and the field to set to what."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        new = SWAPS[type(node.op)]
        yield f"{type(node.op).__name__} -> {new.__name__}", "op", new()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new = SWAPS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {new.__name__}", "ops", [new(), *node.ops[1:]]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "without the minus", "op", ast.UAdd()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "without the not", "operand", ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = 2 * node.value if isinstance(node.value, float) and node.value else node.value + 1
        yield f"{node.value} -> {value}", "value", value
    elif isinstance(node, ast.IfExp):
        yield "branches swapped", "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "without the call", "value", ast.Constant(None)


class Planted(importlib.abc.MetaPathFinder):
    """Finds a mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.replace(".", "/") != self.mutant.path.removesuffix(".py"):
            return None
        file = str(ROOT / self.mutant.path)
        return importlib.util.spec_from_file_location(fullname, file, loader=MutantLoader(fullname, file, self.mutant))


class MutantLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_data(self, path: str) -> bytes:
        return self.mutant.source.encode()

    def path_stats(self, path: str) -> Any:
        raise OSError("its byte code is not cached")


def survives(mutant: Mutant | None, tests: list[str]) -> bool:
    """Whether the tests pass with the mutant planted (None: without), in a process forked for it."""
    child = os.fork()
    if child == 0:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, Planted(mutant))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.setpgid(0, 0)
        os._exit(int(pytest.main([*tests, "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"])))
    deadline = time.monotonic() + TIMEOUT
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}; all unless given")
    parser.add_argument("--most", type=int, default=20, help="mutations of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    os.chdir(ROOT)
    import hydra  # noqa: F401 - imported once, before the forks
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    argued = {line for line in SURVIVORS.read_text().splitlines() if line and not line.startswith("#")}
    rng = random.Random(arguments.seed)
    planted: list[Mutant] = []
    for path in arguments.modules:
        if not survives(None, TESTS[path]):
            sys.exit(f"the tests of {path} fail without any mutation: {' '.join(TESTS[path])}")
        possible = list(mutations_of(path))
        planted += rng.sample(possible, min(arguments.most, len(possible)))
    with ThreadPoolExecutor(arguments.workers) as pool:
        alive = list(pool.map(lambda mutant: survives(mutant, TESTS[mutant.path]), planted))
    survivors = [mutant for mutant, lives in zip(planted, alive, strict=True) if lives]
    open_ones = [mutant for mutant in survivors if mutant.key not in argued]
    for mutant in survivors:
        print(f"survived{'' if mutant in open_ones else ', argued'}: {mutant.name}")
    caught = len(planted) - len(survivors)
    print(f"{caught} of {len(planted)} mutations caught, {len(survivors) - len(open_ones)} survivors argued")
    sys.exit(1 if open_ones and (len(planted) - len(open_ones)) / len(planted) < 0.95 else 0)


if __name__ == "__main__":
    main()
