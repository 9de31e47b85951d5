"""What torch.compile makes, kept for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch

from nanodisp.dispersion.kernels.compiled import cache_folder, make_private


def keep_compiled() -> None:
    """Keep what torch.compile makes, so that the next start of the same run loads it instead of compiling for minutes.

    It goes to TORCHINDUCTOR_CACHE_DIR, or else to the user's cache folder; PyTorch's own choice, a folder of /tmp, may
    not outlive the machine's next start, and others can make it first. PyTorch does not by itself keep graphs with
    autocast or an autograd function in them. Such a graph depends on our sources beyond what its key says, since an
    operator is only a name there; so they are added to the key.
    """
    import torch._functorch.config as of_autograd
    import torch._inductor.config as of_inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # the imports above set the default
        with contextlib.suppress(OSError, RuntimeError):  # no home, or one that others write into: the default stays
            make_private(cache_folder())
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "torch")
    inside = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
    version = dict.fromkeys(inside, version_of(Path(__file__).resolve().parents[1]))
    of_inductor.unsafe_marked_cacheable_functions |= version  # "unsafe": their key is up to us
    of_autograd.autograd_cache_allow_custom_autograd_functions = True


def version_of(package: Path) -> str:
    """What another PyTorch changes, or another source of the models and the loss in the folder of nanodisp."""
    files = sorted(file for part in ("models", "dispersion") for file in (package / part).rglob("*.py"))
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return f"{torch.__version__} {sources.hexdigest()}"
