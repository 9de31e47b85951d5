"""Simulated quantization: weights, and activations if asked for, rounded to the nearest of a few levels.

    int8    each row of a weight matrix (an output feature) in 8 bits
    int4    each group of 128 input features of a row in 4 bits
    w8a8    int8, and the inputs of the matrix product in 8 bits, token by token
    w4a4    int4, and the inputs in 4 bits, token by token

Levels are symmetric: q = round(x / scale), scale = max|x| / (2^(bits - 1) - 1), found anew for each row, group, token;
no calibration. The rounded numbers are stored and multiplied in floating point, so a model takes as much memory and
time as before: what is simulated is the loss of precision. Only the matrices of the blocks are rounded; embeddings,
output head, norms and biases stay, as in GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanodisp.errors import UserError

GROUP = 128  # input features that share a scale at 4 bits


class Scheme(NamedTuple):
    """weights, activations: bits, None for activations as they are. group: input features per scale; None: all."""

    weights: int
    activations: int | None
    group: int | None


SCHEMES = {
    "int8": Scheme(8, None, None),
    "int4": Scheme(4, None, GROUP),
    "w8a8": Scheme(8, 8, None),
    "w4a4": Scheme(4, 4, GROUP),
}


def check_scheme(name: str | None) -> None:
    """Raises ValueError for a name that is not one of `SCHEMES`; None is allowed."""
    if name is not None and name not in SCHEMES:
        raise ValueError(f"quantize={name} is unknown; choose one of {', '.join(SCHEMES)}")


@torch.no_grad()
def quantize(model: nn.Module, name: str) -> int:
    """Round a model's block matrices in place, as in `SCHEMES[name]`, and its activations from now on.

    Args:
        model: a GPT, or a model of transformers. Its blocks are its longest `ModuleList` that is not inside another.
        name: a key of `SCHEMES`.

    Returns the number of matrices. Raises UserError for a model without matrices in blocks.
    """
    scheme = SCHEMES[name]
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {id(part) for outer in lists for part in outer.modules() if part is not outer}  # as experts are
    blocks = max((part for part in lists if id(part) not in inner), key=len, default=None)
    matrices = [part for part in blocks.modules() if is_linear(part)] if blocks is not None else []
    if not matrices:
        raise UserError(f"quantize={name}: {type(model).__name__} has no list of blocks with linear layers")
    for part in matrices:
        weight: Any = part.weight
        rows = weight if isinstance(part, nn.Linear) else weight.T  # [out, in]
        rows.copy_(round_to_levels(rows, scheme.weights, scheme.group))
        if scheme.activations is not None:
            part.register_forward_pre_hook(partial(_round_input, scheme.activations))
    return len(matrices)


def is_linear(part: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D (GPT-2), whose weight is [in, out]."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def round_to_levels(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """x [..., n] rounded to the nearest of 2^bits - 1 levels, symmetric around 0, as the same dtype.

    group: values of the last dimension that share a scale, fewer in the last group; None: all n.
    """
    if group is not None and group < x.size(-1):
        return torch.cat([round_to_levels(part, bits) for part in x.split(group, dim=-1)], dim=-1)
    largest = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(dim=-1, keepdim=True) / largest
    return (x.float() / scale.where(scale > 0, 1.0)).round().mul(scale).to(x.dtype)


def _round_input(bits: int, part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_to_levels(inputs[0], bits), *inputs[1:])
