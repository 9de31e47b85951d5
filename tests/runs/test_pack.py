"""A run as one file: complete, the same on the other side, and refused where anything is wrong."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import losses, weights

from nanodisp import cli
from nanodisp.errors import InUse, UserError
from nanodisp.runs import __main__ as command
from nanodisp.runs import pack as packing
from nanodisp.runs.metrics import Metrics
from nanodisp.runs.pack import pack, unpack

Run = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a run."""
    run = tmp_path / "out" / "a-run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "config.yaml").write_text("command: python train.py seed=3\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(os.urandom(5_000_000))
    (run / "checkpoints" / ".step_00000003.tmp").mkdir()
    (run / "checkpoints" / ".step_00000003.tmp" / "model.safetensors").write_bytes(b"not complete")
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_unpacked_is_what_was_packed_without_hidden_files(folder: Path, tmp_path: Path) -> None:
    assert pack(folder, tmp_path / "run.tar") == 3
    assert unpack(tmp_path / "run.tar", tmp_path / "there") == tmp_path / "there" / "a-run"
    expected = {name: content for name, content in contents(folder).items() if "/." not in name and name[0] != "."}
    assert contents(tmp_path / "there" / "a-run") == expected
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a-run"]


def test_a_run_that_has_moved_resumes_to_the_bit(run: Run, tmp_path: Path) -> None:
    settings = (
        "train.checkpoint_interval=3",
        "train.log_interval=1",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
    )
    whole = run(*settings, "train.steps=6", name="whole")
    part = run(*settings, "train.steps=3", name="part")
    pack(part, tmp_path / "part.tar")
    part.rename(part.with_name("moved-away"))
    assert unpack(tmp_path / "part.tar", part.parent) == part
    again = run(*settings, "train.steps=6", name="part")
    assert losses(again) == losses(whole)
    assert all((weights(again)[name] == tensor).all() for name, tensor in weights(whole).items())


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "run.tar")
    with pytest.raises(UserError, match=r"run\.tar exists"):
        pack(folder, tmp_path / "run.tar")
    with pytest.raises(UserError, match="a-run exists"):
        unpack(tmp_path / "run.tar", folder.parent)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a-run").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a-run exists"):
        unpack(tmp_path / "run.tar", tmp_path / "there")


def test_a_run_in_training_and_what_is_no_run_are_not_packed(folder: Path, tmp_path: Path) -> None:
    with Metrics(folder), pytest.raises(InUse, match=r"is training .*, or packing it: wait"):
        pack(folder, tmp_path / "run.tar")
    with pytest.raises(UserError, match="is in the run's folder"):
        pack(folder, folder / "checkpoints" / "run.tar")
    with pytest.raises(UserError, match="is no run's folder"):
        pack(tmp_path, tmp_path / "run.tar")
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link is a link"):
        pack(folder, tmp_path / "run.tar")
    assert not list(tmp_path.rglob("*.tar*"))


def test_the_files_of_wandb_are_packed_without_its_links(folder: Path, tmp_path: Path) -> None:
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to("run-1", target_is_directory=True)
    (folder / "wandb" / "run-1" / "a.wandb").write_bytes(b"w")
    assert pack(folder, tmp_path / "run.tar") == 4
    unpacked = unpack(tmp_path / "run.tar", tmp_path / "there") / "wandb"
    assert [path.name for path in unpacked.iterdir()] == ["run-1"]
    (folder / "wandb" / "own").symlink_to(tmp_path / "run.tar")
    with pytest.raises(UserError, match="own is a link"):
        pack(folder, tmp_path / "again.tar")


def test_a_run_on_a_disk_that_is_read_only_is_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *rest: Any) -> Any:
        if path.is_relative_to(folder) and mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, mode, *rest)

    monkeypatch.setattr(Path, "open", refuse)
    assert pack(folder, tmp_path / "run.tar") == 3
    assert unpack(tmp_path / "run.tar", tmp_path / "there").is_dir()


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_ctrl_c_leaves_nothing_half_written(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "done.tar")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        packing, {"pack": "add", "unpack": "write"}[what], lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )
    given = {"pack": [str(folder), f"to={tmp_path}/run.tar"], "unpack": [f"{tmp_path}/done.tar", f"to={tmp_path}/in"]}
    with pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, lambda *_: pytest.fail("no interrupt"))  # a command's own does not raise
        command.main([what, *given[what]])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["run.tar.gz", "cut.tar", "text.tar"])
def test_what_is_no_whole_tar_is_refused_with_what_to_do(name: str, folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "run.tar")
    content = (tmp_path / "run.tar").read_bytes()
    remedy, bad = {
        "run.tar.gz": ("is compressed: decompress it first", gzip.compress(content, 1)),
        "cut.tar": ("cut short, .*: copy the file again", content[:1_000_000]),
        "text.tar": ("no file that pack has written", b"text" * 1000),
    }[name]
    (tmp_path / name).write_bytes(bad)
    with pytest.raises(UserError, match=remedy):
        unpack(tmp_path / name, tmp_path / "in" / "there")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("at", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_damaged_file_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path, at: float, how: str) -> None:
    pack(folder, tmp_path / "run.tar")
    content = bytearray((tmp_path / "run.tar").read_bytes())
    at = min(int(at * len(content)), len(content) - 12_000)  # zeros end a tar
    if how == "cut":
        del content[at:]
    else:
        content[at] ^= 1
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.tar") as caught:
        unpack(tmp_path / "bad.tar", tmp_path / "there")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "there").exists()


def forge(path: Path, names: list[str], about: Callable[[dict[str, Any]], Any] = lambda about: about) -> Path:
    """A tar that pack did not write, of files with one byte each; a name in <> is a link."""
    entry = {"bytes": 1, "sha256": sha256(b"x").hexdigest()}
    listed = {"version": 1, "run": "a-run", "files": dict.fromkeys((name.strip("<>") for name in names), entry)}
    text = json.dumps(about(listed)).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in (("packed.json", text), *((name, b"x") for name in names)):
            member = tarfile.TarInfo(name.strip("<>"))
            member.size = len(content)
            if name.startswith("<"):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "names",
    [
        *(["../evil"], ["/evil"], ["a/../../evil"], ["a//b"], ["./a"], [".lock"], ["a\\b"], [""]),
        *(["<a>"], ["a", "a"], ["a", "a/b"]),
    ],
    ids=str,
)
def test_no_name_leads_out_and_nothing_is_a_link_or_twice(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forged\.tar"):
        unpack(forge(tmp_path / "forged.tar", names), tmp_path / "in" / "there")
    assert list(tmp_path.rglob("*")) == [tmp_path / "forged.tar"]


@pytest.mark.parametrize(
    "about",
    [
        lambda about: {**about, "run": "../evil"},
        lambda about: {**about, "run": ".."},
        lambda about: {**about, "run": 3},
        lambda about: {**about, "version": 2},
        lambda about: {**about, "files": {}},
        lambda about: {**about, "files": {**about["files"], "more": about["files"]["a"]}},
        lambda about: {**about, "files": {"a": {"bytes": "1", "sha256": ""}}},
        lambda about: {**about, "files": {"a": {"bytes": 2, "sha256": ""}}},
        lambda about: [about],
    ],
)
def test_a_list_that_does_not_match_is_refused(about: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forged\.tar"):
        unpack(forge(tmp_path / "forged.tar", ["a"], about), tmp_path / "there")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "forged.tar"]


def test_a_right_forgery_would_be_unpacked(tmp_path: Path) -> None:
    assert contents(unpack(forge(tmp_path / "forged.tar", ["a", "b/c"]), tmp_path / "there")) == {
        "a": b"x",
        "b/c": b"x",
    }


def test_the_command_takes_names_without_keys(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["pack", str(folder), f"to={tmp_path / 'run.tar'}"])
    command.main(["unpack", str(tmp_path / "run.tar"), f"to={tmp_path / 'there'}"])
    assert "python train.py seed=3" in capsys.readouterr().out
    assert (tmp_path / "there" / "a-run" / "config.yaml").is_file()
    with pytest.raises(UserError, match="give python -m nanodisp"):
        command.main(["zip"])
    with pytest.raises(UserError, match=r"'foo=1' is not valid: .* one of the keys run, to"):
        command.main(["pack", str(folder), f"to={tmp_path / 'more.tar'}", "foo=1"])
    with pytest.raises(UserError, match="to is required"):
        command.main(["pack", str(folder)])
    assert cli.MISSING not in capsys.readouterr().out


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_warned_of_and_used(
    number: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    whole = losses(run("train.steps=2", "train.log_interval=1", name="locked"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    again = losses(run("train.steps=2", "train.log_interval=1", name="unlocked"))
    assert "has no locks" in capsys.readouterr().err
    assert again == whole
