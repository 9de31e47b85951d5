"""The observation of arXiv 2602.00217 for any models: a table and its heatmaps, beside the paper's own figures.

The paper's setting: 100 texts, the first 512 tokens of each, all hidden states from the embedding to the last layer, a
token's cosine with itself included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from nanodisp import cli
from nanodisp.condensation import figures
from nanodisp.condensation.cosine import trend
from nanodisp.condensation.measure import hidden_states, sum_layers
from nanodisp.condensation.sums import BINS, CosineSums, count_bins
from nanodisp.condensation.windows import block_of, first_tokens, open_windows, read_texts
from nanodisp.data.shards import Manifest
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.distributed import start
from nanodisp.errors import UserError, first_line
from nanodisp.files import finite, written_into
from nanodisp.hf.open import Measurable, is_hugging_face, open_for_measuring
from nanodisp.models.gpt import GPT, GPTConfig

# Spearman's rho and Kendall's tau of the mean cosine against depth, arXiv 2602.00217; by the end of the id on the hub.
PAPER = {
    "gpt2": (0.38, 0.26),
    "gpt2-medium": (-0.06, -0.06),
    "gpt2-large": (0.12, 0.04),
    "gpt2-xl": (-0.59, -0.56),
    "qwen2.5-0.5b": (0.95, 0.85),
    "qwen2.5-1.5b": (0.99, 0.94),
    "qwen2.5-3b": (0.87, 0.75),
    "qwen2.5-7b": (0.66, 0.57),
    "qwen2.5-14b": (0.35, 0.28),
    "qwen2.5-32b": (0.12, 0.11),
    "qwen2.5-72b": (-0.24, -0.14),
    "bloom-560m": (1.0, 1.0),
    "bloom-1b1": (0.99, 0.96),
    "bloom-1b7": (0.52, 0.35),
    "bloom-3b": (0.32, 0.21),
    "bloom-7b1": (-0.43, -0.43),
    "qwen3-0.6b": (0.90, 0.77),
    "qwen3-1.7b": (0.76, 0.61),
    "qwen3-4b": (0.79, 0.64),
    "qwen3-8b": (0.58, 0.48),
    "qwen3-14b": (0.38, 0.33),
    "qwen3-32b": (-0.46, -0.34),
}
MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"
INITIAL = "init:"
NOTHING = "\N{EN DASH}"


@dataclass
class CompareConfig:
    """Keys of `compare`.

    checkpoint: models, separated by commas: as for a single model, or init:<name of a file in conf/model>, which is one
        of ours with random weights.
    texts, block: number of texts and of the first tokens of each; block null is the model's context, at most 512.
    text: a jsonl or parquet file of texts or a folder of these, or a plain text file, which is begun at places at
        equal distances: the same texts for all models.
    data: a folder of shards of the tokenizer of all models, instead: windows of its validation split. Without both,
        a run is measured on its own.
    include_diagonal: whether a token's cosine with itself counts, as in the paper.
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, for init:… and for
        runs whose own is not available.
    seed: of the random weights.
    device: "auto", "cpu" or "cuda".
    out: the folder to write to.
    """

    checkpoint: str = cli.MISSING
    texts: int = 100
    block: int | None = None
    text: str | None = None
    data: str | None = None
    include_diagonal: bool = True
    tokenizer: str | None = None
    seed: int = 0
    device: str = "auto"
    out: str = "out/compare"

    def __post_init__(self) -> None:
        if self.texts < 1:
            raise ValueError(f"texts={self.texts} must be at least 1")
        if self.block is not None and self.block < 2:
            raise ValueError(f"block={self.block}: a pair needs 2 tokens; null is the model's context")
        if self.data is not None and self.text is not None:
            raise ValueError("data and text are both given: give one of them")
        names = self.names()
        if "" in names or len(set(names)) < len(names):
            raise ValueError(
                f"checkpoint={self.checkpoint} names no model, or one twice: give them with commas between"
            )

    def names(self) -> list[str]:
        return [name.strip() for name in self.checkpoint.split(",")]


@dataclass(frozen=True)
class Compared:
    """One model's results.

    rho, tau: Spearman's and Kendall's correlation of the mean cosine with depth, the embedding being depth 0.
    mean: [L + 1], the mean cosine.
    averaged, histogram: [L + 1, 128], densities over [-1, 1]: of the windows' matrix of cosines averaged position by
        position, and of the cosines of all pairs.
    paper: rho and tau in the paper, or None.
    """

    name: str
    parameters: int
    windows: int
    block: int
    rho: float
    tau: float
    mean: np.ndarray
    averaged: np.ndarray
    histogram: np.ndarray
    paper: tuple[float, float] | None = None

    def summary(self) -> dict[str, Any]:
        """What compare.json has of it."""
        return {key: value for key, value in asdict(self).items() if key not in ("averaged", "histogram")} | {
            "mean": self.mean.tolist(),
            "difference": None if self.paper is None else [self.rho - self.paper[0], self.tau - self.paper[1]],
        }


def main(argv: Sequence[str]) -> None:
    config = cli.parse(CompareConfig, argv)
    device, folder = start(config.device).device, Path(config.out)
    with written_into(folder):  # before the measurements, which may take long
        pass
    found: list[Compared] = []
    failed: list[str] = []
    for name in config.names():
        try:
            found.append(compare(name, config, device))
            print(f"{name}: rho {number(found[-1].rho)}, tau {number(found[-1].tau)}", flush=True)
        except UserError as error:  # the others are measured all the same
            failed.append(f"{name}: {first_line(error)}")
    if not found:
        raise UserError("; ".join(failed))
    drawn = save(found, folder, config)
    print("", table(found), "", sep="\n")
    print("wrote", folder / "compare.json", folder / "compare.npz", *drawn)
    if failed:
        raise UserError(f"{len(failed)} of {len(config.names())} models could not be measured: {'; '.join(failed)}")


def compare(name: str, config: CompareConfig, device: torch.device) -> Compared:
    """Measure one model, which is in memory only meanwhile."""
    if name.startswith(INITIAL):
        subject = open_initial(name, config)
    else:
        subject = open_for_measuring(name, None if is_hugging_face(name) else config.tokenizer)
    block = block_of(subject, config.block)
    if config.text is not None:
        windows = first_tokens(subject, read_texts(Path(config.text), config.texts, block), block)
    else:
        windows = open_windows(subject, None, config.data, config.texts, block)
    model = subject.model.to(device).eval()

    def read() -> Iterator[tuple[Tensor | None, Any]]:
        for idx in windows:
            yield idx, hidden_states(model, idx.to(device))

    with torch.inference_mode():
        layers = sum_layers(read(), lambda depth, z: CosineSums(z.device, config.include_diagonal, z.size(1)))
    rows = [layer.finish() for layer in layers]
    mean = np.array([row["mean"] for row in rows])
    rho, tau = trend(mean.tolist())
    return Compared(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        windows=layers[0].windows,
        block=block,
        rho=rho,
        tau=tau,
        mean=mean,
        averaged=np.stack([averaged(layer) for layer in layers]),
        histogram=np.stack([row["histogram"] for row in rows]),
        paper=in_the_paper(name),
    )


def averaged(layer: CosineSums) -> np.ndarray:
    """Density of the windows' mean matrix of cosines, [128]."""
    matrix = layer.matrix / layer.windows
    if not layer.include_diagonal:
        matrix = matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]
    return count_bins(matrix).cpu().numpy() / matrix.numel() * (BINS / 2)


def in_the_paper(name: str) -> tuple[float, float] | None:
    """Rho and tau of a Hugging Face model, by the last part of its name."""
    return PAPER.get(name.rstrip("/").rpartition("/")[2].removeprefix("hf:").lower()) if is_hugging_face(name) else None


def open_initial(name: str, config: CompareConfig) -> Measurable:
    """A model of conf/model/<name>.yaml with random weights, of the vocabulary of the data or of the tokenizer."""
    file, known = MODELS / f"{name.removeprefix(INITIAL)}.yaml", sorted(path.stem for path in MODELS.glob("*.yaml"))
    if not known:
        raise UserError(f"{name} needs conf/model, which is in the clone and not in the installed package")
    if file.stem not in known:
        raise UserError(f"{name} is unknown; choose one of {', '.join(known)}")
    shape: Any = OmegaConf.to_container(OmegaConf.load(file)) or {}
    spec = config.tokenizer or "gpt2"

    def encode(text: str) -> np.ndarray:
        return load_tokenizer(spec).encode(text).astype(np.int64)

    if config.data is not None:
        vocab_size = Manifest.load(Path(config.data)).vocab_size
    else:
        vocab_size = load_tokenizer(spec).vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(**shape, vocab_size=vocab_size))
    return Measurable(name, model, model.config.block_size, model.vocab_size, encode, Path(config.out))


# --- what is written -------------------------------------------------------------------------


def table(found: Sequence[Compared]) -> str:
    """A line per model; the last columns are the paper's figures and the differences from them."""
    heads = ("model", "parameters", "layers", "texts", "tokens", "rho", "tau", "last layer", "paper", "difference")
    rows = [heads]
    for each in found:
        counts = (each.name, f"{each.parameters:,}", str(len(each.mean) - 1), str(each.windows), str(each.block))
        figures_ = (number(each.rho), number(each.tau), f"{each.mean[-1]:.4f}")
        paper = difference = NOTHING
        if each.paper is not None:
            paper = " / ".join(map(number, each.paper))
            difference = f"{number(each.rho - each.paper[0], '+')} / {number(each.tau - each.paper[1], '+')}"
        rows.append((*counts, *figures_, paper, difference))
    widths = [max(12, *map(len, column)) if head == "model" else max(map(len, column))
              for head, column in zip(heads, zip(*rows, strict=True), strict=True)]  # fmt: skip
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def number(value: float, sign: str = "") -> str:
    return NOTHING if math.isnan(value) else format(value, f"{sign}.2f")


def save(found: Sequence[Compared], folder: Path, config: CompareConfig) -> list[Path]:
    """Write compare.json, compare.npz ("0/mean" is of the JSON's first model) and the figures; returns these files."""
    setting = {
        "texts": config.texts,
        "include_diagonal": config.include_diagonal,
        "source_of_paper": "arXiv 2602.00217",
    }
    content = {**setting, "models": [each.summary() for each in found]}
    kept = ("mean", "averaged", "histogram")
    arrays = {f"{place}/{key}": getattr(each, key) for place, each in enumerate(found) for key in kept}
    with written_into(folder):
        (folder / "compare.json").write_text(json.dumps(finite(content), indent=2) + "\n")
        np.savez_compressed(folder / "compare.npz", **arrays)
    views = {each.name: (each.averaged, each.histogram) for each in found}
    lines = {each.name: each.mean[None] for each in found}
    return [
        *figures.save(figures.two_views(views), folder / "figures" / "heatmaps"),
        *figures.save(figures.mean_by_layer(lines), folder / "figures" / "layers"),
    ]
