"""All figures of a model's condensation: how far the tokens of a sequence have collapsed into one cone.

The measure is the cosine similarity of all pairs of different tokens of a sequence, layer by layer,
from the embedding on: near 1 is condensed, near 0 is spread out. The other figures of a layer
say how many directions its tokens occupy. Windows are combined in three ways:

- cosines (mean, standard deviation, histogram): pairs within a window, and the pairs of all
  windows have equal weight;
- the ratio of high to low frequencies is a property of a sequence: measured per window, then averaged;
- spectrum and covariance: of all tokens of all windows together, so that they are not bounded
  by the length of a window.

Windows are not kept in memory, only a few sums per layer (`sums.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.condensation.cosine import trend
from nanodisp.condensation.sums import LayerSums
from nanodisp.errors import UserError


@dataclass(frozen=True)
class Condensation:
    """The results; arrays are float64 with a row per layer, [L + 1], hidden state 0 first.

    With X the tokens of a layer, [n_tokens, F], sigma its singular values and p = sigma / sum sigma:

    mean, std: of the cosine similarities.
    histogram: [L + 1, 128], their density over [-1, 1]; it integrates to 1.
    effective_rank: exp(entropy), Roy & Vetterli, "The effective rank" (2007).
    entropy: -sum p ln p, in nats.
    explained: sigma_1^2 / sum sigma^2, the largest explained variance (of X itself, not centred).
    frequency_ratio: |X - mean|_F / |mean part|_F along a window, high frequencies over frequency 0;
        Wang et al., "Anti-Oversmoothing in Deep Vision Transformers", arXiv 2203.05962.
    condition: largest over smallest eigenvalue of the tokens' covariance. Infinite if that is
        singular to the precision of the tokens: with at most as many tokens as features, and after
        the last LayerNorm, whose outputs are in a hyperplane.
    variance: [L + 1, F], the covariance's diagonal.
    kurtosis: of all values of X, their fourth central moment over their squared variance: 3 for a Gaussian, more with
        outliers, which make the steps of quantization coarse; Chmiel et al., arXiv 2002.07686.
    outlier: the largest |x| over the median of |x| (of each window, averaged).
    """

    windows: int
    block: int
    include_diagonal: bool
    without: int
    mean: np.ndarray
    std: np.ndarray
    histogram: np.ndarray
    effective_rank: np.ndarray
    entropy: np.ndarray
    explained: np.ndarray
    frequency_ratio: np.ndarray
    condition: np.ndarray
    variance: np.ndarray
    kurtosis: np.ndarray
    outlier: np.ndarray

    @property
    def mean_of_last(self) -> np.ndarray:
        """[L + 1]: entry n - 1 is the mean cosine over the last n layers."""
        return np.cumsum(self.mean[::-1]) / np.arange(1, len(self.mean) + 1)

    def save(self, folder: Path, source: str) -> None:
        """Write condensation.json (the figures of each layer) and condensation.npz (the same and the arrays)."""
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in arrays.items() if value.ndim == 1}
        rho, tau = trend(self.mean.tolist())
        summary = {
            "source": source,
            "windows": self.windows,
            "block": self.block,
            "include_diagonal": self.include_diagonal,
            "without": self.without,
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
            raise UserError(f"{folder} cannot be written: {error}; choose another with out=…") from error

    def __str__(self) -> str:
        head = f"{'layer':>5} {'mean':>8} {'std':>8} {'eff. rank':>9} {'entropy':>8} {'explained':>9} {'high/low':>9}"
        lines = [f"{head} {'condition':>9} {'variance':>9} {'kurtosis':>9} {'outlier':>8}"]
        for row in range(len(self.mean)):
            lines.append(
                f"{row:5} {self.mean[row]:8.4f} {self.std[row]:8.4f} {self.effective_rank[row]:9.2f} "
                f"{self.entropy[row]:8.4f} {self.explained[row]:9.4f} {self.frequency_ratio[row]:9.4f} "
                f"{self.condition[row]:9.2e} {self.variance[row].mean():9.3g} {self.kurtosis[row]:9.4g} "
                f"{self.outlier[row]:8.4g}"
            )
        rho, tau = trend(self.mean.tolist())
        last = ", ".join(f"{value:.4f}" for value in self.mean_of_last)
        lines += [f"mean against depth: rho {rho:.3f}, tau {tau:.3f}", f"mean of the last 1, 2, … layers: {last}"]
        return "\n".join(lines)


def measure(
    model: nn.Module, windows: Iterable[Tensor], *, include_diagonal: bool = False, without: int = 0
) -> Condensation:
    """Measure a model on `windows`, in memory that does not grow with their number.

    Args:
        model: anything that `hidden_states` accepts; measured in eval mode, on the device of its parameters.
        windows: batches of int64 [B, T] or [T], with the same T of at least 2; or one tensor [W, T].
        include_diagonal: also count the cosine of a token with itself, as the PyPI package
            `embedding-condensation` does.
        without: this many principal directions of each layer, the first right singular vectors of X, are removed
            from its tokens, and the rest is measured. The windows are then read twice: no iterator.

    On CUDA, the precision of the cosines is that of torch.set_float32_matmul_precision.

    Raises ValueError without windows, or if their lengths differ; UserError if a hidden state is not finite, or if
    there are not more directions than `without`.
    """
    directions = [layer.principal(without) for layer in _add_up(model, windows)] if without else []
    layers = _add_up(model, windows, include_diagonal, directions)
    rows = [layer.finish() for layer in layers]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Condensation(
        windows=layers[0].windows,
        block=layers[0].tokens // layers[0].windows,
        include_diagonal=include_diagonal,
        without=without,
        **stacked,
    )


def _add_up(
    model: nn.Module, windows: Iterable[Tensor], include_diagonal: bool = False, directions: Sequence[Tensor] = ()
) -> list[LayerSums]:
    """The sums of each layer; `directions`, [F, k] of each, are removed from its tokens first."""
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
                    raise ValueError(f"a window of {idx.size(1)} tokens: all windows need the same length, at least 2")
                for depth, z in enumerate(hidden_states(model, idx)):
                    if not z.isfinite().all():
                        raise UserError(
                            f"layer {depth} of the model gives NaN or infinite values: its weights are damaged, "
                            "or overflow their precision"
                        )
                    if depth == len(layers):
                        layers.append(LayerSums(z.size(-1), device, include_diagonal))
                    if directions:
                        x, v = z.double(), directions[depth]
                        z = (x - x @ v @ v.T).to(z.dtype)
                    layers[depth].add(z)
    finally:
        model.train(was_training)
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
