"""Files: written completely or not at all, and their checksums; what JSON lacks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.errors import UserError
from nanodisp.files import digest, finite, flush, write_whole


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_parts_are_written_one_after_another_over_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a longer old file")
    write_whole(tmp_path / "a", b"one ", memoryview(b"two"))
    assert files_in(tmp_path) == {"a": b"one two"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"a cannot be written: File too large; free space or") as error:
            write_whole(tmp_path / "a", b"new" * 1000, bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert files_in(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("place", ["none/a", "file/a", "folder"])
def test_a_file_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{place} cannot be written"):
        write_whole(tmp_path / place, b"new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_the_file_is_on_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[bool, list[str]]] = []

    def record(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        flushed.append((is_folder, sorted(files_in(tmp_path))))

    monkeypatch.setattr(os, "fsync", record)
    write_whole(tmp_path / "a", b"new")
    assert flushed == [(False, [".a.tmp"]), (True, ["a"])]


def test_a_failed_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        write_whole(tmp_path / "a", b"new")
    assert files_in(tmp_path) == {"a": b"old"}


OVERWRITE = """
import sys
from pathlib import Path
from nanodisp.files import write_whole
for number in range(10**9):
    write_whole(Path(sys.argv[1]), bytes([number % 256]) * 5_000_000)
    print(flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_writing_leaves_a_complete_file(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", OVERWRITE, str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert child.stdout
    for _ in range(3):
        child.stdout.readline()
    while not (tmp_path / ".a.tmp").exists():  # in the middle of the next one
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 5_000_000
    assert len(set(content)) == 1


def test_flush_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    flush(tmp_path / "a")
    flush(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        flush(tmp_path / "none")


@pytest.mark.parametrize("n_bytes", [0, 3, (1 << 22) - 1, 1 << 22, (1 << 22) + 1, 9_000_001])
def test_the_digest_is_that_of_the_content(tmp_path: Path, n_bytes: int) -> None:
    content = os.urandom(n_bytes)
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert digest(tmp_path / "a", "blake2b") == hashlib.blake2b(content).hexdigest()


TEXTS = st.text("ab", max_size=3)
VALUES = st.recursive(
    st.floats() | st.sampled_from([math.nan, math.inf, -math.inf]) | st.integers() | st.none() | TEXTS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
)


@given(VALUES)
def test_json_has_no_nan_and_no_infinity(value: object) -> None:
    expected = re.sub("NaN|-?Infinity", "null", json.dumps(value))
    assert json.dumps(finite(value), allow_nan=False) == expected
