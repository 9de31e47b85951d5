"""This process among its peers: what torchrun set up, as one small object.

    torchrun --standalone --nproc_per_node=2 train.py

Without torchrun: one rank and no process group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanodisp.distributed.roll_call import RollCall
from nanodisp.errors import AlreadyReported, RankLost, UserError, first_line, to_stderr

DEVICES = ("auto", "cpu", "cuda")
CHUNK = 1 << 26  # bytes sent at once


@dataclass(frozen=True)
class World:
    """This process among its peers: rank, number of ranks, device, and its rank on this machine."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, key: str, n: int) -> int:
        """Each rank's equal share of `n`, the value of `key`; UserError when `n` is not divisible by the ranks."""
        if n % self.size != 0:
            raise UserError(f"{key}={n} is not divisible by the number of ranks, {self.size}")
        return n // self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def send(self, content: bytes, source: int) -> bytes:
        """The bytes of rank `source`, on all ranks."""
        if self.size == 1:
            return content
        size = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, source)
        received = bytearray(content) if self.rank == source else bytearray(int(size))
        for start in range(0, int(size), CHUNK):
            part = torch.frombuffer(received, dtype=torch.uint8, count=min(CHUNK, int(size) - start), offset=start)
            moved = part.to(self.device)
            dist.broadcast(moved, source)
            part.copy_(moved)
        return bytes(received)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; does not wait for the devices."""
        if self.size > 1:
            count = torch.tensor([flag], dtype=torch.int32)
            dist.all_reduce(count, group=_control_group)
            return bool(count)
        return flag

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError on any rank ends the block on all, which wait at its end: on the others as AlreadyReported."""
        error: UserError | None = None
        try:
            yield
        except UserError as mistake:
            error = mistake
        if self.any(error is not None):
            raise error or AlreadyReported("another rank reports the error")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        """After a timeout or a lost connection, raise RankLost, which names the ranks that hang or are gone."""
        if lost := rank_lost(error):
            raise lost from error


def rank_lost(error: BaseException | None) -> RankLost | None:
    """RankLost in place of an error of lost connections, after asking who is still there; None for another error."""
    missing = _roll_call.missing(error) if _roll_call is not None else None
    return RankLost(missing) if missing is not None else None


_control_group: dist.ProcessGroup | None = None  # of the CPUs, where the default one is of the GPUs
_roll_call: RollCall | None = None  # where there are several ranks


def of_torchrun(name: str, default: int) -> int:
    """A number that torchrun sets in the environment; UserError for something else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name}={text} is not a whole number: torchrun sets it; unset it")
    return int(text)


def start(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun describes (gloo on CPU, NCCL on CUDA), once per process.

    When a rank keeps the others waiting for `timeout_minutes`, or its connection is lost, they fail and torchrun ends
    all of them. Inside `with world:` their error names that rank and its host.

    Raises UserError for an unknown or missing device, and for variables of torchrun that are incomplete; RankLost when
    the ranks cannot reach each other.
    """
    if device not in DEVICES:
        raise UserError(f"device={device} is unknown; choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto")
    use_cuda = torch.cuda.is_available() and device != "cpu"

    rank, size, local_rank = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1), of_torchrun("LOCAL_RANK", 0)
    if not 0 <= rank < size or (size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        raise UserError(
            f"the environment says rank {rank} of {size}, but not as torchrun does: start several ranks with torchrun; "
            "for a single process unset RANK and WORLD_SIZE"
        )
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} needs GPU {local_rank}, but torch sees only {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    if size > 1 and not dist.is_initialized():
        global _control_group, _roll_call
        timeout = datetime.timedelta(minutes=timeout_minutes)
        # NCCL would end the process without a message: the CPUs, which meet once a step, must notice first
        backend, patience = ("nccl", 2 * timeout) if use_cuda else ("gloo", timeout)
        try:
            store, connection = _rendezvous_stores(rank, size, timeout)
            _roll_call = RollCall(store, connection, rank, size)
            gpu = torch.device("cuda", local_rank) if use_cuda else None  # known now: NCCL connects at once
            dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size, device_id=gpu)
            _control_group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else None
            _roll_call.begin()
        except RuntimeError as error:
            raise RankLost(f"rank {rank} could not reach all {size} ranks: {first_line(error)}") from error
    return World(rank, size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"), local_rank)


def _rendezvous_stores(rank: int, size: int, timeout: datetime.timedelta) -> tuple[dist.Store, dist.Store]:
    """Two connections to the store for the ranks' addresses: torchrun's own if it has one, else rank 0's.

    torchrun's survives a restart, with the addresses of dead ranks, and its count of restarts differs on a host that
    came later. So each attempt has a prefix of its own, which rank 0 draws.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], of_torchrun("MASTER_PORT", 0)
    store = dist.TCPStore(host, port, is_master=rank == 0 and not agents, timeout=timeout)
    another = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    attempt = agree(store, rank, size, timeout.total_seconds())
    return dist.PrefixStore(attempt, store), dist.PrefixStore(attempt, another)


def agree(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name that only the ranks of this attempt share, in a store that may hold the messages of earlier ones.

    Raises RankLost where ranks do not come within `seconds`.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"knock/{rank}", own)
        store.wait([f"answer/{own}"], datetime.timedelta(seconds=seconds))
        attempt = store.get(f"answer/{own}").decode()
        store.set(f"{attempt}/{rank}", "")
        return attempt
    missing, deadline = set(range(1, size)), time.monotonic() + seconds
    while missing := {other for other in missing if not store.check([f"{own}/{other}"])}:
        if time.monotonic() > deadline:
            raise RankLost(
                f"of {size} ranks, {', '.join(map(str, sorted(missing)))} did not come within train.timeout_minutes: "
                "start all hosts, and look at their network (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one)"
            )
        for other in missing:  # a knock may be of an earlier attempt: its answer is read by nobody
            if store.check([f"knock/{other}"]):
                store.set(f"answer/{store.get(f'knock/{other}').decode()}", own)
        time.sleep(0.02)
    return own


@contextlib.contextmanager
def group_of_ranks() -> Iterator[None]:
    """Leave the process group, if `start` has joined one, at the end of the block.

    A rank that fails exits at once instead: Python's own exit joins the threads of the group, which may wait for Python
    or for another rank, and torchrun, which ends the other ranks, would never hear of the failure.
    """
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        with contextlib.suppress(OSError):  # nobody reads any more
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            elif isinstance(code, str):
                to_stderr(code)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    if dist.is_initialized():
        if _roll_call is not None:
            _roll_call.end()
        dist.destroy_process_group()
