"""Validation: the windows that are measured; the score on questions, alone and on several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compose, records
from tiny_models import decided_model

from nanodisp.condensation.cosine import mean_cosine
from nanodisp.config import name_of
from nanodisp.data.batches import read_windows
from nanodisp.data.corpus import open_corpus
from nanodisp.data.questions import Question, write_questions
from nanodisp.distributed import World
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.training.validation import Validation

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> GPT:
    return decided_model()


@pytest.fixture
def answer(corpus: Path, model: GPT) -> Callable[[list[Question]], dict[str, float]]:
    """The score of the model on questions, on one rank in float32."""

    def score(questions: list[Question]) -> dict[str, float]:
        world = World(0, 1, torch.device("cpu"))
        size = model.config.block_size
        autocast = contextlib.nullcontext
        data = open_corpus(corpus, "byte")
        validation = Validation(
            data, world, block_size=size, n_windows=1, rows=1, autocast=autocast, questions=questions
        )
        return validation.answer(model)

    return score


@torch.no_grad()
def losses_of(model: GPT, context: list[int], choice: list[int]) -> torch.Tensor:
    """The loss of each token of a choice; context and choice fit into one window."""
    row = torch.tensor([*context, *choice])
    logits = model.eval()(row[None, :-1]).logits[0]
    return F.cross_entropy(logits[-len(choice) :].double(), row[-len(choice) :], reduction="none")


def test_the_answer_is_the_choice_with_the_lowest_mean_loss(
    model: GPT, answer: Callable[[list[Question]], dict[str, float]]
) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    questions, right_by_sum = [], 0
    for number in range(20):
        context, choices = draw(4), [draw(n) for n in (1, 3, 6, 8)]
        losses = [losses_of(model, context, choice) for choice in choices]
        means, sums = [loss.mean() for loss in losses], [loss.sum() for loss in losses]
        label = means.index(min(means)) if number < 15 else means.index(max(means))
        questions.append(Question(context, choices, label))
        right_by_sum += sums.index(min(sums)) == label
    assert right_by_sum < 15
    assert answer(questions) == {"accuracy": 0.75, "examples": 20}


def test_a_choice_longer_than_the_context_is_scored_on_its_end(
    model: GPT, answer: Callable[[list[Question]], dict[str, float]]
) -> None:
    block_size = model.config.block_size
    ends = [i * 7 % 50 for i in range(block_size)], [i * 3 % 50 for i in range(block_size)]
    better, worse = sorted(ends, key=lambda end: losses_of(model, [1], end).mean())
    assert answer([Question([1], [better, [1] * 9 * block_size + worse], 0)])["accuracy"] == 1


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "questions.bin"
    words = [list(b"cat "), list(b"dog "), list(b"zebra "), list(b"ox ")]
    write_questions(path, [Question([97 + i, 32], words, i % 4) for i in range(7)])
    return path


def test_the_task_is_recorded_and_does_not_change_training(run: Run, task: Path) -> None:
    settings = ("train.steps=4", "train.eval_interval=2", "model.dropout=0.1")
    without, asked = run(*settings), run(*settings, f"train.eval_task={task}", name="asked")
    assert [line["step"] for line in records(asked, "task")] == [0, 2, 4]
    assert all(line["examples"] == 7 and 7 * line["accuracy"] % 1 == 0 for line in records(asked, "task"))
    assert records(without, "task") == []
    of = lambda folder: [line["loss"] for line in records(folder, "train") + records(folder, "val")]  # noqa: E731
    assert of(without) == of(asked)


def test_a_task_does_not_change_the_name_of_a_run(task: Path) -> None:
    assert name_of(compose(f"train.eval_task={task}"), "nano") == name_of(compose(), "nano")


@pytest.mark.slow
def test_two_ranks_with_fsdp_score_as_one_does(run: Run, corpus: Path, task: Path, tmp_path: Path) -> None:
    settings = ("train.steps=2", "train.eval_interval=1", "optim.lr=0.05", f"train.eval_task={task}")
    one = run(*settings)
    given = (*TINY, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=two", "train.parallel=fsdp", *settings)
    done = forked.train(*given, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [line["accuracy"] for line in records(tmp_path / "two", "task")] == [
        line["accuracy"] for line in records(one, "task")
    ]


def test_the_loss_on_training_text_is_that_of_evaluation_on_a_quarter_as_many_windows(corpus: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257, dropout=0.3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    data = open_corpus(corpus, "byte")
    validation = Validation(
        data, World(0, 1, torch.device("cpu")), block_size=16, n_windows=10, rows=2, autocast=contextlib.nullcontext
    )
    measured = validation(model)
    assert model.training
    n_windows = (len(data.train) - 1) // 16
    x, y = read_windows(data.train, np.array([i * n_windows // 3 for i in range(3)]), 16, 257)
    with torch.no_grad():
        expected = model.eval()(x, y).loss.item()
    assert measured["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["train_loss"] != pytest.approx(measured["loss"], rel=1e-3)


def test_validation_does_not_change_training(run: Run) -> None:
    settings = ("train.steps=6", "train.log_interval=1", "model.dropout=0.1", "intervention.noise_alpha=5")
    often, seldom = run("train.eval_interval=1", *settings, name="often"), run(*settings, name="seldom")
    assert [line["loss"] for line in records(often, "train")] == [line["loss"] for line in records(seldom, "train")]
    assert all(isinstance(line["train_loss"], float) for line in records(often, "val"))


def test_validation_and_following_measure_windows_spread_over_the_split(corpus: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that windows differ
    data = open_corpus(corpus, "byte")
    validation = Validation(
        data, World(0, 1, torch.device("cpu")), block_size=16, n_windows=8, rows=3, autocast=contextlib.nullcontext
    )
    n_windows = (len(data.val) - 1) // 16
    assert n_windows > 4 * 8

    def means(windows: list[int]) -> tuple[float, list[float]]:
        x, y = read_windows(data.val, np.array(windows), 16, 257)
        with torch.no_grad():
            out = model(x, y, return_hidden=True)
        return out.loss.item(), [mean_cosine(z).item() for z in out.hidden]

    loss, cosines = means([i * n_windows // 8 for i in range(8)])
    measured = validation(model)
    assert measured["loss"] == pytest.approx(loss, rel=1e-5) != pytest.approx(means(list(range(8)))[0], rel=1e-3)
    assert measured["mean_cosine"] == pytest.approx(cosines, rel=1e-4)
    at_layer_windows = validation.layer_figures(model)["mean_cosine"]
    assert at_layer_windows == pytest.approx(means([i * n_windows // 4 for i in range(4)])[1], rel=1e-4)
    for others in ([0, 1, 2, 3], [i * n_windows // 8 for i in range(4)]):
        assert at_layer_windows != pytest.approx(means(others)[1], rel=1e-3)
    assert model.training
