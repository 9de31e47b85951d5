"""Who is still there? Asked when a rank hangs or a connection breaks, to name the rank and its host.

A rank that waits for a dead one sees only that a connection is closed, and often that of a third rank, which saw it
first and gave up. So each rank has a thread that looks into the store every second whether somebody asks, and answers
for its process. A rank whose main thread hangs still answers, one that is stopped, dead, or behind a cut cable does
not.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time

import torch.distributed as dist

SECONDS_TO_ANSWER = 10.0  # in which ranks answer, and those that wait too say so
LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe|tim(e|ed|ing) ?out", re.IGNORECASE)
RESUMES = "the same command resumes from the last checkpoint"


class RollCall:
    """This rank's part in it. All ranks make theirs before they join the process group.

    Args:
        store: shared by all ranks; `connection` is another connection to it, for the thread.
        rank, size: of this rank, and how many there are.
    """

    def __init__(self, store: dist.Store, connection: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.hosts = ["?"] * size
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._answer, args=(connection,), daemon=True)
        store.set(f"host/{rank}", socket.gethostname())

    def begin(self) -> None:
        """Learn the hosts, once all ranks have joined, and answer from now on."""
        self.hosts = [host.decode() for host in self.store.multi_get([f"host/{rank}" for rank in range(self.size)])]
        self._thread.start()

    def end(self) -> None:
        """Stop answering, before this process ends."""
        self._ended.set()
        self._thread.join(2.0)

    def missing(self, error: BaseException | None) -> str | None:
        """One line about the ranks that are gone or hang; None when `error` is not of lost connections.

        Takes up to 3 x SECONDS_TO_ANSWER: the store may be lost too.
        """
        if not isinstance(error, RuntimeError) or not LOST.search(str(error)):
            return None
        timed_out = re.search("tim(e|ed|ing) ?out", str(error), re.IGNORECASE) is not None
        found: list[tuple[list[int], list[int]]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store may be gone
                found.append(self._ask(timed_out))

        question = threading.Thread(target=ask, daemon=True)
        question.start()
        question.join(3 * SECONDS_TO_ANSWER)
        if not found:
            keeper = f"rank 0 on {self.hosts[0]}, which keeps the store, hangs or is gone"
            return f"{keeper}: no answer from its process; look at {self.hosts[0]} and its network; {RESUMES}"
        gone, hanging = found[0]
        if gone:
            return f"{self._name(gone)} gone: killed or stopped, or the host or its network is lost; {RESUMES}"
        if hanging and timed_out:
            return f"{self._name(hanging, 'hangs', 'hang')}: no answer within train.timeout_minutes; {RESUMES}"
        return f"a connection between the ranks was lost for a while, although all of them answer; {RESUMES}"

    def _ask(self, timed_out: bool) -> tuple[list[int], list[int]]:
        """The ranks whose process does not answer, and those that answer but do not wait for others as well."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.store.set(f"here/{self.rank}", "")
        self.store.set(f"waiting/{self.rank}", "")
        self.store.set("roll call", "")
        gone = hanging = others
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while time.monotonic() < deadline and (gone or (timed_out and hanging)):
            time.sleep(0.2)
            gone = [rank for rank in others if not self.store.check([f"here/{rank}"])]
            hanging = [rank for rank in others if not self.store.check([f"waiting/{rank}"])]
        if self.rank == 0:  # it may keep the store: ranks that have noticed later still ask there
            time.sleep(SECONDS_TO_ANSWER / 5)
        return gone, hanging

    def _answer(self, connection: dist.Store) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(1.0):
                if connection.check(["roll call"]):
                    connection.set(f"here/{self.rank}", "")
                    return

    def _name(self, ranks: list[int], one: str = "is", several: str = "are") -> str:
        by_host: dict[str, list[str]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(str(rank))
        named = " and ".join(f"{', '.join(numbers)} on {host}" for host, numbers in by_host.items())
        return f"rank{'s' * (len(ranks) > 1)} {named} {several if len(ranks) > 1 else one}"
