"""The dispersion loss: push the embeddings of one sequence's tokens apart.

    disperse = DispersionLoss("angular")
    loss = cross_entropy + 0.1 * disperse(hidden)      # hidden [B, N, F], a layer's states

This folder needs only torch and numpy (and Triton on a GPU): copy it into your own project and it works.
`formulas.py` defines every formula, `loss.py` is the module, `placement.py` chooses layers, tokens and weight during
training, `kernels/` computes the pairwise-cosine formulas in one fused pass.
"""

from .formulas import VARIANTS
from .loss import DispersionLoss

__all__ = ["VARIANTS", "DispersionLoss"]
