"""Benchmarks of local files: what is read, and how mistakes are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_benchmarks

from nanodisp.data.benchmarks import BENCHMARKS, fingerprint, read_items
from nanodisp.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_benchmarks(tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read(name: str, folder: Path) -> None:
    assert len(read_items(name, folder)) == (3 if name == "wikitext" else 12)


def test_the_first_pairs_are_of_all_paradigms(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "blimp.jsonl").read_text().splitlines()]
    items = read_items("blimp", folder)
    assert [item["field"] for item in items[:6]] == ["syntax", "syntax_semantics", "morphology"] * 2
    assert items[1]["choices"] == [rows[4]["good"], rows[4]["bad"]], "the first of the second paradigm"
    assert sorted(item["choices"] for item in items) == sorted([row["good"], row["bad"]] for row in rows)


def test_a_choice_is_without_the_space_that_separates_it(folder: Path) -> None:
    row = {"context": "A is", "choices": [" b", "  c "], "gold": 1}
    (folder / "multiple_choice" / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    assert read_items("piqa", folder) == [{"context": "A is", "choices": ["b", " c "], "gold": 1}]
    contexts = {"contexts": ["a", "b"], "continuation": " c", "gold": 1}
    (folder / "multiple_choice" / "winogrande.jsonl").write_text(json.dumps(contexts) + "\n")
    assert read_items("winogrande", folder) == [{"contexts": ["a", "b"], "continuation": "c", "gold": 1}]


def test_the_answers_of_truthfulqa(tmp_path: Path) -> None:
    (tmp_path / "truthfulqa").mkdir()
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text(
        "Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers\n"
        '"Is it, or not?",It is,It is not,It is; It may be,"It is not; Never;"\n'
    )
    (item,) = read_items("truthfulqa_mc2", tmp_path)
    assert item["context"].endswith("held in Barcelona, Spain.\n\nQ: Is it, or not?\nA:")
    assert (item["choices"], item["n_right"]) == (["It is", "It may be", "It is not", "Never"], 2)
    assert read_items("truthfulqa_mc1", tmp_path)[0]["choices"] == ["It is", "It is not", "Never"]
    assert read_items("truthfulqa_binary", tmp_path)[0]["choices"] == ["It is", "It is not"]


def test_the_target_of_lambada_is_its_last_word_with_its_space(folder: Path) -> None:
    (folder / "lm" / "lambada_test_openai.jsonl").write_text('{"text": "Once upon a time"}\n')
    assert read_items("lambada", folder) == [{"context": "Once upon a", "target": " time"}]


def test_the_pages_of_wikitext_are_articles(tmp_path: Path) -> None:
    (tmp_path / "lm" / "wikitext-103").mkdir(parents=True)
    text = " \n = One = \n \n Text . \n = = Part = = \n More . \n = Two = \n Text . \n"
    (tmp_path / "lm" / "wikitext-103" / "wiki.test.tokens").write_text(text)
    pages = [item["page"] for item in read_items("wikitext", tmp_path)]
    assert pages == [text[: text.index(" = Two")], text[text.index(" = Two") :]]


def test_the_fingerprint_follows_the_file(folder: Path) -> None:
    before = fingerprint("blimp", folder), fingerprint("piqa", folder)
    with (folder / "blimp.jsonl").open("a") as file:
        file.write("\n")
    assert (fingerprint("blimp", folder) != before[0], fingerprint("piqa", folder) == before[1]) == (True, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blimp", None, r"has no blimp\.jsonl, which blimp needs; docs/evaluation\.md"),
        ("blimp", "", r"blimp\.jsonl has no items"),
        ("blimp", '{"uid": "a"}\n', r"blimp\.jsonl line 1 has no field of type str"),
        ("blimp", "[1]\n", r"line 1 has no uid of type str"),
        ("blimp", "{\n", r"line 1 is not JSON"),
        ("blimp", '{"uid": "a", "field": "b", "good": " ", "bad": "c"}\n', r"line 1: good has an empty text"),
        ("piqa", '{"context": "a", "choices": [" b", ""], "gold": 0}\n', r"line 1: choices has an empty text"),
        ("piqa", '{"context": "a", "choices": [" b", " c"], "gold": 2}\n', r"gold=2 is none of its 2 choices"),
        ("piqa", '{"context": "a", "choices": [" b", "c"], "gold": 1}\n', r"'c' does not begin with the space"),
        ("piqa", '{"context": "a", "choices": " b", "gold": 1}\n', r"line 1 has no choices of type list"),
        ("lambada", '{"text": "a b"}\n{"text": "word"}\n', r"line 2: its text has no context before a last word"),
        ("truthfulqa_mc2", "Question,Best Answer\na,b\n", r"question 1 has no Best Incorrect Answer"),
        ("wikitext", " \n", r"wiki\.test\.tokens has no items"),
        ("piqa", b"\xff\n", r"piqa\.jsonl cannot be read: 'utf-8' codec"),
    ],
)
def test_mistakes_are_reported_in_one_line(name: str, content: str | bytes | None, message: str, folder: Path) -> None:
    file = folder / BENCHMARKS[name].file
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_items(name, folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder: give one with blimp\.jsonl"):
        read_items("blimp", tmp_path / "nowhere")
