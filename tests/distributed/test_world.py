"""What torchrun sets says which ranks there are, and a rank that fails exits at once."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch.distributed as dist
from conftest import ROOT

from nanodisp.distributed import start
from nanodisp.distributed.world import agree
from nanodisp.errors import RankLost, UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}],
    ids=str,
)
def test_a_part_of_what_torchrun_sets_is_an_error(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        start("cpu")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_what_torchrun_sets_is_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "one")
    with pytest.raises(UserError, match=f"{name}=one is not a whole number"):
        start("cpu")


def test_one_process_needs_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert start("cpu").is_main
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start("cpu").is_main


def test_the_ranks_of_an_attempt_agree_on_a_name_whatever_earlier_ones_left() -> None:
    """torchrun's store outlives its ranks: a host that comes later counts other restarts than the rest."""
    store, names = dist.HashStore(), []
    for size in (3, 2, 3):

        def come(rank: int, size: int = size) -> None:
            names.append(agree(store, rank, size, 20.0))

        ranks = [threading.Thread(target=come, args=(rank,)) for rank in reversed(range(size))]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
    assert len(names) == 8
    assert [len(set(names[start:stop])) for start, stop in ((0, 3), (3, 5), (5, 8))] == [1, 1, 1]
    assert len(set(names)) == 3


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("knock/1", "of an earlier attempt")
    with pytest.raises(RankLost, match="of 3 ranks, 1, 2 did not come"):
        agree(store, 0, 3, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"),
    [("SystemExit(3)", 3), ("SystemExit", 0), ("SystemExit('a line')", 1), ("ValueError('a bug')", 1)],
)
def test_a_failing_rank_exits_at_once_whatever_its_threads_wait_for(error: str, code: int) -> None:
    script = f"""
import threading
import torch.distributed as dist
from nanodisp.distributed import group_of_ranks
with group_of_ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threading.Thread(target=threading.Event().wait).start()
    print("not flushed yet", end="")
    raise {error}
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, "not flushed yet")
    assert ("ValueError: a bug" in result.stderr) == ("bug" in error)
    assert (result.stderr == "a line\n") == ("line" in error)
