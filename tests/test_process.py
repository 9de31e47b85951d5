"""OpenMP's waiting policy, set before torch is loaded and never over the user's own; crashes; garbage."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from nanodisp.process import garbage_collected_by_hand

pytestmark = pytest.mark.slow  # starts processes

PROGRAM = "import os, sys; import {module}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


def setting(module: str, **environment: str) -> list[str]:
    """GOMP_SPINCOUNT after an import, and whether torch was loaded."""
    variables = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**variables, **environment},
    )
    return result.stdout.split()


def test_the_setting_is_made_without_loading_torch() -> None:
    count, loaded = setting("nanodisp.process")
    assert int(count) > 0
    assert loaded == "False"


@pytest.mark.parametrize("module", ["train", "sample", "nanodisp.condensation.__main__", "nanodisp.report.__main__"])
def test_every_command_makes_it_before_torch_is_loaded(module: str) -> None:
    """A module that imported torch first would come too late: the import system loads them in this order."""
    program = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); os._exit(0)\n"
        f"sys.meta_path.insert(0, Watch())\nimport {module}\n"
    )
    variables = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.stdout.strip().isdigit(), result.stderr


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_users_own_policy_stays(own: dict[str, str]) -> None:
    assert setting("nanodisp.process", **own)[0] == own.get("GOMP_SPINCOUNT", "None")


def test_a_crash_in_native_code_says_where_it_was() -> None:
    command = [sys.executable, "-X", "importtime", "sample.py"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " nanodisp.process" in line:  # it is loaded; torch is next
                process.send_signal(signal.SIGABRT)
                break
        said = process.stderr.read()
    assert "Fatal Python error: Aborted" in said
    assert 'sample.py", line' in said


def test_jobs_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    joblib = pytest.importorskip("joblib")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = joblib.Parallel(n_jobs=2)(joblib.delayed(lambda: os.environ.get("OMP_NUM_THREADS"))() for _ in range(2))
    assert {int(count) for count in found} == {max(1, joblib.cpu_count() // 2)}


def test_garbage_is_left_until_it_is_collected_by_hand() -> None:
    with pytest.raises(ZeroDivisionError), garbage_collected_by_hand():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        raise ZeroDivisionError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
