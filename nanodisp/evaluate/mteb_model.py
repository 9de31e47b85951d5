"""A model for the mteb package (version 2), which has hundreds of tasks and downloads their data.

    import mteb
    mteb.evaluate(MtebModel(open_embedder("out/<run>")), mteb.get_task("STS12"), cache=None)

Imported only for tasks=mteb:<name>, because mteb is an optional package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodisp.errors import UserError, one_line, optional
from nanodisp.evaluate.embeddings import Embedder, embed, is_empty
from nanodisp.evaluate.grid import VERSION, unit
from nanodisp.files import finite


class MtebModel:
    """mteb's `EncoderProtocol`: texts to raw vectors of one layer and pooling; their similarity is the cosine.

    layer: the index of a hidden state; -1 is the last.
    pooling: a name of `embeddings.POOLINGS`.
    n_texts: how many have been embedded.
    """

    def __init__(self, embedder: Embedder, layer: int = -1, pooling: str = "mean") -> None:
        self.embedder, self.layer, self.pooling, self.n_texts = embedder, layer, pooling, 0
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in embedder.subject.name)
        meta = optional("mteb.models.model_meta", "mteb").ModelMeta
        self.mteb_model_meta = meta.create_empty({"name": f"nanodisp/{name}", "revision": "1"})

    def encode(self, inputs: Iterable[dict[str, Any]], **options: Any) -> np.ndarray:
        """float32 [n_texts, F] of the texts in batches {"text": [...]}; an empty text is a vector of zeros."""
        texts = [text for batch in inputs for text in batch["text"]]
        self.n_texts += len(texts)
        full = [i for i, text in enumerate(texts) if not is_empty(text)]
        found = embed(self.embedder, [texts[i] for i in full], layers=[self.layer], poolings=[self.pooling]).vectors
        vectors = torch.zeros(len(texts), found.size(-1))
        vectors[full] = found[0, 0]
        return vectors.numpy()

    def similarity(self, first: Any, second: Any) -> Tensor:
        """[n, F], [m, F] -> [n, m]."""
        return unit(torch.as_tensor(first).float()) @ unit(torch.as_tensor(second).float()).T

    def similarity_pairwise(self, first: Any, second: Any) -> Tensor:
        """[n, F], [n, F] -> [n]."""
        return (unit(torch.as_tensor(first).float()) * unit(torch.as_tensor(second).float())).sum(dim=-1)


def evaluate_task(name: str, embedder: Embedder) -> tuple[str, dict[str, Any], str]:
    """Run a task of mteb: its name here, its entry in evaluation.json without the seed, and a line for the reader.

    Raises UserError without the package, for an unknown task, or if it cannot be run, without a network for example.
    """
    mteb = optional("mteb", "mteb")
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        known = [each.metadata.name for each in mteb.get_tasks()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "mteb.get_tasks() lists all names"
        raise UserError(f"tasks=mteb:{name} is unknown to mteb; {hint}") from error
    model = MtebModel(embedder)
    try:
        scores = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results[0]
        main = float(scores.get_score())
    except UserError:
        raise
    except Exception as error:  # of many classes, from mteb, its libraries and the network
        raise UserError(
            f"task mteb:{name} cannot be run, or its data not be loaded from the hub: {one_line(error)}"
        ) from error
    metric = task.metadata.main_score
    found = {
        "metrics": {metric: {"value": finite(main), "stderr": None, "higher_is_better": True}},
        "shots": 0,
        "examples": model.n_texts,
        "version": VERSION,
        "notes": [f"mteb {mteb.__version__}, last layer, mean pooling, raw"],
    }
    return f"mteb_{name}", found, f"mteb_{name}: {metric} {main:.4f}; last layer, mean pooling, raw"
