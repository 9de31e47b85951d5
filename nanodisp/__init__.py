"""nanodisp: pre-train small GPT models from scratch with a dispersion loss.

Importing the package needs torch and numpy alone.
"""

from nanodisp.dispersion import DispersionLoss

__version__ = "0.1.0"
__all__ = ["DispersionLoss"]
