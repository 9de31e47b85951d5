"""A run's folder on every host, for hosts that share no disk (`train.replicate_checkpoints`).

The first rank of each host writes the same checkpoints and records into its own folder. At a start the hosts may
differ: one is new, one was away for a while. Then the newest checkpoint of any of them, and the records that belong to
it, are sent to all that lack it, so that every host could go on without the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from nanodisp.distributed.world import World
from nanodisp.errors import UserError
from nanodisp.files import flush, write_whole
from nanodisp.runs import checkpoint
from nanodisp.runs.checkpoint import CHECKPOINTS, TENSOR_FILES
from nanodisp.runs.metrics import METRICS


def same_on_all(run: Path, world: World, writes: bool) -> int:
    """Bring the newest intact checkpoint of all hosts to each; return its step, -1 where no host has any.

    Records that have been deleted on the host with that checkpoint are no reason to end: as on a single host, the run
    goes on without them, and the others keep theirs.

    Args:
        run: the run's folder, on each host its own.
        writes: whether this rank keeps its host's folder. All ranks call this.

    Raises UserError, on all ranks, when a file cannot be read or written, or all checkpoints of all hosts are damaged.
    """
    saved: checkpoint.Checkpoint | None = None
    damaged: checkpoint.NoneIntact | None = None
    with world.together():
        try:
            saved = checkpoint.load_newest(run / CHECKPOINTS) if writes else None
        except checkpoint.NoneIntact as error:  # as bad as none, if another host has one
            damaged = error
    known = torch.full((world.size, 2), -1, dtype=torch.int64, device=world.device)  # step and content, by rank
    if saved is not None:
        sha256 = "".join(saved.state["sha256"][name] for name in TENSOR_FILES)
        known[world.rank] = torch.tensor([saved.step, int(hashlib.sha256(sha256.encode()).hexdigest()[:15], 16)])
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    newest = int(known[:, 0].max())
    source = int((known[:, 0] == newest).nonzero()[0])
    # the same step with other content: of hosts that went on without each other
    lacks = newest >= 0 and writes and not torch.equal(known[world.rank], known[source])
    with world.together():
        if damaged is not None and newest < 0:
            raise damaged
        if damaged is not None:
            checkpoint.set_aside(damaged.found, f"taking step {newest} of rank {source}")
    if not world.any(lacks):
        return newest
    path = checkpoint.path_of(run / CHECKPOINTS, newest)
    temporary = path.with_name(f".{path.name}.tmp")
    with copying(run, world):
        if lacks:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    for name in (*TENSOR_FILES, "state.json", METRICS):
        file = run / METRICS if name == METRICS else path / name
        with copying(run, world):
            is_there = world.rank == source and (name != METRICS or file.exists())
            content = file.read_bytes() if is_there else b""
        content = world.send(content, source)
        with copying(run, world):
            if lacks and content:
                write_whole(file if name == METRICS else temporary / name, content)
    with copying(run, world):
        if lacks:
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            flush(path.parent)
    return newest


@contextlib.contextmanager
def copying(run: Path, world: World) -> Iterator[None]:
    """`world.together`, in which a file that cannot be read or written is a UserError."""
    with world.together():
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{run} on {socket.gethostname()} cannot be copied between the hosts: {error}; free space or fix the "
                "permissions, then run the command again"
            ) from error
