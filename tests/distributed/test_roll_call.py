"""Who is still there: the ranks of a job are threads here, with a store that they share."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch.distributed as dist

from nanodisp.distributed import roll_call
from nanodisp.distributed.roll_call import RollCall

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242")
TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 15000ms for recv operation")


def ranks(monkeypatch: pytest.MonkeyPatch, size: int, answering: tuple[int, ...]) -> list[RollCall]:
    """Each rank's part, on a host of its own; those not in `answering` are gone."""
    monkeypatch.setattr(roll_call, "SECONDS_TO_ANSWER", 2.5)
    store, parts = dist.HashStore(), []
    for rank in range(size):
        monkeypatch.setattr(socket, "gethostname", lambda rank=rank: f"h{rank}")
        parts.append(RollCall(store, store, rank, size))
    for rank, part in enumerate(parts):
        part.hosts = [f"h{each}" for each in range(size)]
        if rank in answering:
            part.begin()
    return parts


def test_the_ranks_that_do_not_answer_are_named_with_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ranks(monkeypatch, 5, answering=(0, 1, 3))
    line = parts[0].missing(CLOSED)
    assert line is not None
    assert line.startswith("ranks 2 on h2 and 4 on h4 are gone: ")
    assert "the same command resumes" in line
    assert "\n" not in line


def test_one_that_answers_but_does_not_wait_with_the_others_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ranks(monkeypatch, 3, answering=(0, 1, 2))
    lines: list[str | None] = []
    asking = [threading.Thread(target=lambda part=part: lines.append(part.missing(TIMED_OUT))) for part in parts[:2]]  # type: ignore[misc]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    expected = "rank 2 on h2 hangs: no answer within train.timeout_minutes; the same command resumes from the last "
    assert lines == [f"{expected}checkpoint"] * 2


def test_when_all_answer_the_network_was_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ranks(monkeypatch, 2, answering=(0, 1))[1].missing(CLOSED)
    assert line is not None
    assert line.startswith("a connection between the ranks was lost for a while")


def test_a_store_that_fails_means_the_rank_that_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    part = ranks(monkeypatch, 2, answering=())[1]

    def fail(*_: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(part, "_ask", fail)
    line = part.missing(CLOSED)
    assert line is not None
    assert line.startswith("rank 0 on h0, which keeps the store, hangs or is gone")


@pytest.mark.slow
def test_rank_0_which_may_keep_the_store_leaves_after_those_that_noticed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, third = ranks(monkeypatch, 3, answering=(0, 2))
    monkeypatch.setattr(roll_call, "SECONDS_TO_ANSWER", 5.0)
    left = []
    thread = threading.Thread(target=lambda: left.append((0, first.missing(CLOSED))))
    thread.start()
    time.sleep(0.1)
    left.append((2, third.missing(CLOSED)))
    thread.join()
    assert [rank for rank, _ in left] == [2, 0]
    assert all(line is not None and line.startswith("rank 1 on h1 is gone") for _, line in left)


@pytest.mark.parametrize(
    "error", [None, ValueError("Connection closed"), RuntimeError("shapes do not match")], ids=repr
)
def test_other_errors_are_none_of_it(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks(monkeypatch, 2, answering=(0, 1))[0].missing(error) is None


def test_nobody_answers_any_more_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ranks(monkeypatch, 2, answering=(0, 1))
    second.end()
    line = first.missing(CLOSED)
    assert line is not None
    assert line.startswith("rank 1 on h1 is gone")
