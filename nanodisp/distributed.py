"""Ranks and devices: what torchrun set up, told in one small object, and how a model is laid out on them.

    torchrun --standalone --nproc_per_node=2 train.py

Without torchrun there is one rank and no process group.

With DDP every rank holds the whole model. With FSDP (Zhao et al., arXiv 2304.11277; torch's
`fully_shard`) each holds an equal share of every weight, its gradient and its optimizer state, and
the ranks put a block together just before they need it. So they must call the model equally often,
and what leaves the ranks or comes to them (a checkpoint, a norm) goes through `gather`, `scatter`
and `whole`. These leave tensors that are not sharded as they are, whatever the world.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.util
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanodisp.errors import UserError, first_line

DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("ddp", "fsdp")
SECONDS_TO_ANSWER = 10.0  # of ranks that have waited in vain, so that those who have not are known


@dataclass(frozen=True)
class World:
    """This process among its peers: rank of size, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; the devices are not waited for."""
        if self.size > 1:
            count = torch.tensor([flag], dtype=torch.int32)
            dist.all_reduce(count, group=_control_group)
            return bool(count)
        return flag

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        """Raise UserError with the ranks' names when this one has waited for others in vain."""
        in_vain = isinstance(error, RuntimeError) and re.search(r"tim(e|ed|ing) ?out", str(error), re.IGNORECASE)
        if in_vain and (silent := _who_is_silent(self.rank, self.size)):
            hang = f"rank {silent} hangs: no answer within train.timeout_minutes"
            raise UserError(f"{hang}; the same command goes on from the last checkpoint") from error


def _who_is_silent(rank: int, size: int) -> str:
    """The ranks that do not ask this too, or rank 0 where it keeps the store and does not answer."""
    silent = ["0, which keeps the store,"]

    def ask() -> None:
        assert _store is not None
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            _store.set(f"waiting/{rank}", "")
            time.sleep(SECONDS_TO_ANSWER)
            silent[:] = [str(other) for other in range(size) if not _store.check([f"waiting/{other}"])]

    question = threading.Thread(target=ask, daemon=True)  # a store that hangs is not waited for
    question.start()
    question.join(3 * SECONDS_TO_ANSWER)
    return ", ".join(silent)


_control_group: dist.ProcessGroup | None = None  # of the CPUs, where the default one is of the GPUs
_store: dist.Store | None = None  # where ranks leave word for each other


def start(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun describes (gloo on CPU, NCCL on CUDA), once per process.

    When a rank lets the others wait for `timeout_minutes` they fail, and torchrun ends them all. Within
    `with world:` they name that rank.

    Raises UserError for an unknown or absent device.
    """
    if device not in DEVICES:
        raise UserError(f"device={device} is unknown; choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto")
    use_cuda = torch.cuda.is_available() and device != "cpu"

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} wants GPU {local_rank}, but there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    if size > 1 and not dist.is_initialized():
        global _control_group, _store
        timeout = datetime.timedelta(minutes=timeout_minutes)
        # NCCL would end the process without a word: the CPUs, who meet once a step, shall notice first
        backend, patience = ("nccl", 2 * timeout) if use_cuda else ("gloo", timeout)
        try:
            _store = _meeting_place(rank, timeout)
            dist.init_process_group(backend, timeout=patience, store=_store, rank=rank, world_size=size)
            _control_group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else None
        except dist.DistError as error:
            raise UserError(f"rank {rank} did not meet all {size} ranks: {first_line(error)}") from error
    return World(rank, size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"))


def _meeting_place(rank: int, timeout: datetime.timedelta) -> dist.Store:
    """Where ranks leave their addresses: torchrun's own store if it has one, else rank 0's.

    torchrun's outlives `--max-restarts`, and with it the addresses of dead ranks: each attempt needs names of its own.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=rank == 0 and not of_torchrun, timeout=timeout)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --- how a model lies on the ranks ---------------------------------------------------------


def shard(model: nn.Module, blocks: nn.ModuleList, world: World) -> None:
    """FSDP: leave each rank its share of `model`'s weights, one of `blocks` a unit and the rest another.

    Every rank comes with the same weights. They stay float32, and so does what ranks send each other:
    matrix products in 16 bits are autocast's, as with DDP, so that hidden states and their dispersion
    are the same in any layout. FSDP's own mixed precision would send half as much, but would keep
    the residual stream and the LayerNorms in bfloat16. The price: autocast's 16-bit copies of a
    block's matrices stay from forward to backward, unless the block is recomputed there.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def recompute(module: nn.Module, compiled: bool) -> None:
    """Activation checkpointing: keep `module`'s inputs alone for backward, and go forward once more there.

    Dropout falls as it did. Comes before `shard`: weights are put together around what is recomputed.
    `compiled` for a module within one that torch.compile takes: among FSDP's hooks, that does not see into this.
    """
    plain = module.forward
    trained = torch.compile(plain) if compiled else plain

    def forward(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(*args)
        return checkpoint(trained, *args, use_reentrant=False)

    module.forward = forward


@contextlib.contextmanager
def no_sync(objective: nn.Module) -> Iterator[None]:
    """Backward passes in it leave each rank its own gradients; the next one outside adds them up."""
    if isinstance(objective, DistributedDataParallel):
        with objective.no_sync():
            yield
        return
    units = [module for module in objective.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
    yield
    for unit in units:
        unit.set_requires_gradient_sync(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors for rank 0, what was sharded one after the other onto its CPU; the others get none.

    All ranks call it.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.is_main:
            gathered[name] = full if full is tensor else full.cpu()
    return gathered


def scatter(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This rank's share of whole tensors, laid out as `model`'s parameters; ranks send nothing.

    Names are `<parameter>`, or `<parameter>/<what>` for optimizer state, whose scalars stay as they are.
    """
    parameters = dict(model.named_parameters())

    def share(name: str, tensor: Tensor) -> Tensor:
        parameter = parameters.get(name.split("/")[0])
        if not isinstance(parameter, DTensor) or tensor.dim() == 0:
            return tensor
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return {name: share(name, tensor) for name, tensor in tensors.items()}


def unshard(model: nn.Module) -> None:
    """Give every rank the whole model for good, so that one can call it without the others."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


# --- what devices can do ---------------------------------------------------------------------


def keep_memory() -> None:
    """Let the C library keep the memory that tensors on the CPU give back, for those of the next step.

    By default it returns large blocks to the system at once, and every large tensor is mapped page by page and
    filled with zeros anew. Nothing changes where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never


def matmul_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by its name; for "auto" bfloat16 where the hardware multiplies matrices of it, else float32.

    NVIDIA's do from Ampere on, CPUs with AVX512-BF16 (those with AMX have that too).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


COMPILE_FROM = {"cuda": 2e16, "cpu": 1e15}  # FLOPs, some minutes of work: ten times what compiling takes


def compile_pays(device: torch.device, flops: float) -> bool:
    """Whether torch.compile gives back, within a run of so many FLOPs a rank, what it takes, and can be had here."""
    compilers = ("cc", "gcc", "clang") if device.type == "cuda" else ("g++",)  # triton compiles its launcher
    found = any(map(shutil.which, compilers)) and (device.type == "cpu" or importlib.util.find_spec("triton"))
    return bool(found) and flops >= COMPILE_FROM[device.type]


# Dense matrix products in 16 bits, FLOP/s by the maker's data sheets; found by part of the device's name.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's published rate of 16-bit matrix products; None where it is not known or not in use."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
