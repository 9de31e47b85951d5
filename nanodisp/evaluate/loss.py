"""A run's loss on its validation split, and what rounding the model does to it and to its hidden states."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from nanodisp.condensation.measure import Condensation, measure
from nanodisp.data.batches import count_windows, read_windows, spread_windows
from nanodisp.data.corpus import open_corpus
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.evaluate.text_tasks import Result
from nanodisp.files import finite
from nanodisp.hf.corpus import folder_of_data
from nanodisp.hf.open import is_hugging_face, open_for_measuring
from nanodisp.models.gpt import GPT
from nanodisp.models.quantize import quantize
from nanodisp.training.validation import Validation

LOSS = "loss"  # the name of the task
WINDOWS = 256  # unless limit says otherwise
MEASURED = 16  # of these, for the figures by layer
TOKENS_AT_ONCE = 4096  # of a forward pass
VERSION = 1


def evaluate_loss(name: str, scheme: str | None, limit: int | None, seed: int, device: torch.device) -> Result:
    """Loss of a run's checkpoint in float32; with a `scheme` of `quantize`, also the model's before rounding.

    Args:
        limit: windows of the model's context, spread evenly over the validation split; None for `WINDOWS`.
        seed: recorded; nothing is random.

    Raises UserError for a model of Hugging Face, and without the run's data.
    """
    if is_hugging_face(name):
        raise UserError("tasks=loss is for runs, on their own data: for another model give tasks=wikitext")
    subject = open_for_measuring(name)
    model = subject.model.to(device).eval()
    assert isinstance(model, GPT)
    block_size, context = model.config.block_size, contextlib.nullcontext
    corpus = open_corpus(folder_of_data(subject, "tasks=loss needs them"), "none")
    rows = max(1, TOKENS_AT_ONCE // block_size)
    validate = Validation(
        corpus, World(0, 1, device), block_size=block_size, n_windows=limit or WINDOWS, rows=rows, autocast=context
    )
    chosen = spread_windows(count_windows(corpus.val, block_size), MEASURED)
    windows, _ = read_windows(corpus.val, chosen, block_size, model.vocab_size)

    loss_name = model.config.loss_name
    before = validate(model)
    states = {"": measure(model, windows.split(rows))}
    figures = {loss_name: before[loss_name], "bpb": before.get("bpb")}
    if scheme is not None:
        quantize(model, scheme)
        model.eval()
        after = validate(model)
        states = {"before": states[""], "after": measure(model, windows.split(rows))}
        figures = {loss_name: after[loss_name], "bpb": after.get("bpb"), f"{loss_name} before": before[loss_name]}
        figures["relative"] = after[loss_name] / before[loss_name]
    metrics = {
        metric: {"value": finite(value), "stderr": None, "higher_is_better": False}
        for metric, value in figures.items()
        if value is not None
    }
    n_windows = len(validate.windows)
    entry = {"metrics": metrics, "shots": 0, "examples": n_windows, "version": VERSION, "seed": seed}
    entry["layers"] = {when: by_layer(of) for when, of in states.items()} if scheme else by_layer(states[""])
    head = f"{LOSS}: {n_windows:,} windows of {block_size} tokens"
    lines = [head, "  ".join(f"{metric} {value:.4f}" for metric, value in figures.items() if value is not None)]
    return Result(LOSS, entry, "\n".join([*lines, *lines_by_layer(states)]))


def by_layer(of: Condensation) -> dict[str, Any]:
    """Kurtosis, largest over median value, and mean cosine, a list each."""
    found = {"kurtosis": of.kurtosis, "outlier": of.outlier, "mean_cosine": of.mean}
    return {name: finite(values.tolist()) for name, values in found.items()}


def lines_by_layer(states: dict[str, Condensation]) -> list[str]:
    """A line for each figure, before and after rounding if there are both."""
    show = lambda values: "".join(f"{value:9.3g}" for value in values)  # noqa: E731
    lines = [f"{'layer':20}{''.join(f'{layer:9}' for layer in range(len(next(iter(states.values())).mean)))}"]
    for when, of in states.items():
        rows: dict[str, np.ndarray] = {"kurtosis": of.kurtosis, "outlier": of.outlier, "cosine": of.mean}
        lines += [f"{f'{name} {when}':20}{show(values)}" for name, values in rows.items()]
    return lines
