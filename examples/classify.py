"""A linear classifier of texts on a model's embeddings, from a few labelled examples.

    python examples/classify.py checkpoint=out/<run> labelled=<folder> texts=<file>

`labelled` is a folder with a file for each class, named by it, with a text in each line; ten of each class are a start.
Prints the class of each line of `texts`, and the probability that the classifier gives it. `checkpoint` is a run, a
Hugging Face folder or hf:<id>. Needs `pip install 'nanodisp[eval]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodisp import cli
from nanodisp.data.decode import read_whole
from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import embed, is_empty, open_embedder
from nanodisp.evaluate.probes import make_classifier, probe, read_classes


@dataclass
class ClassifyConfig:
    """What to learn from, and what to classify.

    checkpoint: the model.
    labelled: a folder with a file for each class, a text in each line.
    texts: a file with a text in each line.
    layer: the index of a hidden state; -1 is the last.
    pooling: mean, last or weighted.
    seed: of the folds by which the accuracy is estimated.
    """

    checkpoint: str = cli.MISSING
    labelled: str = cli.MISSING
    texts: str = cli.MISSING
    layer: int = -1
    pooling: str = "mean"
    seed: int = 1


def main(argv: Sequence[str]) -> None:
    config = cli.parse(ClassifyConfig, argv)
    if not Path(config.labelled).is_dir():
        raise UserError(f"labelled={config.labelled} is not a folder: give one with a file for each class")
    data = read_classes(Path(config.labelled))
    texts = [line for line in read_whole(Path(config.texts), f"texts={config.texts}").split("\n") if not is_empty(line)]
    if not texts:
        raise UserError(f"texts={config.texts} has no line to classify")
    classifier = make_classifier()
    embedder = open_embedder(config.checkpoint)
    options: Any = {"layers": [config.layer], "poolings": [config.pooling]}
    known = embed(embedder, data.texts, **options).vectors[0, 0]  # [n, F]
    unknown = embed(embedder, texts, **options).vectors[0, 0]
    folds = probe(known[None], data.labels, config.seed)
    print(f"accuracy in five folds of the labelled texts: {folds.mean():.4f}, deviation {folds.std(ddof=1):.4f}")
    classifier.fit(known.numpy(), data.labels)
    for text, probabilities in zip(texts, classifier.predict_proba(unknown.numpy()), strict=True):
        print(f"{data.names[probabilities.argmax()]}  {probabilities.max():.4f}  {text}")


if __name__ == "__main__":
    cli.run(main, ClassifyConfig)
