"""A rank of `test_attach_ranks.py`: the gradients of each way to train on several ranks, of rank 0 in a file."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from attach_models import LAMBDA, Decoder, cross_entropy, made, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanodisp.dispersion import attach

BATCHES, ROWS, TOKENS = 2, 4, 6
WAYS = [
    ("ddp", "angular", None),
    ("ddp", "angular", False),
    ("ddp", "sigreg", True),
    ("fsdp", "angular", None),
    ("fsdp", "sigreg", False),
]


def name(parallel: str, variant: str, recompute: bool | None) -> str:
    return f"{parallel}-{variant}-{recompute}"


def train(parallel: str, variant: str, recompute: bool | None) -> list[torch.Tensor]:
    """Accumulates two batches, of which each rank has its half; the gradients of the whole."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model: Any = made(Decoder, recompute=recompute)
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (n,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    handle = attach(model, variant=variant, lambda_disp=LAMBDA, max_tokens=TOKENS)
    torch.manual_seed(rank)  # the global generators of ranks differ
    for i in range(BATCHES):
        batch = tokens(ROWS, seed=i).chunk(n)[rank]
        last = i == BATCHES - 1
        with model.no_sync() if parallel == "ddp" and not last else contextlib.nullcontext():
            (handle.follow(cross_entropy(model(batch), batch)) / BATCHES).backward()
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    gradients = {f"{name(*way)}-{i}": g.contiguous() for way in WAYS for i, g in enumerate(train(*way))}
    if dist.get_rank() == 0:
        safetensors.torch.save_file(gradients, sys.argv[1])
    dist.destroy_process_group()
