"""Multiple-choice questions: llm.c's file format, byte for byte, and HellaSwag in it."""

from __future__ import annotations

import json
import runpy
import struct
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.data.questions import Question, read_questions, write_questions
from nanodisp.data.tokenizer import ByteTokenizer
from nanodisp.errors import UserError

VOCAB = 65_535
QUESTIONS = [
    Question([5, 6, 7], [[1], [2, 3], [4], [8, 9]], label=2),
    Question([65_534], [[0, 0, 0], [10], [11], [12]], label=0),
]

tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    choices = draw(st.lists(tokens, min_size=2, max_size=5))
    return Question(draw(tokens), choices, draw(st.integers(0, len(choices) - 1)))


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(questions(), min_size=1, max_size=4))
def test_written_questions_are_read_back(tmp_path_factory: pytest.TempPathFactory, asked: list[Question]) -> None:
    path = tmp_path_factory.mktemp("round") / "questions.bin"
    write_questions(path, asked)
    assert read_questions(path, VOCAB) == asked


def test_the_bytes_equal_those_of_llmc(tmp_path: Path) -> None:
    first = [65535, 42, 0, 2, 4, 3, 5, 6, 7, 1, 1, 2, 2, 3, 1, 4, 2, 8, 9]
    second = [65535, 34, 1, 0, 4, 1, 65534, 3, 0, 0, 0, 1, 10, 1, 11, 1, 12]
    first[1], second[1] = 2 * len(first), 2 * len(second)
    header = [20240522, 1, 2, max(first[1], second[1]), *[0] * 252]
    expected = struct.pack("<256i", *header) + struct.pack(f"<{len(first + second)}H", *first, *second)
    write_questions(tmp_path / "questions.bin", QUESTIONS)
    assert (tmp_path / "questions.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (slice(0, 4), struct.pack("<i", 20240520), "holds no questions"),
        (slice(4, 8), struct.pack("<i", 2), "holds no questions"),
        (slice(8, 12), struct.pack("<i", 3), "header says 3 questions"),
        (slice(12, 16), struct.pack("<i", 99), "at most 99 bytes"),
        (slice(1024, 1026), b"\0\0", "question 0: it is truncated"),
        (slice(1026, 1028), struct.pack("<H", 36), "do not add up to its 36 bytes"),
        (slice(1028, 1030), struct.pack("<H", 1), "its index is 1"),
        (slice(1030, 1032), struct.pack("<H", 4), "4 choices and label 4"),
        (slice(1032, 1034), struct.pack("<H", 3), "do not add up"),
        (slice(1034, 1036), struct.pack("<H", 0), "do not add up"),
        (slice(-2, None), b"", "question 1: it is truncated"),
        (slice(-1, None), b"", "ends within a number"),
        (slice(700, None), b"", "header says 2 questions of at most 38 bytes, the file has 0"),
        (slice(2, None), b"", "holds no questions"),
    ],
)
def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path, place: slice, value: bytes, message: str) -> None:
    path = tmp_path / "questions.bin"
    write_questions(path, QUESTIONS)
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_questions(path, VOCAB)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 75), st.integers(0, 255))
def test_no_damaged_byte_raises_another_error(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "questions.bin"
    write_questions(path, QUESTIONS)
    content = bytearray(path.read_bytes())
    content[1024 + place % (len(content) - 1024)] = value
    path.write_bytes(content)
    try:
        found = read_questions(path, VOCAB)
    except UserError:
        return
    assert len(found) == 2


def test_a_token_outside_the_vocabulary_is_reported(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.bin", QUESTIONS)
    with pytest.raises(UserError, match="token 65534, but the model's vocabulary ends at 256"):
        read_questions(tmp_path / "questions.bin", 257)
    with pytest.raises(UserError, match=r"cannot be read: No such file .*data/hellaswag/prepare\.py"):
        read_questions(tmp_path / "nothing.bin", 257)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "0 questions do not fit"),
        ([Question([1], [[65_535], [1]], 0)], "does not fit"),
        ([Question([1] * 40_000, [[1], [1]], 0)], "does not fit"),
        ([Question([], [[1], [1]], 0)], "empty"),
        ([Question([1], [[1], []], 0)], "empty"),
        ([Question([1], [[1]], 0)], "1 choices"),
        ([Question([1], [[1], [2]], 2)], "label 2"),
        ([Question([1], [[1], [2]], 0)] * 65_536, "65536 questions do not fit"),
    ],
)
def test_invalid_questions_are_not_written(tmp_path: Path, asked: list[Question], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_questions(tmp_path / "questions.bin", asked)
    assert not (tmp_path / "questions.bin").exists()


# --- HellaSwag ------------------------------------------------------------------------------------

ROW = {"ctx": "A man sits on a roof. he", "endings": ["sings.", "is ripping tiles off.", "x", "y"], "label": "1"}


def hellaswag(*arguments: str) -> None:
    runpy.run_path(str(ROOT / "data" / "hellaswag" / "prepare.py"))["main"](arguments)


def test_hellaswag_is_prepared_from_a_file(tmp_path: Path) -> None:
    separator = json.dumps({**ROW, "label": 0, "source": "a\u2028b"}, ensure_ascii=False)  # no end of a line
    (tmp_path / "val.jsonl").write_text(json.dumps(ROW) + "\n" + separator + "\n", encoding="utf-8")
    out = tmp_path / "made" / "val.bin"
    hellaswag("tokenizer=byte", f"path={tmp_path / 'val.jsonl'}", f"out={out}")
    first, second = read_questions(out, 257)
    text = ByteTokenizer().decode_bytes
    assert text(first.context) == ROW["ctx"].encode()
    assert [text(choice) for choice in first.choices] == [b" sings.", b" is ripping tiles off.", b" x", b" y"]
    assert (first.label, second.label) == (1, 0)


@pytest.mark.parametrize("content", ["{", '{"ctx": "a"}', json.dumps({**ROW, "label": ""}), "[1]"])
def test_a_file_of_another_format_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "val.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"cannot be read as jsonl|row 0 has no ctx"):
        hellaswag("tokenizer=byte", f"path={tmp_path / 'val.jsonl'}", f"out={tmp_path / 'val.bin'}")
