"""Tasks of lm-evaluation-harness, its own and those of local files, and their figures for a model.

Imported only where benchmarks are run, because the harness is an optional package.
"""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks.wikitext import preprocess_wikitext

from nanodisp.data.benchmarks import BENCHMARKS, Item, read_items
from nanodisp.errors import UserError, one_line, optional
from nanodisp.evaluate.text_tasks import TASKS as OF_TEXTS

DESCRIPTIONS = Path(__file__).with_name("tasks.yaml")
BOOTSTRAPS = 1000  # resamples for the standard errors of metrics that are no means
logging.getLogger("lm_eval.evaluator_utils").setLevel(logging.ERROR)  # it warns that a field of BLiMP is not all of it


def find_tasks(names: Iterable[str], folder: str | None, data: str | None = None) -> Any:
    """The harness's `TaskManager` that knows these tasks, or None where `data` has all; UserError for an unknown name.

    Args:
        folder: of YAML files in the harness's format.
        data: of local files, whose benchmarks need no manager.

    Listing the harness's own tasks takes seconds, so it is done only if `folder` does not have all of the tasks.
    """
    tasks = optional("lm_eval.tasks")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"task_folder={folder} is not a folder: give a folder of YAML files in the harness's format")
    names = [name for name in names if data is None or name not in BENCHMARKS]
    if not names:
        return None
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = tasks.TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            known = [*OF_TEXTS, *manager.all_tasks, *(BENCHMARKS if data else ())]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all names"
            raise UserError(f"tasks={name} is unknown; {hint}")
    return manager


def load(manager: Any, name: str, data: str | None = None) -> dict[str, Any]:
    """{"tasks", "groups", …} of a task, group or tag, with its data, for `score`; UserError if it cannot be loaded."""
    if data is not None and name in BENCHMARKS:
        return {"tasks": {name: FileTask(name, read_items(name, Path(data)))}, "groups": {}, "group_map": {}}
    try:
        return manager.load([name])
    except Exception as error:  # of many classes, from the harness, three libraries and the network
        hint = "; task_data=<folder> reads it from files" if data is None and name in BENCHMARKS else ""
        of_where = "from the hub or a local file"
        raise UserError(f"task {name} cannot be loaded, or its data, {of_where}: {one_line(error)}{hint}") from error


def settings_of(name: str) -> dict[str, Any]:
    """A task of `tasks.yaml`."""
    return yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))[name]


class FileTask(ConfigurableTask):
    """A task of `tasks.yaml` on these items."""

    def __init__(self, name: str, items: list[Item]) -> None:
        self.items = items
        # examples are other items of the file: the harness leaves the question itself out if both have one split
        super().__init__(config={"task": name, "fewshot_split": "test", **settings_of(name), **CODE.get(name, {})})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.dataset = {"test": datasets.Dataset.from_list(self.items)}


def _blimp(item: Item, results: list[tuple[float, bool]]) -> dict[str, float]:
    (good, _), (bad, _) = results
    return {"acc": float(good > bad), f"acc_{item['field']}": float(good > bad)}


def _truthfulqa_mc2(item: Item, results: list[tuple[float, bool]]) -> dict[str, float]:
    """The probability of the correct answers among all."""
    totals = np.array([total for total, _ in results])
    shares = np.exp(totals - totals.max())
    return {"acc": float(shares[: item["n_right"]].sum() / shares.sum())}


def _wikitext(item: Item, results: list[float]) -> dict[str, tuple[float, int]]:
    """As the harness: of the text without WikiText's spacing, by words and bytes of the text with it."""
    figures = preprocess_wikitext.process_results(item, results)
    return {name: figures[name] for name in ("bits_per_byte", "word_perplexity")}


# What tasks.yaml cannot say.
CODE: dict[str, dict[str, Any]] = {
    "blimp": {"process_results": _blimp},
    "truthfulqa_mc2": {"process_results": _truthfulqa_mc2},
    "wikitext": {"process_results": _wikitext, "doc_to_target": preprocess_wikitext.wikitext_detokenizer},
}


def score(
    model: Any, loaded: dict[str, Any], *, limit: int | None, shots: int | None, seed: int, quick: bool = False
) -> dict[str, Any]:
    """The harness's results of what `load` returned: its `simple_evaluate` without a look at the machine.

    Args:
        model: an LM of the harness.
        limit: the first so many items of each task; None for all.
        shots: examples before each question, for tasks that do not rule them out; None is each task's own number.
        seed: of everything that the harness draws. `quick` draws nothing.
        quick: leave out standard errors and the items ("samples"), and do not touch random numbers: for training.
    """
    if not quick:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=seed)
    return evaluate(
        lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0 if quick else BOOTSTRAPS, log_samples=not quick
    )
