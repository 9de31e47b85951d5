"""Shards: read in all formats, rejected in one line if anything is wrong."""

import json
import struct
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.data.shards import (
    Manifest,
    check_tokens,
    describe_shard,
    open_split,
    read_shard,
    verify,
    write_shard,
)
from nanodisp.errors import UserError


def llmc_bytes(tokens, magic=20240520, version=1, n_tokens=None, code="H"):
    """A shard byte for byte as llm.c's data scripts lay it out."""
    header = struct.pack("<3i", magic, version, len(tokens) if n_tokens is None else n_tokens) + bytes(253 * 4)
    return header + struct.pack(f"<{len(tokens)}{code}", *tokens)


def prepared(folder, *, train=((1, 2, 3), (4, 5)), val=((6, 7),), vocab_size=10):
    """A folder of small shards with their manifest."""
    shards = []
    for split, parts in (("train", train), ("val", val)):
        for index, part in enumerate(parts):
            path = folder / f"{split}_{index:06d}.bin"
            write_shard(path, np.array(part, np.uint16))
            shards.append(describe_shard(path, split))
    Manifest("byte", vocab_size, "a test", {"train": 1.0, "val": 1.0}, shards).save(folder)
    return folder


# --- one shard -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.uint16, np.uint32]))
def test_written_tokens_are_read_back(tmp_path_factory, data, dtype):
    tokens = np.array(data.draw(st.lists(st.integers(0, np.iinfo(dtype).max), min_size=1, max_size=300)), dtype)
    path = tmp_path_factory.mktemp("shard") / "train_000000.bin"
    write_shard(path, tokens)
    read = read_shard(path)
    assert read.dtype == dtype
    assert np.array_equal(read, tokens)


@pytest.mark.parametrize(
    ("dtype", "magic", "version", "code"), [(np.uint16, 20240520, 1, "H"), (np.uint32, 20240801, 7, "I")]
)
def test_written_bytes_are_those_of_llmc(tmp_path, dtype, magic, version, code):
    write_shard(tmp_path / "a.bin", np.array([1, 500, 50_256], dtype))
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes([1, 500, 50_256], magic, version, code=code)


@pytest.mark.parametrize("tokens", [np.array([], np.uint16), np.array([1], np.int64), np.array([[1]], np.uint16)])
def test_only_tokens_are_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="a shard takes"):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_file(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match=r"a\.bin cannot be written"):
        write_shard(tmp_path / "a.bin", np.array([1], np.uint16))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_nanogpt_files_are_read(tmp_path):
    np.array([5, 6, 50_256], np.uint16).tofile(tmp_path / "train.bin")
    assert read_shard(tmp_path / "train.bin").tolist() == [5, 6, 50_256]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_npy_shards_are_read(tmp_path, dtype):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([5, 6, 7], dtype))
    read = read_shard(tmp_path / "edufineweb_train_000001.npy")
    assert read.tolist() == [5, 6, 7] and read.dtype == dtype


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "is empty"),
        ("a.bin", b"\1", "begins with 0"),
        ("a.bin", b"PK\3\4" * 300, "not with the magic number 20240520 or 20240801"),
        ("a.bin", llmc_bytes([1], version=2), "has version 2; magic 20240520 requires version 1"),
        ("a.bin", llmc_bytes([1], magic=20240801, version=1, code="I"), "requires version 7"),
        ("a.bin", llmc_bytes([1, 2, 3])[:-2], "is truncated: its header says 3 tokens in 1030 bytes"),
        ("a.bin", llmc_bytes([1, 2, 3])[:700], "is truncated"),
        ("a.bin", llmc_bytes([1, 2, 3]) + b"\0\0", "is too long"),
        ("a.bin", llmc_bytes([], n_tokens=0), "has 0 tokens in its header"),
        ("a.bin", llmc_bytes([1], n_tokens=-5), "has -5 tokens in its header"),
        ("val.bin", b"\1\2\3", "odd size of 3 bytes"),
        ("a.npy", b"", "is empty"),
        ("a.npy", b"\x93NUMPY\1\0", "not a complete .npy file"),
        ("a.npy", b"not numpy at all", "not a complete .npy file"),
    ],
)
def test_a_damaged_file_is_reported(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_shard(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), np.uint16), np.zeros(3, np.int64), np.zeros(3, ">u2"), np.zeros(0, np.uint16)],
    ids=["two dimensions", "int64", "big-endian", "empty"],
)
def test_an_npy_file_of_other_data_is_reported(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=r"a\.npy"):
        read_shard(tmp_path / "a.npy")


def test_a_truncated_npy_file_is_reported(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"not a complete \.npy file"):
        read_shard(tmp_path / "a.npy")


def test_an_npy_file_of_objects_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UserError):
        read_shard(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_shard(tmp_path / "a.bin")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 11), value=st.integers(0, 255), npy=st.booleans())
def test_a_changed_header_is_rejected_or_harmless(tmp_path_factory, position, value, npy):
    path = tmp_path_factory.mktemp("shard") / ("a.npy" if npy else "a.bin")
    tokens = np.arange(20, dtype=np.uint16)
    np.save(path, tokens) if npy else write_shard(path, tokens)
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    try:
        read = read_shard(path)
    except UserError:
        return
    assert np.array_equal(read, tokens)


# --- a split ---------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_window_equals_that_of_one_long_array(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    folder = tmp_path_factory.mktemp("split")
    whole = np.arange(sum(lengths), dtype=np.uint16)
    for index, part in enumerate(np.split(whole, np.cumsum(lengths)[:-1])):
        write_shard(folder / f"train_{index:06d}.bin", part)
    tokens = open_split(folder, "train")
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert len(tokens) == len(whole)
    assert np.array_equal(tokens.read(start, stop), whole[start:stop])


def test_a_window_within_a_shard_is_not_copied(tmp_path):
    tokens = open_split(prepared(tmp_path), "train")
    assert tokens.read(0, 2).base is not None and not tokens.read(0, 2).flags.writeable
    assert tokens.read(1, 5).flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_a_window_outside_the_split_is_rejected(tmp_path, start, stop):
    with pytest.raises(IndexError):
        open_split(prepared(tmp_path), "train").read(start, stop)


def test_without_a_manifest_file_names_determine_split_and_order(tmp_path):
    for name, tokens in {"web_train_2.bin": [3], "web_train_1.bin": [1, 2], "web_val_0.bin": [4]}.items():
        (tmp_path / name).write_bytes(llmc_bytes(tokens))
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    (tmp_path / "train_notes.txt").write_text("not a shard")
    assert open_split(tmp_path, "train").read(0, 3).tolist() == [1, 2, 3]
    assert open_split(tmp_path, "val").read(0, 1).tolist() == [4]


def test_shards_of_one_split_must_have_one_dtype(tmp_path):
    write_shard(tmp_path / "train_0.bin", np.array([1], np.uint16))
    write_shard(tmp_path / "train_1.bin", np.array([1], np.uint32))
    with pytest.raises(UserError, match="uint32 tokens"):
        open_split(tmp_path, "train")


def test_a_folder_without_the_split_is_reported(tmp_path):
    with pytest.raises(UserError, match="holds no val shard"):
        open_split(prepared(tmp_path, val=()), "val")


def test_a_file_instead_of_a_folder_is_reported(tmp_path):
    write_shard(tmp_path / "train.bin", np.array([1], np.uint16))
    with pytest.raises(UserError, match="is not a folder"):
        open_split(tmp_path / "train.bin", "train")


def test_an_unfinished_preparation_is_rejected(tmp_path):
    write_shard(tmp_path / "train_000000.bin", np.array([1], np.uint16))
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished preparation"):
        open_split(tmp_path, "train")


def test_a_shard_that_differs_from_the_manifest_is_reported(tmp_path):
    prepared(tmp_path)
    write_shard(tmp_path / "train_000001.bin", np.array([1, 2, 3], np.uint16))
    with pytest.raises(UserError, match="has 3 tokens in 1030 bytes, the manifest says 2 in 1028"):
        open_split(tmp_path, "train")


# --- token range -----------------------------------------------------------------------------


def test_tokens_within_the_vocabulary_pass(tmp_path):
    open_split(prepared(tmp_path), "train").check_range(6)
    check_tokens(np.array([5]), 6, "here")


def test_a_token_outside_is_found_through_the_manifest(tmp_path):
    with pytest.raises(UserError, match="holds token 5, but the vocabulary ends at 4"):
        open_split(prepared(tmp_path), "train").check_range(5)


def test_a_token_outside_is_found_without_a_manifest(tmp_path):
    np.array([1, 2, 300], np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin holds token 300, but the vocabulary ends at 256"):
        open_split(tmp_path, "train").check_range(257)


# --- the manifest ----------------------------------------------------------------------------


def test_a_manifest_is_read_back(tmp_path):
    manifest = Manifest.load(prepared(tmp_path))
    assert [(s.file, s.split, s.tokens, s.bytes, s.max_token) for s in manifest.shards] == [
        ("train_000000.bin", "train", 3, 1030, 3),
        ("train_000001.bin", "train", 2, 1028, 5),
        ("val_000000.bin", "val", 2, 1028, 7),
    ]
    assert (manifest.tokenizer, manifest.vocab_size, manifest.bytes_per_token["val"]) == ("byte", 10, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "reads version 1"),
        ({"vocab_size": "10"}, "vocab_size is '10'"),
        ({"vocab_size": 7}, "holds token 7"),
        ({"tokenizer": "../../secret.tiktoken"}, "tokenizer is"),
        ({"bytes_per_token": {"train": -1.0}}, "bytes_per_token"),
        ({"extra": 1}, "extra"),
        ({"shards": None}, "not a valid manifest"),
        ({"shards.file": "../elsewhere.bin"}, "not a plain file name"),
        ({"shards.split": "test"}, "neither train nor val"),
        ({"shards.tokens": 0}, "not an integer of at least 1"),
        ({"shards.sha256": "abc"}, "64 hex digits"),
    ],
)
def test_an_invalid_manifest_is_reported(tmp_path, change, message):
    fields = asdict(Manifest.load(prepared(tmp_path)))
    for key, value in change.items():
        if key.startswith("shards."):
            fields["shards"][0][key.removeprefix("shards.")] = value
        else:
            fields[key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as error:
        open_split(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"shards": {}}', b"[" * 100_000])
def test_a_file_that_is_no_manifest_is_reported(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="not a valid manifest"):
        Manifest.load(tmp_path)


def test_verify_accepts_an_intact_folder(tmp_path):
    assert len(verify(prepared(tmp_path)).shards) == 3


def test_verify_names_every_damaged_or_missing_shard(tmp_path):
    prepared(tmp_path)
    (tmp_path / "train_000000.bin").unlink()
    content = bytearray((tmp_path / "val_000000.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "val_000000.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train_000000\.bin, val_000000\.bin missing or damaged"):
        verify(tmp_path)
