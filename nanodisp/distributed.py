"""Ranks and devices: what torchrun set up, told in one small object.

    torchrun --standalone --nproc_per_node=2 train.py

Without torchrun there is one rank and no process group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanodisp.errors import UserError

DEVICES = ("auto", "cpu", "cuda")


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


_control_group: dist.ProcessGroup | None = None  # of the CPUs, where the default one is of the GPUs


def start(device: str = "auto") -> World:
    """Join the process group that torchrun describes (gloo on CPU, NCCL on CUDA), once per process.

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
        global _control_group
        dist.init_process_group("nccl" if use_cuda else "gloo")
        _control_group = dist.new_group(backend="gloo") if use_cuda else None
    return World(rank, size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: NVIDIA's from Ampere on, CPUs with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()  # those with AMX have it too


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
