"""All figures of a model's condensation: how far the tokens of a sequence have collapsed into one cone.

The measure is the cosine similarity of all pairs of different tokens of a sequence, layer by layer,
from the embedding on: near 1 is condensed, near 0 is spread out. The other figures of a layer
say how many directions its tokens occupy. Windows are combined in three ways:

- cosines (mean, standard deviation, histogram): pairs within a window, and the pairs of all
  windows have equal weight;
- the ratio of high to low frequencies is a property of a sequence: measured per window, then averaged;
- spectrum, covariance and kurtosis: of all tokens of all windows together, so that they are not bounded
  by the length of a window.

Hidden states are not kept in memory, only a few sums per layer (`sums.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.condensation.cosine import trend
from nanodisp.condensation.sums import STRATA, CosineSums, LayerSums, SecondSums, strata_of
from nanodisp.errors import UserError
from nanodisp.files import finite, written_into

S = TypeVar("S", CosineSums, LayerSums, SecondSums)


@dataclass(frozen=True)
class Condensation:
    """The results; arrays are float64 with a row per layer, [L + 1], hidden state 0 first.

    Cosines are of pairs of different tokens of a window, unless another pair is named:

    mean, std: of the cosine similarities; with `include_diagonal` also those of a token with itself.
    histogram: [L + 1, 128], their density over [-1, 1]; it integrates to 1.
    cosine_centred: mean after the mean of all tokens is subtracted from each: what a common vector does not explain.
    cosine_across: mean over pairs of tokens of two different windows, the baseline of Ethayarajh, arXiv 1909.00512. NaN
        for one window.
    cosine_without_first: mean without each window's first token, where attention sinks are (arXiv 2309.17453).
    cosine_without_largest: mean without the dimensions, `without_largest` of them, with the largest mean squares, which
        can make cosines alone: Timkey and van Schijndel, arXiv 2109.04404.
    cosine_by_frequency: [L + 1, 4], mean over pairs of two different entries of the vocabulary of one stratum: the
        frequent ones that make up a quarter of the text come first. NaN without a pair.

    With X the tokens of a layer, [n_tokens, F], sigma its singular values and p = sigma / sum sigma:

    effective_rank: exp(entropy), Roy & Vetterli, "The effective rank" (2007).
    entropy: -sum p ln p, in nats.
    explained: sigma_1^2 / sum sigma^2, the largest explained variance (of X itself, not centred).
    frequency_ratio: |X - mean|_F / |mean part|_F along a window, high frequencies over frequency 0;
        Wang et al., "Anti-Oversmoothing in Deep Vision Transformers", arXiv 2203.05962.
    kurtosis: of all values of X, their fourth central moment over their squared variance: 3 for a Gaussian, more with
        outliers, which make the steps of quantization coarse; Chmiel et al., arXiv 2002.07686.
    kurtosis_by_dimension: [L + 1, F], the same of each column of X; NaN for a constant one.
    outlier: the largest |x| over the median of |x| (of each window, averaged).

    With l the F eigenvalues of the tokens' covariance (`isotropy.py` has the formulas and where they are from):

    centred_rank: effective rank of X without its mean.
    participation: (sum l)^2 / sum l^2, the participation ratio, 1 to F.
    isoscore: (participation - 1) / (F - 1), 0 for a line and 1 for an isotropic Gaussian; with n_tokens as few as F, at
        most about a half of that. arXiv 2108.07344.
    isoscore_star: IsoScore with shrinkage, of each window's tokens and then averaged; arXiv 2305.19358.
    nesum: sum l / l_1.
    spectrum_slope: alpha of l_i ~ i^-alpha.
    condition: largest over smallest eigenvalue of the tokens' covariance. Infinite if that is
        singular to the precision of the tokens: with at most as many tokens as features, and after
        the last LayerNorm, whose outputs are in a hyperplane.
    variance: [L + 1, F], the covariance's diagonal.
    """

    windows: int
    block: int
    include_diagonal: bool
    without: int
    without_largest: int
    mean: np.ndarray
    std: np.ndarray
    histogram: np.ndarray
    cosine_centred: np.ndarray
    cosine_across: np.ndarray
    cosine_without_first: np.ndarray
    cosine_without_largest: np.ndarray
    cosine_by_frequency: np.ndarray
    effective_rank: np.ndarray
    entropy: np.ndarray
    centred_rank: np.ndarray
    participation: np.ndarray
    isoscore: np.ndarray
    isoscore_star: np.ndarray
    nesum: np.ndarray
    spectrum_slope: np.ndarray
    explained: np.ndarray
    frequency_ratio: np.ndarray
    condition: np.ndarray
    variance: np.ndarray
    kurtosis: np.ndarray
    kurtosis_by_dimension: np.ndarray
    outlier: np.ndarray

    @property
    def mean_of_last(self) -> np.ndarray:
        """[L + 1]: entry n - 1 is the mean cosine over the last n layers."""
        return np.cumsum(self.mean[::-1]) / np.arange(1, len(self.mean) + 1)

    def save(self, folder: Path, source: str) -> None:
        """Write condensation.json (the figures of each layer) and condensation.npz (the same and the arrays).

        The JSON has means over the dimensions, and the largest kurtosis of one.
        """
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        by_layer = {name: value.tolist() for name, value in arrays.items() if name not in WIDE}
        by_layer |= {
            name: mean_over_dimensions(arrays[name]).tolist() for name in ("variance", "kurtosis_by_dimension")
        }
        by_layer["kurtosis_largest"] = np.nan_to_num(self.kurtosis_by_dimension).max(axis=1).tolist()
        rho, tau = trend(self.mean.tolist())
        summary = {
            "source": source,
            "windows": self.windows,
            "block": self.block,
            "include_diagonal": self.include_diagonal,
            "without": self.without,
            "without_largest": self.without_largest,
            "spearman": rho,
            "kendall": tau,
            "mean_of_last": self.mean_of_last.tolist(),
            "layers": [
                {"layer": layer, **{name: value[layer] for name, value in by_layer.items()}}
                for layer in range(len(self.mean))
            ],
        }
        with written_into(folder):
            (folder / "condensation.json").write_text(json.dumps(finite(summary), indent=2) + "\n")
            np.savez_compressed(folder / "condensation.npz", **arrays)

    def __str__(self) -> str:
        rho, tau = trend(self.mean.tolist())
        last = ", ".join(f"{value:.4f}" for value in self.mean_of_last)
        lines = [f"mean against depth: rho {rho:.3f}, tau {tau:.3f}", f"mean of the last 1, 2, … layers: {last}"]
        return "\n".join([self.table(MAIN), *lines])

    def table(self, columns: Mapping[str, tuple[str, str]]) -> str:
        """A line per layer; columns: name -> head and format, such as `MAIN` and `OTHERS`."""
        cells = [
            [head, *(format(value, form) for value in self.column(name))] for name, (head, form) in columns.items()
        ]
        cells.insert(0, ["layer", *map(str, range(len(self.mean)))])
        widths = [max(map(len, column)) for column in cells]
        return "\n".join("  ".join(map(str.rjust, row, widths)) for row in zip(*cells, strict=True))

    def panels(self) -> dict[str, dict[str, np.ndarray]]:
        """What `figures.measures` draws: title -> label -> [L + 1]."""
        heads = {name: head for name, (head, _) in (MAIN | OTHERS).items()}
        return {title: {heads[name]: self.column(name) for name in names} for title, names in PANELS.items()}

    def column(self, name: str) -> np.ndarray:
        """[L + 1], of a name in `MAIN` or `OTHERS`; of a measure by dimension the mean over dimensions."""
        name, _, stratum = name.partition("/")
        values = getattr(self, name)
        return values[:, int(stratum)] if stratum else mean_over_dimensions(values) if values.ndim > 1 else values


WIDE = ("histogram", "variance", "kurtosis_by_dimension")  # with more columns than condensation.json has place for
MAIN = {  # the columns of the table
    "mean": ("mean", ".4f"),
    "std": ("std", ".4f"),
    "cosine_centred": ("centred", ".4f"),
    "cosine_across": ("across", ".4f"),
    "effective_rank": ("eff. rank", ".2f"),
    "isoscore": ("IsoScore", ".4f"),
    "explained": ("explained", ".4f"),
    "condition": ("condition", ".2e"),
    "kurtosis": ("kurtosis", ".4g"),
    "outlier": ("outlier", ".4g"),
}
OTHERS = {  # those of a second table
    "cosine_without_first": ("no first", ".4f"),
    "cosine_without_largest": ("no largest", ".4f"),
    **{
        f"cosine_by_frequency/{stratum}": (head, ".4f")
        for stratum, head in zip(range(STRATA), ("frequent", "2nd", "3rd", "rare"), strict=True)
    },
    "centred_rank": ("centred rank", ".2f"),
    "participation": ("participation", ".2f"),
    "isoscore_star": ("IsoScore*", ".4f"),
    "nesum": ("NESum", ".2f"),
    "spectrum_slope": ("slope", ".3f"),
    "entropy": ("entropy", ".4f"),
    "frequency_ratio": ("high/low", ".4f"),
    "variance": ("variance", ".3g"),
    "kurtosis_by_dimension": ("dim. kurtosis", ".4g"),
}
PANELS = {  # of the figure: title -> what is in it
    "mean cosine": ("mean", "cosine_centred", "cosine_across", "cosine_without_first", "cosine_without_largest"),
    "mean cosine by frequency": tuple(name for name in OTHERS if name.startswith("cosine_by_frequency")),
    "number of directions": ("effective_rank", "centred_rank", "participation", "nesum"),
    "isotropy": ("isoscore", "isoscore_star"),
    "slope of the spectrum": ("spectrum_slope",),
    "kurtosis": ("kurtosis", "kurtosis_by_dimension"),
}
LOGARITHMIC = ("number of directions", "isotropy", "kurtosis")


def mean_over_dimensions(values: np.ndarray) -> np.ndarray:
    """[L + 1, F] -> [L + 1], without what is NaN; NaN if nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)


Read = Callable[[], Iterator[tuple["Tensor | None", Iterable[Tensor]]]]  # one reading: tokens and states of batches


def measure(
    model: nn.Module,
    windows: Iterable[Tensor],
    *,
    include_diagonal: bool = False,
    without: int = 0,
    without_largest: int = 3,
) -> Condensation:
    """Measure a model on `windows`, in memory that does not grow with their number except for the token ids.

    The model reads the windows twice, and with `without` three times.

    Args:
        model: anything that `hidden_states` accepts; measured in eval mode, on the device of its parameters.
        windows: batches of int64 [B, T] or [T], with the same T of at least 2; or one tensor [W, T].
        include_diagonal: `mean`, `std` and `histogram` also count the cosine of a token with itself, as the PyPI
            package `embedding-condensation` does.
        without: this many principal directions of each layer, the first right singular vectors of X, are removed
            from its tokens, and the rest is measured.
        without_largest: the number of dimensions that `cosine_without_largest` leaves out.

    On CUDA, the precision of the cosines is that of torch.set_float32_matmul_precision.

    Raises ValueError without windows, or if their lengths differ; UserError if a hidden state is not finite, or if
    there are not more directions than `without`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    kept: list[Tensor] = []  # an iterator can be read only once

    def read() -> Iterator[tuple[Tensor | None, Iterable[Tensor]]]:
        again = bool(kept)
        for idx in list(kept) if again else windows:
            if not again:
                kept.append(idx)
            idx = idx.reshape(-1, idx.size(-1)).to(device)  # [B, T]
            yield idx, hidden_states(model, idx)

    was_training = model.training
    model.eval()
    try:
        return _measure(read, include_diagonal, without, without_largest)
    finally:
        model.train(was_training)


def measure_states(
    states: Iterable[Tensor],
    tokens: Tensor | None = None,
    *,
    include_diagonal: bool = False,
    without: int = 0,
    without_largest: int = 3,
) -> Condensation:
    """`measure` of hidden states that are already there: [B, T, F] of each layer, of a floating dtype.

    tokens: int64 [B, T], for `cosine_by_frequency`, which is NaN without them.
    """
    layers = list(states)
    return _measure(lambda: iter([(tokens, layers)]), include_diagonal, without, without_largest)


def _measure(read: Read, include_diagonal: bool, without: int, without_largest: int) -> Condensation:
    with torch.inference_mode():
        directions: list[Tensor] = []
        if without:
            layers = sum_layers(read(), lambda depth, z: LayerSums(z.size(-1), z.device, include_diagonal))
            directions = [layer.principal(without) for layer in layers]
        counts = torch.zeros(0, dtype=torch.int64)

        def counted() -> Iterator[tuple[Tensor | None, Iterable[Tensor]]]:
            nonlocal counts
            for idx, states in read():
                if idx is not None:
                    more = torch.bincount(idx.flatten(), minlength=len(counts)).cpu()
                    more[: len(counts)] += counts
                    counts = more
                yield idx, states

        layers = sum_layers(counted(), lambda depth, z: LayerSums(z.size(-1), z.device, include_diagonal), directions)
        strata = strata_of(counts).to(layers[0].token.device) if len(counts) else None
        second = sum_layers(read(), lambda depth, z: SecondSums(layers[depth], strata, without_largest), directions)
        rows = [layer.finish() | more.finish() for layer, more in zip(layers, second, strict=True)]
    return Condensation(
        windows=layers[0].windows,
        block=layers[0].tokens // layers[0].windows,
        include_diagonal=include_diagonal,
        without=without,
        without_largest=without_largest,
        **{name: np.stack([row[name] for row in rows]) for name in rows[0]},
    )


def sum_layers(
    batches: Iterable[tuple[Tensor | None, Iterable[Tensor]]],
    make: Callable[[int, Tensor], S],
    directions: Sequence[Tensor] = (),
) -> list[S]:
    """The sums of each layer over batches of tokens, int64 [B, T], and their hidden states, [B, T, F] of each layer.

    make: depth and a first hidden state -> the empty sums of a layer.
    directions: [F, k] of each layer; they are removed from its tokens first.

    Raises ValueError without batches, or if their T differ or are less than 2; UserError if a state is not finite.
    """
    layers: list[S] = []
    block = None
    for idx, states in batches:
        for depth, z in enumerate(states):
            if z.size(1) < 2 or z.size(1) != (block := block or z.size(1)):
                raise ValueError(f"a window of {z.size(1)} tokens: all windows need the same length, at least 2")
            if not z.isfinite().all():
                raise UserError(
                    f"layer {depth} of the model gives NaN or infinite values: its weights are damaged, "
                    "or overflow their precision"
                )
            if depth == len(layers):
                layers.append(make(depth, z))
            if directions:
                x, v = z.double(), directions[depth]
                z = (x - x @ v @ v.T).to(z.dtype)
            layers[depth].add(z, idx)
    if block is None:
        raise ValueError("no windows to measure")
    return layers


def hidden_states(model: nn.Module, idx: Tensor) -> Iterable[Tensor]:
    """The hidden states [B, T, F] of int64 [B, T], embedding first.

    `model` has a method `hidden_states`, or is a transformers model, or `model(idx)` returns a tuple or list of them,
    or an object with the attribute `hidden` or `hidden_states`. Raises TypeError for anything else.
    """
    if (ours := getattr(model, "hidden_states", None)) is not None:
        return ours(idx)
    headless: Any = getattr(model, "base_model", None)  # transformers' name for a model without its head
    output = model(idx) if headless is None else headless(idx, output_hidden_states=True)
    states = next((s for name in ("hidden_states", "hidden") if (s := getattr(output, name, None)) is not None), output)
    if not isinstance(states, (tuple, list)):
        raise TypeError(f"{type(model).__name__} returns {type(output).__name__}, which has no hidden states")
    return states
