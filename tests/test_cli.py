"""key=value command lines: typed, and every mistake is reported in one line."""

from __future__ import annotations

import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from nanodisp import cli
from nanodisp.data.prepare import DataConfig
from nanodisp.errors import UserError


@dataclass
class Options:
    path: str = cli.MISSING
    count: int = 3
    limit: int | None = 5
    share: float = 0.5
    loud: bool = False
    place: str | None = None
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count} must not be negative")


def test_values_have_the_types_of_the_fields_and_text_is_literal() -> None:
    options = cli.parse(Options, ["path= a: [1] = ${x} ", "count=7", "limit=null", "share=1e-3", "loud=true"])
    assert options == Options(" a: [1] = ${x} ", 7, None, 1e-3, True)


def test_null_is_text_where_a_value_is_required() -> None:
    assert cli.parse(Options, ["path=null"]).path == "null"
    with pytest.raises(UserError, match="'null' is not of type int"):
        cli.parse(Options, ["path=x", "count=null"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cuont=1", "path, count, limit, share, loud, place, prompt"),
        ("count", "give key=value"),
        ("count=x", "'count=x': 'x' is not of type int"),
        ("count=1.5", "'1.5' is not of type int"),
        ("loud=True", "'True' is not of type bool"),
        ("count=-1", "count=-1 must not be negative"),
        ("path=y", "path is given twice: path=x, path=y"),
        ("place=", "place= is empty: give a value, or leave it out"),
    ],
)
def test_a_mistake_is_reported_in_one_line(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.parse(Options, ["path=x", argument])
    assert "\n" not in str(error.value)


def test_a_required_value_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"path is required: give path=…"):
        cli.parse(Options, [])
    with pytest.raises(UserError, match=r"path= is empty: give a value$"):
        cli.parse(Options, ["path="])


def test_text_may_be_empty_where_that_is_its_default() -> None:
    assert cli.parse(Options, ["path=x", "prompt="]).prompt == ""


@dataclass
class Described:
    """What it does.

    path: a file, or
        a folder.
    count, share: how many,
        and how much.
    """

    path: str = cli.MISSING
    count: int | None = None
    share: float = 0.5
    loud: bool = False


def test_help_is_made_from_the_docstring() -> None:
    assert list(cli.describe_keys(Described, "it.", {"share": 2})) == [
        "What it does.",
        "  it.path=…                         a file, or a folder.",
        "  it.count=null it.share=2          how many, and how much.",
    ]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_in_place_of_work(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "count=x", flag])
    cli.run(lambda argv: pytest.fail("called"), Described)
    assert "it.path" not in (shown := capsys.readouterr().out)
    assert "  path=…  " in shown


COMMANDS = [
    *("sample.py", "nanodisp.condensation", "nanodisp.evaluate", "nanodisp.explore", "nanodisp.hf", "nanodisp.report"),
    *(
        "nanodisp.data.shards",
        "nanodisp.data.tokenizer",
        "nanodisp.runs",
        "bench.soak",
        "data/text/prepare.py",
        "data/hellaswag/prepare.py",
    ),
]


HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv, sys.stdout = [name, "--help"], open(1, "w", encoding="ascii", closefd=False)
    sys.modules.pop(name, None)  # imported by another command
    runpy.run_path(name, run_name="__main__") if name.endswith(".py") else runpy.run_module(name, run_name="__main__")
    print("\\f", end="", flush=True)
slow = {"torch._dynamo", "torch.distributed.fsdp", "sympy"} & sys.modules.keys()
sys.exit(f"loaded for no use: {slow}" if slow else 0)
"""


@pytest.fixture(scope="module")
def explained() -> dict[str, str]:
    """What each command prints for --help in a terminal without UTF-8; all from one process, which loads torch once.

    None loads torch's compiler or FSDP, which would take as long as torch itself.
    """
    command = [sys.executable, "-c", HELP, *COMMANDS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    *texts, rest = result.stdout.split("\f")
    assert rest == ""
    return dict(zip(COMMANDS, texts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_keys(name: str, explained: dict[str, str]) -> None:
    shown = explained[name]
    module = importlib.import_module(name if not name.endswith(".py") else name[:-3].replace("/", "."))
    module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
    schemas = [value for value in vars(module).values() if is_dataclass(value) and value.__module__ == module.__name__]
    schemas += [DataConfig] * (name == "data/text/prepare.py")
    assert schemas or name == "nanodisp.report", "its command takes folders alone"
    for schema in schemas if name != "nanodisp.data.shards" else ():
        for field in fields(schema):
            assert f" {field.name}=" in shown, field.name


def test_python_m_nanodisp_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("nanodisp", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24, "one screen"
    listed = {word for line in lines for word in re.findall(r"python -m ([\w.]+)", line)}
    assert listed == {name for name in COMMANDS if name.startswith("nanodisp.")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loaded"), [("train.py", "torch"), ("nanodisp.condensation", "torch"), ("data/text/prepare.py", "numpy")]
)
def test_an_interrupt_while_a_command_is_loaded_ends_it_without_a_traceback(
    name: str, loaded: str, tmp_path: Path
) -> None:
    """Even where a library turns the KeyboardInterrupt into an error of its own."""
    (tmp_path / f"{loaded}.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "except BaseException:\n    raise RuntimeError('cannot be loaded')\n"
    )
    command = [name] if name.endswith(".py") else ["-m", name]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "buffered"),
    [("-m nanodisp", True), ("-m nanodisp", False), ("sample.py --help", True), ("train.py --help", False)],
)
def test_a_full_disk_under_standard_output_is_one_line(command: str, buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
    line = "error: standard output cannot be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (2, line)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "sample.py", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_standard_output_that_is_closed_is_as_if_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of >&-
    cli.guard_output()
    assert sys.stdout.write("text") == 4


def exit_code(error: BaseException) -> object:
    def main(argv: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    return exit.value.code


def test_run_reports_a_users_mistake_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(UserError("no such thing")) == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")


def test_a_line_on_stderr_is_one_write_so_that_those_of_several_ranks_stay_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", written.append)
    monkeypatch.setattr(sys, "stderr", stream)
    cli.fail(UserError("no such thing"))
    assert [text for text in written if text] == ["error: no such thing\n"]


def test_run_ends_quietly_when_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_run_passes_the_command_line_and_does_not_hide_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "a=1", "b=2"])
    given: list[str] = []
    cli.run(given.extend)
    assert given == ["a=1", "b=2"]
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 / 0)
