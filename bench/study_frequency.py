"""Which tokens does dispersion predict better? The validation loss by the frequency of the predicted token.

    python -m bench.study_frequency out/study/<run>    # into the run's folder; `bench.study evaluate` does it for all

The predicted tokens are cut into four strata by how often they occur, each a quarter of the text (`strata_of`), so that
the mean over the strata is about the validation loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

from nanodisp.condensation.sums import STRATA, strata_of
from nanodisp.data.batches import count_windows, read_windows, spread_windows
from nanodisp.data.shards import open_split
from nanodisp.hf.corpus import folder_of_data
from nanodisp.hf.open import open_for_measuring
from nanodisp.models.gpt import GPT

FILE = "loss_by_frequency.json"  # in a run's folder
WINDOWS = 1024  # as many as the study's runs are validated on: the same ones
ROWS = 8  # windows of a forward pass


@torch.no_grad()
def losses_by_frequency(folder: Path) -> list[float]:
    """Mean cross-entropy, nats per token, of a run's last checkpoint by stratum, from frequent to rare.

    Raises UserError without a checkpoint or the run's data.
    """
    subject = open_for_measuring(str(folder))
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
    ).double()
    stratum = strata_of(targets.flatten().bincount(minlength=vocab_size))[targets.flatten()]
    totals = torch.zeros(STRATA, dtype=torch.float64).index_add_(0, stratum, losses)
    return (totals / stratum.bincount(minlength=STRATA)).tolist()


def read(folder: Path) -> list[float] | None:
    """Of a run's folder; None if it has not been measured."""
    return json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else None


if __name__ == "__main__":
    run = Path(sys.argv[1])
    (run / FILE).write_text(json.dumps([round(value, 6) for value in losses_by_frequency(run)]))
