"""Scripts in processes that fork from one with torch loaded: they start at once, where Python needs three seconds.

For tests of what processes do together or leave behind. What a fresh process alone has (its environment before torch is
loaded, its standard streams, torchrun around it) needs `conftest.command`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

ROOT = Path(__file__).parents[1]
PORTS = itertools.count(97 * os.getpid())  # each worker of pytest has its own
PATIENCE = 280.0  # seconds, also on a machine that does much else
CONTEXT = multiprocessing.get_context("forkserver")
# What a script would import, and the main module.
CONTEXT.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "pytest"])


def become(script: str, arguments: tuple[str, ...], environment: dict[str, str], streams: str) -> None:
    """Run a script in this process, its output in the files `streams`/1 and `streams`/2."""
    import torch

    for descriptor in (1, 2):
        os.dup2(os.open(f"{streams}/{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.enable()  # as nanodisp/process.py has it in a fresh process
    os.environ.clear()
    os.environ.update(environment)
    gc.collect = lambda *_: 0  # it would go through, and so copy, all that was loaded
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 has it in `conftest.command`: other threads, other last digits
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Forked:
    """`python <script> <arguments>`, started."""

    def __init__(self, script: Path, *arguments: str, **environment: str) -> None:
        self.arguments, self.streams = (str(script), *arguments), tempfile.TemporaryDirectory()
        given = (str(script), arguments, {**os.environ, **environment}, self.streams.name)
        self.process = CONTEXT.Process(target=become, args=given)
        self.process.start()

    def finish(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Wait for its end; subprocess.TimeoutExpired, after killing it, where that takes longer than `timeout`."""
        self.process.join(timeout)
        ended = self.process.exitcode is not None
        self.process.kill()
        self.process.join()
        said = [Path(self.streams.name, str(descriptor)).read_text() for descriptor in (1, 2)]
        if not ended:
            raise subprocess.TimeoutExpired(self.arguments, timeout, *said)
        return subprocess.CompletedProcess(self.arguments, cast(int, self.process.exitcode), *said)


def rendezvous(n: int) -> dict[str, str]:
    """What torchrun would set for all of n ranks on this machine.

    The port is outside the range from which systems take those of connections: none is given it before rank 0 is there.
    """
    for number in PORTS:
        port = 20_000 + number % 10_000
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            break
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # a host name may not be known
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), **interface}


def start_ranks(n: int, script: Path, *arguments: str) -> list[Forked]:
    """Ranks without torchrun, which would end the others as soon as one fails."""
    shared = rendezvous(n)
    return [Forked(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(n)]


def finish(processes: list[Forked], timeout: float = PATIENCE) -> list[subprocess.CompletedProcess[str]]:
    """Wait for the end of all; none is left running."""
    deadline = time.monotonic() + timeout
    try:
        return [each.finish(max(0.0, deadline - time.monotonic())) for each in processes]
    finally:
        for each in processes:
            each.process.kill()


def train(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`python train.py <arguments>` on so many ranks; what rank 0 says, and the first exit code that is not 0."""
    script = ROOT / "train.py"
    done = finish([Forked(script, *arguments)] if ranks == 1 else start_ranks(ranks, script, *arguments))
    code = next((each.returncode for each in done if each.returncode), 0)
    errors = "".join(each.stderr for each in done)
    return subprocess.CompletedProcess(done[0].args, code, done[0].stdout, errors)
