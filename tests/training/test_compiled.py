"""Where compiled code is kept. (That a second start loads it: `test_train.py`.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KEPT_IN = """
import os, train
from nanodisp.training.compiled import keep_compiled
import torch._inductor.config  # sets a default
keep_compiled()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [None, "/theirs"])
def test_compiled_code_is_kept_in_the_users_cache_folder_unless_another_is_named(
    tmp_path: Path, theirs: str | None
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)} | ({"TORCHINDUCTOR_CACHE_DIR": theirs} if theirs else {})
    result = subprocess.run(
        [sys.executable, "-c", KEPT_IN], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [theirs or f"{tmp_path}/nanodisp/torch"]
