"""Multiple-choice questions in llm.c's file format, for `train.eval_task`.

A file (llm.c, dev/data/data_common.py and llmc/dataloader.h) is a header of 256 little-endian int32, then
the questions as a stream of uint16:

    header    20240522, version 1, number of questions, bytes of the longest question, zeros
    question  65535, its bytes, its index, its label, number of choices, context, choices

Context and choices are each a number of tokens and then the tokens, without an end-of-text token before the
context. The file does not record its tokenizer. `training/validation.py` scores a model on the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanodisp.data.shards import QUESTIONS
from nanodisp.errors import UserError
from nanodisp.files import write_whole

VERSION, HEADER = 1, 256
START = 65_535  # opens a question, so no token is this one


@dataclass(frozen=True)
class Question:
    """Tokens of a context and of each possible continuation; label is the index of the correct one."""

    context: list[int]
    choices: list[list[int]]
    label: int


# --- the file ------------------------------------------------------------------------------------


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write the same bytes as llm.c's `write_evalfile`.

    Raises UserError for what the format cannot hold (65,536 questions or more, a question of 65,536 bytes or more, a
    token id of 65,535 or more) and for an invalid question, see `check`.
    """
    stream: list[int] = []
    longest = 0
    if not 1 <= len(questions) <= START:
        raise UserError(f"{len(questions)} questions do not fit into {path}: it holds 1 to {START}")
    for index, question in enumerate(questions):
        parts = [question.context, *question.choices]
        numbers = [START, 0, index, question.label, len(question.choices)]
        numbers += [number for part in parts for number in (len(part), *part)]
        numbers[1] = n_bytes = 2 * len(numbers)
        if n_bytes > START or any(not 0 <= token < START for part in parts for token in part):
            raise UserError(
                f"question {index} does not fit into {path}: {n_bytes} bytes, ids up to {max(map(max, parts))}"
            )
        check(question, f"question {index}")
        stream += numbers
        longest = max(longest, n_bytes)
    header = np.zeros(HEADER, dtype="<i4")
    header[:4] = QUESTIONS, VERSION, len(questions), longest
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, header.tobytes(), np.array(stream, dtype="<u2").tobytes())


def read_questions(path: Path, vocab_size: int) -> list[Question]:
    """The questions of a file; raises UserError if it is damaged or has a token id outside the vocabulary."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; create one with data/hellaswag/prepare.py"
        ) from error
    header, stream = np.frombuffer(content[: 4 * HEADER].ljust(4 * HEADER, b"\0"), "<i4"), content[4 * HEADER :]
    if (header[0], header[1]) != (QUESTIONS, VERSION):
        begins = f"it begins with {header[0]}, {header[1]}, not {QUESTIONS}, {VERSION}"
        raise UserError(f"{path} holds no questions: {begins}")
    if len(stream) % 2 != 0:
        raise UserError(f"{path} is damaged: it ends within a number")
    numbers = np.frombuffer(stream, "<u2").tolist()
    questions: list[Question] = []
    longest = start = 0
    while start < len(numbers):
        where = f"{path} is damaged in question {len(questions)}"
        question, end = _parse(numbers, start, len(questions), where)
        check(question, where)
        if (highest := max(map(max, (question.context, *question.choices)))) >= vocab_size:
            raise UserError(f"{path} has token {highest}, but the model's vocabulary ends at {vocab_size - 1}")
        questions.append(question)
        longest, start = max(longest, 2 * (end - start)), end
    if (header[2], header[3]) != (len(questions), longest) or not questions:
        raise UserError(
            f"{path} is damaged: its header says {header[2]} questions of at most {header[3]} bytes, "
            f"the file has {len(questions)} of at most {longest}"
        )
    return questions


def _parse(numbers: list[int], start: int, expected: int, where: str) -> tuple[Question, int]:
    """The question at `start`, and the start of the next one."""
    mark, n_bytes, index, label, n_choices = (*numbers[start : start + 5], *[0] * 5)[:5]
    end = start + n_bytes // 2
    if mark != START or n_bytes % 2 != 0 or not start + 5 < end <= len(numbers):
        raise UserError(f"{where}: it is truncated or does not begin at the expected position")
    if index != expected:
        raise UserError(f"{where}: its index is {index}")
    parts: list[list[int]] = []
    position = start + 5
    while position < end and len(parts) <= n_choices:
        after = position + 1 + numbers[position]
        parts.append(numbers[position + 1 : after])
        position = after
    if position != end or len(parts) != n_choices + 1:
        raise UserError(f"{where}: its parts do not add up to its {n_bytes} bytes")
    return Question(parts[0], parts[1:], label), end


def check(question: Question, where: str) -> None:
    """Raise UserError for an invalid question: fewer than 2 choices, a label that is none of them, or an empty text."""
    if len(question.choices) < 2 or not 0 <= question.label < len(question.choices):
        raise UserError(f"{where}: it has {len(question.choices)} choices and label {question.label}")
    if not question.context or not all(question.choices):
        raise UserError(f"{where}: the context or a choice is empty")
