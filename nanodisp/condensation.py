"""Measuring embedding condensation: how far the tokens of a sequence have turned into one cone.

    python -m nanodisp.condensation checkpoint=out/<run>
    python -m nanodisp.condensation checkpoint=hf:gpt2 text=book.txt      # needs nanodisp[eval]

The measure is the cosine similarity of all pairs of different tokens of a sequence, layer by layer,
from the embedding on: near 1 is condensed, near 0 is spread out. What else is told of a layer
says how many directions its tokens take up. Three ways of putting windows together:

- cosines (mean, standard deviation, histogram): pairs lie within a window, and the pairs of all
  windows count alike;
- the ratio of high to low frequencies belongs to a sequence: measured per window, then averaged;
- spectrum and covariance: of all tokens of all windows together, so that they are not bounded
  by the length of a window.

Windows come and go; what stays of them is a few sums per layer (`layer_sums.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp import arguments, checkpoint, distributed, hf
from nanodisp.errors import UserError, first_line, optional
from nanodisp.gpt import GPT
from nanodisp.layer_sums import LayerSums
from nanodisp.loader import count_windows, read_windows, spread_windows
from nanodisp.prepare import DataConfig, prepare
from nanodisp.shards import open_split
from nanodisp.tokenizer import load_tokenizer

LONGEST_BLOCK = 512  # tokens of a window unless told otherwise
TOKENS_AT_ONCE = 2048  # of a forward pass


def mean_cosine(z: Tensor) -> Tensor:
    """Mean over pairs i != j of cos(z_i, z_j), and over sequences: [B, N, F] -> float32 scalar.

    No N x N matrix is needed: sum_ij u_i . u_j = |sum_i u_i|^2. A zero token has cosine 0 with all.
    """
    u = nn.functional.normalize(z.float(), dim=-1)  # [B, N, F]
    n_tokens = z.size(1)
    all_pairs = u.sum(dim=1).square().sum(dim=-1)  # [B], the diagonal included
    diagonal = u.square().sum(dim=(1, 2))
    return ((all_pairs - diagonal) / (n_tokens * (n_tokens - 1))).mean()


def mean_cosine_by_layer(model: nn.Module, windows: Tensor) -> list[float]:
    """`mean_cosine` of every hidden state on int64 [B, T]: cheap enough to follow a training run with."""
    with torch.no_grad():
        return torch.stack([mean_cosine(z) for z in hidden_states(model, windows)]).tolist()


def trend(layer_means: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b of layer means against depth, the embedding being depth 0.

    1: every layer is more condensed than the one before; -1: less. NaN where they are all equal.
    """
    from scipy import stats  # here, because it takes a second and training does without

    if len(set(layer_means)) < 2:
        return math.nan, math.nan
    depth = range(len(layer_means))
    return float(stats.spearmanr(depth, layer_means).statistic), float(stats.kendalltau(depth, layer_means).statistic)


@dataclass(frozen=True)
class Condensation:
    """What was measured; arrays are float64 with a row per layer, [L + 1], hidden state 0 first.

    With X the tokens of a layer, [n_tokens, F], sigma its singular values and p = sigma / sum sigma:

    mean, std: of the cosine similarities.
    histogram: [L + 1, 128], their density over [-1, 1]; it integrates to 1.
    effective_rank: exp(entropy), Roy & Vetterli, "The effective rank" (2007).
    entropy: -sum p ln p, in nats.
    explained: sigma_1^2 / sum sigma^2, the largest explained variance (of X itself, not centred).
    frequency_ratio: |X - mean|_F / |mean part|_F along a window, high frequencies over frequency 0;
        Wang et al., "Anti-Oversmoothing in Deep Vision Transformers", arXiv 2203.05962.
    condition: largest over smallest eigenvalue of the tokens' covariance. Infinite where that is
        singular to the precision of the tokens: with no more of them than features, and after the
        last LayerNorm, whose outputs lie in a hyperplane.
    variance: [L + 1, F], the covariance's diagonal.
    """

    windows: int
    block: int
    include_diagonal: bool
    mean: np.ndarray
    std: np.ndarray
    histogram: np.ndarray
    effective_rank: np.ndarray
    entropy: np.ndarray
    explained: np.ndarray
    frequency_ratio: np.ndarray
    condition: np.ndarray
    variance: np.ndarray

    @property
    def mean_of_last(self) -> np.ndarray:
        """[L + 1]: entry n - 1 is the mean cosine over the last n layers."""
        return np.cumsum(self.mean[::-1]) / np.arange(1, len(self.mean) + 1)

    def save(self, folder: Path, source: str) -> None:
        """Write condensation.json (figures of a layer) and condensation.npz (those and the arrays) into `folder`."""
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in arrays.items() if value.ndim == 1}
        rho, tau = trend(self.mean.tolist())
        summary = {
            "source": source,
            "windows": self.windows,
            "block": self.block,
            "include_diagonal": self.include_diagonal,
            "spearman": rho,
            "kendall": tau,
            "mean_of_last": self.mean_of_last.tolist(),
            "layers": [
                {"layer": layer, **{name: value[layer] for name, value in scalars.items()}}
                for layer in range(len(self.mean))
            ],
        }
        summary = json.loads(json.dumps(summary), parse_constant=lambda name: None)  # JSON has no NaN, no infinity
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "condensation.json").write_text(json.dumps(summary, indent=2) + "\n")
            np.savez_compressed(folder / "condensation.npz", **arrays)
        except OSError as error:
            raise UserError(f"{folder} can not be written: {error}; choose another with out=…") from error

    def __str__(self) -> str:
        head = f"{'layer':>5} {'mean':>8} {'std':>8} {'eff. rank':>9} {'entropy':>8} {'explained':>9} {'high/low':>9}"
        lines = [f"{head} {'condition':>9} {'variance':>9}"]
        for row in range(len(self.mean)):
            lines.append(
                f"{row:5} {self.mean[row]:8.4f} {self.std[row]:8.4f} {self.effective_rank[row]:9.2f} "
                f"{self.entropy[row]:8.4f} {self.explained[row]:9.4f} {self.frequency_ratio[row]:9.4f} "
                f"{self.condition[row]:9.2e} {self.variance[row].mean():9.3g}"
            )
        rho, tau = trend(self.mean.tolist())
        last = ", ".join(f"{value:.4f}" for value in self.mean_of_last)
        lines += [f"mean against depth: rho {rho:.3f}, tau {tau:.3f}", f"mean of the last 1, 2, … layers: {last}"]
        return "\n".join(lines)


def measure(model: nn.Module, windows: Iterable[Tensor], *, include_diagonal: bool = False) -> Condensation:
    """Condensation of a model on `windows`, in memory that does not grow with their number.

    Args:
        model: anything that `hidden_states` understands; measured in eval mode, where its parameters lie.
        windows: int64 [B, T] each, or [T]; T the same for all, at least 2. One [W, T] will do.
        include_diagonal: count a token's cosine with itself too, as the PyPI package
            `embedding-condensation` does.

    On CUDA, cosines are as exact as torch.set_float32_matmul_precision lets them be.

    Raises ValueError without windows, or for windows of other lengths.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    layers: list[LayerSums] = []
    block = None
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for idx in windows:
                idx = idx.reshape(-1, idx.size(-1)).to(device)  # [B, T]
                if idx.size(1) < 2 or idx.size(1) != (block := block or idx.size(1)):
                    raise ValueError(f"a window of {idx.size(1)} tokens: all need the same length, at least 2")
                for depth, z in enumerate(hidden_states(model, idx)):
                    if depth == len(layers):
                        layers.append(LayerSums(z.size(-1), device, include_diagonal))
                    layers[depth].add(z)
    finally:
        model.train(was_training)
    if block is None:
        raise ValueError("there are no windows to measure on")
    rows = [layer.finish() for layer in layers]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Condensation(windows=layers[0].windows, block=block, include_diagonal=include_diagonal, **stacked)


def hidden_states(model: nn.Module, idx: Tensor) -> Iterable[Tensor]:
    """The hidden states [B, T, F] of int64 [B, T], embedding first.

    `model` is ours; or one of transformers'; or gives, for `model(idx)`, a tuple or list of them or
    something that has it as `hidden` or `hidden_states`. Raises TypeError for anything else.
    """
    if isinstance(model, GPT):
        return model(idx, return_hidden=True, head=False).hidden
    headless: Any = getattr(model, "base_model", None)  # transformers' name for a model without its head
    output = model(idx) if headless is None else headless(idx, output_hidden_states=True)
    states = next((s for name in ("hidden_states", "hidden") if (s := getattr(output, name, None)) is not None), output)
    if not isinstance(states, (tuple, list)):
        raise TypeError(f"{type(model).__name__} returns {type(output).__name__}, which has no hidden states")
    return states


# --- the command line ------------------------------------------------------------------


@dataclass
class CondensationConfig:
    """What to measure, and on what.

    checkpoint: a run's folder (its newest checkpoint), one checkpoint's, a Hugging Face folder, or hf:<id>.
    windows, block: how many windows of how many tokens, spread evenly over the text; block null
        takes the model's context, 512 at most.
    data, text: a folder of shards (its validation split) or a text file; null takes the data of the run.
    include_diagonal: see `measure`.
    projection: how a window's tokens are drawn in the plane: pca, tsne or umap (where installed).
    out: the folder to write to; null takes the run's, or out/<model>.
    """

    checkpoint: str = arguments.MISSING
    windows: int = 100
    block: int | None = None
    data: str | None = None
    text: str | None = None
    include_diagonal: bool = False
    projection: str = "pca"
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1")
        if self.block is not None and self.block < 2:
            raise ValueError(f"block={self.block}: a pair needs 2 tokens; null takes the model's context")
        if self.data is not None and self.text is not None:
            raise ValueError("data and text are both given: keep one")


@dataclass
class Subject:
    """A model, and what belongs to it: its context, its vocabulary, how to encode text, its data, its folder."""

    model: nn.Module
    context: int
    vocab_size: int
    encode: Any  # str -> int64 [n], made when it is called
    data: DataConfig | None
    folder: Path


def main(argv: Sequence[str]) -> None:
    from nanodisp import figures  # here, because train.py imports this module and draws nothing

    config = arguments.parse(CondensationConfig, argv)
    if config.projection not in figures.PROJECTIONS:
        raise UserError(f"projection={config.projection} is unknown; choose one of {', '.join(figures.PROJECTIONS)}")
    device = distributed.start(config.device).device
    subject = open_checkpoint(config.checkpoint)
    model = subject.model.to(device).eval()
    batches = list(open_windows(config, subject))
    result = measure(model, batches, include_diagonal=config.include_diagonal)
    folder = Path(config.out) if config.out else subject.folder
    result.save(folder, config.checkpoint)
    print(result)

    with torch.inference_mode():
        states = [z[0].float().cpu().numpy() for z in hidden_states(model, batches[0][:1].to(device))]
    chosen = sorted({round(fraction * (len(states) - 1)) for fraction in (0, 1 / 3, 2 / 3, 1)})
    tokens = {f"layer {layer}": states[layer] for layer in chosen}
    drawn = [
        *figures.save(figures.density({config.checkpoint: result.histogram}), folder / "figures" / "condensation"),
        *figures.save(figures.projection(tokens, config.projection), folder / "figures" / "tokens"),
    ]
    print("wrote", *(folder / f"condensation{end}" for end in (".json", ".npz")), *drawn)


def open_checkpoint(name: str) -> Subject:
    """One of our checkpoints, or a Hugging Face model; raises UserError for neither."""
    path = Path(name)
    if name.startswith("hf:") or (path / "config.json").is_file():
        return open_hugging_face(name.removeprefix("hf:"))
    saved = checkpoint.load(checkpoint.find(path))
    model, spec = hf.build(hf.read_checkpoint(saved)), hf.spec_of(saved)
    data = None
    if saved.state["corpus"] is not None:
        data = DataConfig(**{**saved.state["config"]["data"], "tokenizer": spec})
    encode = lambda text: load_tokenizer(spec).encode(text)  # noqa: E731
    return Subject(model, model.config.block_size, model.vocab_size, encode, data, saved.path.parent.parent)


def open_hugging_face(name: str) -> Subject:
    """Any model of transformers, without its head, in float32: a folder, or an id on the hub.

    Raises UserError when transformers is missing, or the model is not there or not in safetensors.
    """
    transformers = optional("transformers")
    try:
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).float()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} can not be loaded: " + first_line(error)) from error

    def encode(text: str) -> np.ndarray:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return np.asarray(tokenizer(text).input_ids, dtype=np.int64)

    context = getattr(model.config, "max_position_embeddings", LONGEST_BLOCK)
    return Subject(model, context, model.config.vocab_size, encode, None, hf.folder_of(name))


def open_windows(config: CondensationConfig, subject: Subject) -> Iterator[Tensor]:
    """The windows as batches int64 [B, T]; raises UserError when there is nothing to make them from."""
    block = config.block or min(subject.context, LONGEST_BLOCK)
    if block > subject.context:
        raise UserError(f"block={block} is longer than the model's context of {subject.context} tokens")
    rows = max(1, TOKENS_AT_ONCE // block)
    if config.text is not None:
        try:
            ids = torch.from_numpy(subject.encode(Path(config.text).read_text(errors="replace")).astype(np.int64))
        except OSError as error:
            raise UserError(f"text={config.text} can not be read: {error.strerror}") from error
        if len(ids) < block:
            raise UserError(f"text={config.text} has {len(ids)} tokens: block={block} needs more, or a smaller block")
        chosen = spread_windows(len(ids) // block, config.windows)
        yield from ids[: len(ids) // block * block].view(-1, block)[chosen].split(rows)
        return
    if config.data is None and subject.data is None:
        raise UserError("a model from Hugging Face brings no data: give text=<file> or data=<folder of its shards>")
    data = subject.data if config.data is None else dataclasses.replace(DataConfig(), name="shards", path=config.data)
    assert data is not None
    tokens = open_split(prepare(data), "val")
    chosen = spread_windows(count_windows(tokens, block), config.windows)
    for start in range(0, len(chosen), rows):
        yield read_windows(tokens, chosen[start : start + rows], block, subject.vocab_size)[0]


if __name__ == "__main__":
    arguments.run(main)
