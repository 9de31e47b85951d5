"""A run's folder on every host, for hosts that share no disk (`train.replicate_checkpoints`).

The first rank of each host writes the same checkpoints and records into its own folder. At a start the hosts may
differ: one is new, one was away for a while. Then the newest checkpoint of any of them, and the records that belong to
it, are sent to all that lack it, so that every host could go on without the others.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from nanodisp.distributed.world import World
from nanodisp.errors import UserError
from nanodisp.files import flush, write_whole
from nanodisp.runs import checkpoint
from nanodisp.runs.checkpoint import CHECKPOINTS, TENSOR_FILES
from nanodisp.runs.metrics import METRICS

CHUNK = 1 << 26  # bytes sent at once


def same_on_all(run: Path, saved: checkpoint.Checkpoint | None, world: World, writes: bool) -> int:
    """Bring the newest checkpoint of all hosts to each; return its step, -1 where no host has any.

    Args:
        run: the run's folder, on each host its own.
        saved: the newest intact checkpoint in it; None without one, and on ranks that do not look.
        writes: whether this rank keeps its host's folder. All ranks call this.

    Raises UserError, on all ranks, when a file cannot be read or written.
    """
    known = torch.full((world.size, 2), -1, dtype=torch.int64, device=world.device)  # step and content, by rank
    if saved is not None:
        sha256 = "".join(saved.state["sha256"][name] for name in TENSOR_FILES)
        known[world.rank] = torch.tensor([saved.step, int(hashlib.sha256(sha256.encode()).hexdigest()[:15], 16)])
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    newest = int(known[:, 0].max())
    source = int((known[:, 0] == newest).nonzero()[0])
    # the same step with other content: of hosts that went on without each other
    lacks = newest >= 0 and writes and not torch.equal(known[world.rank], known[source])
    if not world.any(lacks):
        return newest
    path = checkpoint.path_of(run / CHECKPOINTS, newest)
    temporary = path.with_name(f".{path.name}.tmp")
    with world.together():
        if lacks:
            prepare(temporary)
    for name in (*TENSOR_FILES, "state.json", METRICS):
        file = run / METRICS if name == METRICS else path / name
        with world.together():
            content = file.read_bytes() if world.rank == source else b""
        content = send(content, source, world)
        with world.together():
            if lacks:
                write_whole(file if name == METRICS else temporary / name, content)
    with world.together():
        if lacks:
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            flush(path.parent)
    return newest


def prepare(temporary: Path) -> None:
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{temporary.parent} cannot be written: {error.strerror}; choose another out_dir") from error


def send(content: bytes, source: int, world: World) -> bytes:
    """The bytes of rank `source`, on all ranks."""
    size = torch.tensor([len(content)], dtype=torch.int64, device=world.device)
    dist.broadcast(size, source)
    received = bytearray(content) if world.rank == source else bytearray(int(size))
    for start in range(0, int(size), CHUNK):
        part = torch.frombuffer(received, dtype=torch.uint8, count=min(CHUNK, int(size) - start), offset=start)
        moved = part.to(world.device)
        dist.broadcast(moved, source)
        part.copy_(moved)
    return bytes(received)
