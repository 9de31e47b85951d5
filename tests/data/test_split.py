"""The split of a collection: by file names, else by size; no byte lost, none in both, about the share asked for."""

from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prepare import assert_rejected, config, documents_of, write_jsonl

from nanodisp.data.prepare import prepare
from nanodisp.data.split import assign, n_bytes, split_by_size


def named(tmp_path, root):
    """The configuration of data=text without any other key: file names decide, so none may be given."""
    return config(tmp_path, root, val_fraction=0.1)


def write(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# --- by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_file_names_decide(tmp_path, word, capsys):
    root = write(
        tmp_path / "texts", **{"train_txt": "for training", f"my-{word}.0_txt": "held out", "wiki.test": "test"}
    )
    folder = prepare(named(tmp_path, root))
    assert documents_of(folder, "train") == ["for training"]
    assert documents_of(folder, "val") == ["held out"]
    line = capsys.readouterr().err.splitlines()[-1]
    assert "2 files, 1 of them for validation by name; skipped wiki.test: for testing, by its name" in line


def test_dev_is_for_validation_beside_train(tmp_path):
    root = write(tmp_path / "texts", dev_txt="held out", train_txt="for training", test_txt="test")
    folder = prepare(named(tmp_path, root))
    assert (documents_of(folder, "train"), documents_of(folder, "val")) == (["for training"], ["held out"])


@pytest.mark.parametrize("others", [{"val_txt": "held out"}, {"train_txt": "t", "val_txt": "held out"}])
def test_dev_is_a_folder_like_others_beside_val(tmp_path, others):
    folder = prepare(named(tmp_path, write(tmp_path / "texts", dev__a_txt="code", **others)))
    assert documents_of(folder, "val") == ["held out"]
    assert "code" in documents_of(folder, "train")


def test_dev_is_a_folder_like_others_without_train(tmp_path):
    root = write(tmp_path / "texts", dev__a_txt="a" * 100, main_txt="b" * 100)
    folder = prepare(config(tmp_path, root, val_fraction=0.1))
    assert documents_of(folder, "train") == ["a" * 90, "b" * 90]


def test_the_folders_of_a_file_count_and_the_last_word_decides(tmp_path):
    root = write(
        tmp_path / "texts", train__a_txt="a", test__b_txt="b", val__c_txt="c", val__train_d_txt="d", interval_txt="e"
    )
    (root / "val" / "train_d.txt").rename(root / "val" / "train-d.txt")
    folder = prepare(named(tmp_path, root))
    assert (documents_of(folder, "train"), documents_of(folder, "val")) == (["e", "a", "d"], ["c"])


def test_test_files_are_left_out_also_where_the_size_decides(tmp_path):
    root = write(tmp_path / "texts", a_txt="a" * 100, test_txt="t" * 100, train_txt="b" * 100)
    folder = prepare(config(tmp_path, root, val_fraction=0.1))
    assert documents_of(folder, "train") == ["a" * 90, "b" * 90]
    assert documents_of(folder, "val") == ["a" * 10, "b" * 10]


def test_a_folder_without_a_file_for_training_is_reported(tmp_path):
    root = write(tmp_path / "texts", val_txt="held out", test_txt="test")
    assert_rejected(config(tmp_path, root), "holds no text for training: by their names, all files are for val or test")
    assert not (tmp_path / "prepared").exists()


def test_names_are_another_folder_than_0_1_0_made(tmp_path):
    """Which has the same content: it trained on val.txt."""
    root = write(tmp_path / "texts", train_txt="for training", val_txt="held out")
    by_name = prepare(named(tmp_path, root))
    assert by_name.name != "texts-byte-5fc68429"
    assert prepare(named(tmp_path, root)) == by_name


def test_a_share_has_no_effect_where_file_names_decide(tmp_path):
    root = write(tmp_path / "texts", train_txt="for training", val_txt="held out")
    for share in (0.05, 0.2):
        assert_rejected(
            config(tmp_path, root, val_fraction=share),
            rf"^data\.val_fraction={share} has no effect: file names decide .*; leave it out$",
        )
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("names", [("train.txt", "val.txt"), ("train/a.txt", "train/b.txt", "val/b.txt")])
def test_the_same_text_for_training_and_validation_is_said_at_every_start(tmp_path, names, capsys):
    root = write(tmp_path / "texts", **{name.replace("/", "__").replace(".txt", "_txt"): "same" for name in names})
    for _ in range(2):
        folder = prepare(named(tmp_path, root))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert line.startswith("warning: the same text is for training and for validation: ")
        assert line.endswith(f"{root / names[-2]} and {root / names[-1]}")
    assert documents_of(folder, "val") == ["same"]


def test_empty_files_are_not_the_same_text(tmp_path, capsys):
    prepare(named(tmp_path, write(tmp_path / "texts", train_txt="a", a_txt="", val_txt="b", val2_txt="")))
    assert "warning" not in capsys.readouterr().err


# --- by size ---------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 40) | st.integers(0, 4000), min_size=1, max_size=60)


@given(SIZES, st.floats(0.001, 0.5))
@example([300_000, 5_000], 0.1)
@example([10] * 1000, 0.4)
@example([1, *[1000] * 40], 0.02)
def test_the_share_is_what_was_asked_for_within_a_document(sizes, val_fraction):
    n_train = split_by_size(array("q", sizes), val_fraction).n_train
    assert all(0 <= n <= size for n, size in zip(n_train, sizes, strict=True))
    error = abs(sum(sizes) - sum(n_train) - sum(sizes) * val_fraction)
    n_cut = sum(0 < n < size for n, size in zip(n_train, sizes, strict=True))
    rounding = len(sizes)  # a cut is at a whole byte
    assert error <= max(max(sizes), sum(sizes) * val_fraction / 10) + rounding
    assert error <= sum(sizes) * val_fraction / 4 + rounding
    assert not n_cut or split_by_size(array("q", sizes), val_fraction).key == "by size"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4), min_size=1, max_size=12), st.data())
def test_no_byte_is_lost_and_none_is_in_both_splits(documents, data):
    sizes = array("q", (sum(map(n_bytes, chunks)) for chunks in documents))
    split = split_by_size(sizes, data.draw(st.floats(0.01, 0.5)))
    pieces = list(assign(documents, sizes, split.n_train))
    assert "".join(piece.text for piece in pieces) == "".join(map("".join, documents))
    position = {"train": 0, "val": 0}
    for piece in pieces:
        position[piece.split] += n_bytes(piece.text)
    assert sum(position.values()) == sum(sizes)
    assert abs(position["train"] - sum(split.n_train)) <= 3 * len(documents)  # cut before a character


def test_a_large_file_beside_a_small_one_gives_its_end(tmp_path, capsys):
    root = write(tmp_path / "texts", a_big_txt="0123456789" * 30_000, b_small_txt="x" * 5_000)
    folder = prepare(config(tmp_path, root, val_fraction=0.1))
    train, val = documents_of(folder, "train"), documents_of(folder, "val")
    assert (list(map(len, train)), list(map(len, val))) == ([270_000, 5_000], [30_000])
    assert train[0] + val[0] == "0123456789" * 30_000
    assert "2 files, 1 document cut" in capsys.readouterr().err


def test_documents_of_jsonl_are_cut_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "0123456789"}])
    folder = prepare(config(tmp_path, path, val_fraction=0.1))
    assert (documents_of(folder, "train"), documents_of(folder, "val")) == (["012345678"], ["9"])


def test_a_collection_of_many_documents_is_split_as_before(tmp_path):
    """Every k-th document, in a folder that is named as by version 0.1.0."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(200)])
    folder = prepare(config(tmp_path, path, val_fraction=0.1))
    assert documents_of(folder, "val") == [f"document {i}" for i in range(0, 200, 10)]
    assert folder.name == "a-byte-bb966660"


def test_a_folder_of_0_1_0_is_used_if_its_split_is_still_right(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(200)])
    folder = prepare(config(tmp_path, path, val_fraction=0.1))
    (folder / "split.json").unlink()  # 0.1.0 did not write it
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(config(tmp_path, path, val_fraction=0.1)) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    monkeypatch.setattr("nanodisp.data.prepare.read_documents", pytest.fail)  # not read again
    assert prepare(config(tmp_path, path, val_fraction=0.1)) == folder


@pytest.mark.parametrize("text", ["x", "é"])
def test_text_that_cannot_be_split_leaves_no_folder(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert_rejected(config(tmp_path, tmp_path / "a.txt", val_fraction=0.1), "(train|val) would be empty")
    assert not list(tmp_path.glob("prepared/*"))


def test_the_line_after_preparation_counts_every_split(tmp_path, capsys):
    root = write(tmp_path / "texts", train_txt="abc", train2_txt="é", val_txt="de", empty_txt="", picture="\0")
    folder = prepare(named(tmp_path, root))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{folder}: train 2 documents, 5 bytes (71.4%), 7 tokens; val 1 document, 2 bytes (28.6%), 3 tokens; "
        "4 files, 1 of them for validation by name; empty files: 1; skipped picture: not text (binary, or UTF-16 "
        "without a byte order mark, which needs data.encoding=utf-16-le or -be)"
    )
