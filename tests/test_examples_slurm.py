"""examples/slurm/train.sbatch with stand-ins for SLURM's commands; `make slurm-test` runs it with SLURM itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def test_the_slurm_script_requeues_what_can_go_on_and_gives_up_on_what_fails_again_and_again(tmp_path: Path) -> None:
    def submitted(code: int) -> bool:
        """Whether a job whose ranks exit with a code is queued again."""
        for name, does in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" >> calls.txt; echo node')):
            (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "2"}
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm}
        script = ROOT / "examples" / "slurm" / "train.sbatch"
        assert subprocess.run(["bash", script, "seed=1"], cwd=tmp_path, env=environment).returncode == code
        return "requeue 7" in (tmp_path / "calls.txt").read_text()

    assert [submitted(code) for code in (0, 1, 2)] == [False] * 3
    assert all(submitted(75) for _ in range(12))
    assert [submitted(code) for code in (74, 137) * 4] == [True] * 8
    assert submitted(75)  # it went on
    assert [submitted(74) for _ in range(10)] == [True] * 9 + [False]
