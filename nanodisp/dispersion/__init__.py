"""The dispersion loss: push the embeddings of one sequence's tokens apart.

    disperse = DispersionLoss("angular")
    loss = cross_entropy + 0.1 * disperse(hidden)      # hidden [B, N, F], a layer's states

or, in a training loop that stays as it is,

    attach(model, variant="angular", lambda_disp=0.1)

This folder needs only torch and numpy (and Triton on a GPU): copy it into your own project and it works.
`formulas.py` defines every formula, `loss.py` is the module, `placement.py` chooses layers, tokens and weight during
training, `hooks.py` attaches the loss to any model, whose blocks `blocks.py` finds, `kernels/` computes the
pairwise-cosine formulas in one fused pass.
"""

from .formulas import VARIANTS
from .hooks import Attached, attach
from .loss import DispersionLoss

__all__ = ["VARIANTS", "Attached", "DispersionLoss", "attach"]
