"""Which tokens does dispersion predict better? The validation loss by the frequency of the token, and by its context.

    python -m bench.study.tokens out/study/<run>    # into the run's folder; `bench.study evaluate` does it for all

By frequency: the predicted tokens are cut into four strata by how often they occur, each a quarter of the text
(`strata_of`), so that the mean over the strata is about the validation loss.

By context: can the token be copied? A model that copies looks for the last earlier occurrence of the token it has just
read and predicts what followed there: an induction head, Olsson et al., "In-context Learning and Induction Heads",
arXiv 2209.11895. `copied` tokens are those that this rule predicts; `seen` ones are others that occur earlier in the
window; `new` ones do not. Of a run that has kept several checkpoints, after each of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nanodisp.condensation.sums import STRATA, strata_of
from nanodisp.data.batches import count_windows, read_windows, spread_windows
from nanodisp.data.shards import open_split
from nanodisp.hf.corpus import folder_of_data
from nanodisp.hf.open import open_for_measuring
from nanodisp.models.gpt import GPT
from nanodisp.runs.checkpoint import all_checkpoints, find, step_of

CONTEXTS = ("copied", "seen", "new")
KINDS = ("by_frequency", "by_context", "context_over_steps")  # loss_<kind>.json in a run's folder
WINDOWS = 1024  # as many as the study's runs are validated on: the same ones
ROWS = 8  # windows of a forward pass


class Losses(NamedTuple):
    """Inputs and targets, int64 [W, T], and the cross-entropy of each target, nats, float64 [W, T]."""

    inputs: Tensor
    targets: Tensor
    losses: Tensor
    vocab_size: int


@torch.no_grad()
def losses_of(checkpoint: Path) -> Losses:
    """Raises UserError without the run's data."""
    subject = open_for_measuring(str(checkpoint))
    model = subject.model
    assert isinstance(model, GPT)
    tokens = open_split(folder_of_data(subject, "it is measured on them"), "val")
    block_size, vocab_size = model.config.block_size, model.vocab_size
    chosen = spread_windows(count_windows(tokens, block_size), WINDOWS)
    inputs, targets = read_windows(tokens, chosen, block_size, vocab_size)
    losses = torch.cat(
        [
            functional.cross_entropy(model(rows).logits.flatten(0, 1), wanted.flatten(), reduction="none")
            for rows, wanted in zip(inputs.split(ROWS), targets.split(ROWS), strict=True)
        ]
    )
    return Losses(inputs, targets, losses.double().view_as(targets), vocab_size)


def by_frequency(of: Losses) -> list[float]:
    """The mean loss of each stratum, from frequent to rare."""
    targets = of.targets.flatten()
    return means(of.losses, strata_of(targets.bincount(minlength=of.vocab_size))[targets], STRATA)[0]


def by_context(of: Losses) -> dict[str, list[float]]:
    """The mean loss of each of `CONTEXTS`, and its share of the tokens."""
    contexts = [contexts_of(*rows) for rows in zip(of.inputs.split(ROWS), of.targets.split(ROWS), strict=True)]
    losses, shares = means(of.losses, torch.cat(contexts).flatten(), len(CONTEXTS))
    return {"losses": losses, "shares": shares}


def contexts_of(inputs: Tensor, targets: Tensor) -> Tensor:
    """The context of each target, a place in `CONTEXTS`: int64 [W, T]."""
    n_tokens = inputs.size(1)
    up_to = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()  # [place, earlier or the same place]
    alike = (inputs[:, :, None] == inputs[:, None, :]) & up_to.tril(-1)  # [W, T, T]
    last = (alike * torch.arange(n_tokens)).amax(dim=-1)  # 0 also if there is none
    copied = alike.any(dim=-1) & (targets.gather(1, last) == targets)
    seen = ((targets[:, :, None] == inputs[:, None, :]) & up_to).any(dim=-1)
    return torch.where(copied, 0, torch.where(seen, 1, 2))


def means(losses: Tensor, group: Tensor, n_groups: int) -> tuple[list[float], list[float]]:
    """The mean loss of each group of tokens, NaN for an empty one, and its share of all."""
    counts = group.bincount(minlength=n_groups)
    totals = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, group, losses.flatten())
    return (totals / counts).tolist(), (counts / len(group)).tolist()


def file_of(folder: Path, kind: str) -> Path:
    return folder / f"loss_{kind}.json"


def read(folder: Path) -> dict[str, Any]:
    """What of `KINDS` a run's folder has."""
    return {kind: json.loads(file.read_text()) for kind in KINDS if (file := file_of(folder, kind)).is_file()}


def of_group(kind: str, number: int) -> Callable[[dict[str, Any]], float | None]:
    """A record -> the loss of a group of tokens, None if it is not known."""

    def loss_of(record: dict[str, Any]) -> float | None:
        found = record.get(kind)
        losses = found["losses"] if isinstance(found, dict) else found
        return losses[number] if losses is not None else None

    return loss_of


def at_step(step: int, number: int) -> Callable[[dict[str, Any]], float | None]:
    """A record -> the loss of one of `CONTEXTS` after so many steps, None if it is not known."""

    def loss_of(record: dict[str, Any]) -> float | None:
        rows = record.get("context_over_steps", ())
        return next((losses[number] for at, *losses in rows if at == step), None)

    return loss_of


def main(folder: Path) -> None:
    """Raises UserError for a run without a checkpoint."""
    last = find(folder)
    earlier = [path for path in all_checkpoints(last.parent) if step_of(path) < step_of(last)]
    over_steps = []  # a row for every checkpoint that is kept: its step, the loss of each of CONTEXTS
    for path in [*earlier, last]:
        of = losses_of(path)
        over_steps.append([step_of(path), *by_context(of)["losses"]])
    for kind, found in zip(KINDS, (by_frequency(of), by_context(of), over_steps), strict=True):
        rounded = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 6))
        file_of(folder, kind).write_text(json.dumps(rounded))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
