"""The layout of a model on the ranks: replicated (DDP) or sharded (FSDP), and its blocks recomputed or not.

With DDP every rank holds the whole model. With FSDP (Zhao et al., arXiv 2304.11277; torch's `fully_shard`) each holds
an equal shard of every weight, its gradient and its optimizer state, and the ranks gather a block just before they need
it. So all ranks must call the model equally often, and whatever leaves or enters the ranks (a checkpoint, a norm) goes
through `gather`, `scatter` and `whole`, which return unsharded tensors unchanged.

torch's modules of FSDP are imported where they are used: loading them takes a third of a command's start.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanodisp.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PARALLEL = ("ddp", "fsdp")


class Model(Protocol):
    """A module that names its blocks."""

    @property
    def blocks(self) -> nn.ModuleList: ...


def place(
    module: nn.Module, model: Model, world: World, *, parallel: str, compiled: bool, recomputed: bool
) -> nn.Module:
    """Compile, recompute and distribute a module around `model`, as asked for.

    Args:
        module: what training calls, with `model` inside.
        model: its `blocks` are the units of sharding and recomputation.
        parallel: "ddp" or "fsdp"; no difference for a single process.

    Returns the module to call from now on.
    """
    if compiled:
        torch.compiler.reset()  # an earlier run of a sweep compiled other shapes
        module.compile(dynamic=False)
    if recomputed:
        for block in model.blocks:
            recompute(block, compiled)
    if world.size == 1:
        return module
    if parallel == "fsdp":
        shard(cast(nn.Module, model), model.blocks, world)
        return module
    replicated = DistributedDataParallel(module, gradient_as_bucket_view=True)  # gradients are not copied to be sent
    replicated.broadcast_buffers = False  # none changes; PyTorch 2.13 gave the argument another name
    return replicated


def shard(model: nn.Module, blocks: nn.ModuleList, world: World) -> None:
    """FSDP: leave each rank its shard of `model`'s weights; each of `blocks` is one unit, the rest another.

    Every rank starts with the same weights. They stay float32, and so does what ranks send each other:
    16-bit matrix products are autocast's, as with DDP, so that hidden states and their dispersion
    are the same in any layout. FSDP's own mixed precision would send half as much, but would keep
    the residual stream and the LayerNorms in bfloat16. The price: autocast's 16-bit copies of a
    block's matrices stay from forward to backward, unless the block is recomputed.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def recompute(module: nn.Module, compiled: bool) -> None:
    """Activation checkpointing: keep only `module`'s inputs for backward, and run forward again there.

    Dropout is the same in both passes. Call it before `shard`: weights are gathered around the recomputation.
    `compiled`: whether the module is inside a compiled one, which among FSDP's hooks does not see into this.
    """
    plain = module.forward
    trained = torch.compile(plain) if compiled else plain

    def forward(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(*args)
        return checkpoint(trained, *args, use_reentrant=False)

    module.forward = forward


@contextlib.contextmanager
def sync_if(module: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the last backward pass of a step only; in the others each rank keeps its own."""
    if last:
        yield
        return
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
    yield
    for unit in units:
        unit.set_requires_gradient_sync(True, recurse=False)


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    """Whether a rank holds only a part of this tensor."""
    loaded = sys.modules.get("torch.distributed.tensor")  # by FSDP: without it there is no shard
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded. All ranks call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Full tensors for a rank that keeps them, sharded ones moved to its CPU one by one; an empty dict on others.

    All ranks call it.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            gathered[name] = full if full is tensor else full.cpu()
    return gathered


def scatter(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This rank's shards of full tensors, laid out as `model`'s parameters; no communication.

    Names are `<parameter>`, or `<parameter>/<what>` for optimizer state, whose scalars stay as they are.
    """
    parameters = dict(model.named_parameters())

    def share(name: str, tensor: Tensor) -> Tensor:
        parameter = parameters.get(name.split("/")[0])
        if not is_shard(parameter) or tensor.dim() == 0:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return {name: share(name, tensor) for name, tensor in tensors.items()}


def unshard(model: nn.Module) -> None:
    """Give every rank the full model permanently, so that one can call it without the others."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
