"""Where compiled code is kept. (That a second start loads it: `test_train.py`.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch._functorch.config
import torch._inductor.config
from conftest import ROOT

from nanodisp.training.compiled import keep_compiled, version_of

KEPT_IN = """
import os
import torch._inductor.config  # sets a default
from nanodisp.training.compiled import keep_compiled
for theirs in (None, "/theirs"):
    if theirs:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = theirs
    keep_compiled()
    print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
def test_compiled_code_is_kept_in_the_users_cache_folder_unless_another_is_named(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", KEPT_IN], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [f"{tmp_path}/nanodisp/torch", "/theirs"]


@pytest.mark.parametrize("changed", ["models/head.py", "dispersion/loss.py", "dispersion/kernels/loops.py"])
def test_another_source_has_graphs_of_its_own(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=False),
        torch._inductor.config.patch(unsafe_marked_cacheable_functions={}),
    ):
        keep_compiled()
        hashed = torch._inductor.config.save_config_portable()  # what PyTorch makes its key of
    shutil.copytree(ROOT / "nanodisp", tmp_path / "nanodisp")
    before = version_of(tmp_path / "nanodisp")
    assert set(hashed["unsafe_marked_cacheable_functions"].values()) == {before}
    with (tmp_path / "nanodisp" / changed).open("a") as file:
        file.write("#")
    assert version_of(tmp_path / "nanodisp") != before
