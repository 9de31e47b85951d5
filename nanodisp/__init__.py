"""nanodisp: pre-train small GPT models from scratch with a dispersion loss.

Importing the package loads nothing; `DispersionLoss` needs torch and numpy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanodisp.dispersion import DispersionLoss

__version__ = "0.1.0"
__all__ = ["DispersionLoss"]


def __getattr__(name: str) -> Any:
    """DispersionLoss, imported when it is asked for: `nanodisp.process` must come before torch."""
    if name == "DispersionLoss":
        from nanodisp.dispersion import DispersionLoss

        return DispersionLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
