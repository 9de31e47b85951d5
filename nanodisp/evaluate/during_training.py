"""Benchmarks at the validations of a run: `train.eval_tasks`, scored as `nanodisp.evaluate` scores them.

The harness is imported only when a run has such tasks.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from nanodisp.config import Config, TrainConfig
from nanodisp.data.benchmarks import read_items
from nanodisp.data.tokenizer import Tokenizer
from nanodisp.distributed import World
from nanodisp.errors import UserError, optional
from nanodisp.hf.open import load_fitting
from nanodisp.models.gpt import GPT

TOKENS_AT_ONCE = 4096  # of a forward pass


def check_benchmarks(config: TrainConfig) -> None:
    """Raises UserError where a run would, once it has prepared its data: without the harness, and for a wrong file."""
    if config.eval_tasks:
        optional("lm_eval")
        for name in config.eval_tasks:
            read_items(name, Path(str(config.eval_task_data)))


class Benchmarks:
    """The benchmarks of a run, read once; all ranks call it, and share the texts.

    Args:
        config: of the run, resolved.
        world: the ranks.
        autocast: makes the context of a forward pass.

    Raises UserError without the harness, a file, or the tokenizer of the run's tokens.
    """

    def __init__(self, config: Config, world: World, autocast: Callable[[], AbstractContextManager]) -> None:
        optional("lm_eval")
        from nanodisp.evaluate.tasks import load

        self.world, self.autocast, self.limit = world, autocast, config.train.eval_task_limit
        self.tokenizer = tokenizer_of(config)
        self.loaded = {name: load(None, name, config.train.eval_task_data) for name in config.train.eval_tasks}

    def __call__(self, model: GPT) -> dict[str, float]:
        """{"<task>/<metric>": value}; NaN where the model's weights have diverged."""
        from nanodisp.evaluate.harness import HarnessModel
        from nanodisp.evaluate.results import entries
        from nanodisp.evaluate.tasks import score

        batch_size = max(1, TOKENS_AT_ONCE // model.config.block_size)
        scored = HarnessModel(model, self.tokenizer, batch_size, self.world, invalid=True)
        figures: dict[str, float] = {}
        for name, loaded in self.loaded.items():
            with self.autocast(), contextlib.redirect_stderr(io.StringIO()):  # its progress lines
                results = score(scored, loaded, limit=self.limit, shots=0, seed=0, quick=True)
            for metric, figure in dict(entries(results))[name]["metrics"].items():
                figures[f"{name}/{metric}"] = math.nan if figure["value"] is None else figure["value"]
        return figures


def tokenizer_of(config: Config) -> Tokenizer:
    try:
        return load_fitting(str(config.data.tokenizer), config.model)
    except UserError as error:
        raise UserError(f"train.eval_tasks needs the tokenizer of the run's tokens: {error}") from error
