"""Multiple-choice questions: llm.c's file, to the byte, and a model's score on them during training."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, compose, records
from hypothesis import given, settings
from hypothesis import strategies as st
from nanodisp.multiple_choice import Question, accuracy, loglikelihoods, read_questions, write_questions

from nanodisp.config import name_of
from nanodisp.data.tokenizer import ByteTokenizer
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPT, GPTConfig

VOCAB = 65_535
ALONE = World(0, 1, torch.device("cpu"))
QUESTIONS = [
    Question([5, 6, 7], [[1], [2, 3], [4], [8, 9]], label=2),
    Question([65_534], [[0, 0, 0], [10], [11], [12]], label=0),
]

tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    choices = draw(st.lists(tokens, min_size=2, max_size=5))
    return Question(draw(tokens), choices, draw(st.integers(0, len(choices) - 1)))


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# --- the file -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(questions(), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, asked: list[Question]) -> None:
    path = tmp_path_factory.mktemp("round") / "questions.bin"
    write_questions(path, asked)
    assert read_questions(path, VOCAB) == asked


def test_the_bytes_are_those_of_llm_c(tmp_path: Path) -> None:
    first = [65535, 42, 0, 2, 4, 3, 5, 6, 7, 1, 1, 2, 2, 3, 1, 4, 2, 8, 9]
    second = [65535, 34, 1, 0, 4, 1, 65534, 3, 0, 0, 0, 1, 10, 1, 11, 1, 12]
    first[1], second[1] = 2 * len(first), 2 * len(second)
    header = [20240522, 1, 2, max(first[1], second[1]), *[0] * 252]
    expected = struct.pack("<256i", *header) + struct.pack(f"<{len(first + second)}H", *first, *second)
    write_questions(tmp_path / "questions.bin", QUESTIONS)
    assert (tmp_path / "questions.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (slice(0, 4), struct.pack("<i", 20240520), "holds no questions"),
        (slice(4, 8), struct.pack("<i", 2), "holds no questions"),
        (slice(8, 12), struct.pack("<i", 3), "header tells 3 questions"),
        (slice(12, 16), struct.pack("<i", 99), "at most 99 bytes"),
        (slice(1024, 1026), b"\0\0", "question 0: it is cut short"),
        (slice(1026, 1028), struct.pack("<H", 36), "do not add up to its 36 bytes"),
        (slice(1028, 1030), struct.pack("<H", 1), "its index is 1"),
        (slice(1030, 1032), struct.pack("<H", 4), "4 choices, and the label 4"),
        (slice(1032, 1034), struct.pack("<H", 3), "do not add up"),
        (slice(1034, 1036), struct.pack("<H", 0), "do not add up"),
        (slice(-2, None), b"", "question 1: it is cut short"),
        (slice(-1, None), b"", "ends within a number"),
        (slice(700, None), b"", "header tells 2 questions of at most 38 bytes, it holds 0"),
        (slice(2, None), b"", "holds no questions"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, place: slice, value: bytes, told: str) -> None:
    path = tmp_path / "questions.bin"
    write_questions(path, QUESTIONS)
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        read_questions(path, VOCAB)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.integers(0, 75), st.integers(0, 255))
def test_whatever_byte_is_damaged_no_other_error_comes(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
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


def test_another_vocabulary_is_told(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.bin", QUESTIONS)
    with pytest.raises(UserError, match="token 65534, but the model's vocabulary ends at 256"):
        read_questions(tmp_path / "questions.bin", 257)
    with pytest.raises(UserError, match=r"data/hellaswag/prepare\.py makes one"):
        read_questions(tmp_path / "nothing.bin", 257)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "0 questions do not fit"),
        ([Question([1], [[65_535], [1]], 0)], "does not fit"),
        ([Question([1] * 40_000, [[1], [1]], 0)], "does not fit"),
        ([Question([], [[1], [1]], 0)], "empty"),
        ([Question([1], [[1], []], 0)], "empty"),
        ([Question([1], [[1]], 0)], "1 choices"),
        ([Question([1], [[1], [2]], 2)], "label 2"),
    ],
)
def test_what_can_not_be_asked_is_not_written(tmp_path: Path, asked: list[Question], told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_questions(tmp_path / "questions.bin", asked)
    assert not (tmp_path / "questions.bin").exists()


# --- HellaSwag ------------------------------------------------------------------------------------

ROW = {"ctx": "A man sits on a roof. he", "endings": ["sings.", "is ripping tiles off.", "x", "y"], "label": "1"}


def hellaswag(*arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("hellaswag", ROOT / "data" / "hellaswag" / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def test_hellaswag_is_prepared_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "label": 0}) + "\n")
    out = tmp_path / "made" / "val.bin"
    hellaswag("tokenizer=byte", f"path={tmp_path / 'val.jsonl'}", f"out={out}")
    first, second = read_questions(out, 257)
    text = ByteTokenizer().decode_bytes
    assert text(first.context) == ROW["ctx"].encode()
    assert [text(choice) for choice in first.choices] == [b" sings.", b" is ripping tiles off.", b" x", b" y"]
    assert (first.label, second.label) == (1, 0)


@pytest.mark.parametrize("content", ["{", '{"ctx": "a"}', json.dumps({**ROW, "label": ""}), "[1]"])
def test_another_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "val.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"can not be read as jsonl|row 0 has no ctx"):
        hellaswag("tokenizer=byte", f"path={tmp_path / 'val.jsonl'}", f"out={tmp_path / 'val.bin'}")


# --- the score ------------------------------------------------------------------------------------


def naive(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One token at a time, each in a forward pass of its own, within the one window that ends the pair."""
    row = [*context, *continuation][-(model.config.block_size + 1) :]
    total, greedy = 0.0, True
    for end in range(len(row) - min(len(continuation), len(row) - 1), len(row)):
        with torch.no_grad():
            logits = model(torch.tensor([row[:end]])).logits[0, -1]
        total += logits.double().log_softmax(0)[row[end]].item()
        greedy &= int(logits.argmax()) == row[end]
    return total, greedy


short = st.lists(st.integers(0, 49), min_size=1, max_size=9)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(short, st.lists(st.integers(0, 49), max_size=15)), min_size=1, max_size=6), st.data())
def test_loglikelihoods_are_those_of_one_token_at_a_time(
    model: GPT, pairs: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    likeliest = int(model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs = [*pairs, (pairs[0][0], [likeliest])]
    n_ranks, at_once = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    parts = [
        loglikelihoods(model, pairs, tokens_at_once=at_once, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)
    ]
    expected = [naive(model, context, continuation) for context, continuation in pairs]
    totals, greedy = sum(part[0] for part in parts), sum(part[1].int() for part in parts)
    assert isinstance(totals, torch.Tensor)
    assert isinstance(greedy, torch.Tensor)
    assert totals.tolist() == pytest.approx([total for total, _ in expected], abs=1e-5)
    assert [bool(flag) for flag in greedy] == [flag for _, flag in expected]
    assert expected[-1][1]


def test_the_answer_is_the_choice_of_the_lowest_mean_loss(model: GPT) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    asked, by_sum = [], 0
    for number in range(20):
        context, choices = draw(4), [draw(n) for n in (1, 3, 6, 8)]
        sums = [naive(model, context, choice)[0] for choice in choices]
        means = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        label = means.index(max(means)) if number < 15 else means.index(min(means))
        asked.append(Question(context, choices, label))
        by_sum += sums.index(max(sums)) == label
    assert by_sum < 15
    assert accuracy(model, asked, ALONE, torch.float32) == {"accuracy": 0.75, "examples": 20}


def test_of_a_choice_longer_than_the_context_the_mean_is_of_what_fits(model: GPT) -> None:
    block_size = model.config.block_size
    end, other = [i * 7 % 50 for i in range(block_size)], [i * 3 % 50 for i in range(block_size)]
    losses = [-naive(model, [1], choice)[0] for choice in (end, other)]
    better, worse = (end, other) if losses[0] < losses[1] else (other, end)
    asked = [Question([1], [better, [1] * 9 * block_size + worse], 0)]  # of the second the end alone is seen
    assert accuracy(model, asked, ALONE, torch.float32)["accuracy"] == 1


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "questions.bin"
    words = [list(b"cat "), list(b"dog "), list(b"zebra "), list(b"ox ")]
    write_questions(path, [Question([97 + i, 32], words, i % 4) for i in range(7)])
    return path


def test_training_records_the_task_and_is_the_same_without(run: Run, task: Path) -> None:
    settings = ("train.steps=4", "train.eval_interval=2", "model.dropout=0.1")
    without, asked = run(*settings), run(*settings, f"train.eval_task={task}", name="asked")
    assert [line["step"] for line in records(asked, "task")] == [0, 2, 4]
    assert all(line["examples"] == 7 and 7 * line["accuracy"] % 1 == 0 for line in records(asked, "task"))
    assert records(without, "task") == []
    of = lambda folder: [line["loss"] for line in records(folder, "train") + records(folder, "val")]  # noqa: E731
    assert of(without) == of(asked)


def test_a_task_makes_no_other_run(task: Path) -> None:
    assert name_of(compose(f"train.eval_task={task}"), "nano") == name_of(compose(), "nano")


def test_two_ranks_and_fsdp_answer_as_one_does(run: Run, corpus: Path, task: Path, tmp_path: Path) -> None:
    settings = ("train.steps=2", "train.eval_interval=1", "optim.lr=0.05", f"train.eval_task={task}")
    one = run(*settings)
    given = (*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=two", "train.parallel=fsdp", *settings)
    done = command(*given, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [line["accuracy"] for line in records(tmp_path / "two", "task")] == [
        line["accuracy"] for line in records(one, "task")
    ]
