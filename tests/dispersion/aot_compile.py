"""Compiles the Triton kernels for GPUs that are not present; prints one JSON line per kernel and GPU.

A separate program, because the interpreter that the tests use cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanodisp.dispersion.kernels import FAMILY, gpu, triton_kernels
from nanodisp.dispersion.kernels.pairwise import arcsin_coefficients
from nanodisp.models import head_gpu
from nanodisp.models.head import IGNORED

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
N_TOKENS, N_FEATURES = 1024, 768
SIZES = {"N_PADDED": N_TOKENS, "F_PADDED": N_FEATURES}
STRIDES = dict.fromkeys(("stride_b", "stride_n"), "i32")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """The kernel for sm_<capability>; pointers and integers are multiples of 16."""
    names = kernel.arg_names
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n] != "fp32"}
    source = ASTSource(kernel, signature, {(names.index(k),): value for k, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")}


def pairs(capability: int, dtype: torch.dtype, variant: str, configuration: triton.Config, clamp: float = 0.25) -> Any:
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = {"u": pointer, "h": pointer, "sums": "*fp32", "radial": "*fp32", "n_tokens": "i32"}
    types |= {"exponent": "fp32", "inverse_edge": "fp32"}
    side = gpu.tile_side(N_TOKENS, dtype, capability // 10)
    arcsin = arcsin_coefficients(clamp, exact=dtype == torch.float32)
    constants = {
        "VARIANT": variant,
        "BAND": 1 - clamp,
        "COEFFICIENTS": arcsin,
        "WITH_GRAD": True,
        "SIDE": side,
        **SIZES,
        **options_of(configuration),
    }
    return compiled(triton_kernels.pairs.fn, types, constants, capability)


def gradient(capability: int, dtype: torch.dtype, configuration: triton.Config) -> Any:
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = {"z": "*fp32", "u": pointer, "inverse": "*fp32", "alignment": "*fp32", "h": pointer, "sums": "*fp32"}
    types |= {"radial": "*fp32", "dz": "*fp32", **STRIDES, "n_tokens": "i32", "factor": "fp32"}
    side = gpu.tile_side(N_TOKENS, dtype, capability // 10)
    n_blocks = N_TOKENS // side
    n_tiles = n_blocks * (n_blocks + 1) // 2
    constants = {"stride_f": 1, "LOG": True, "N_FEATURES": N_FEATURES, **SIZES, "SIDE": side}
    constants |= {"N_TILES": n_tiles, "TILES": triton.next_power_of_2(n_tiles)}
    return compiled(triton_kernels.gradient.fn, types, constants | options_of(configuration), capability)


def prepare(capability: int) -> Any:
    types = {"z": "*fp32", "u": "*bf16", "inverse": "*fp32", "alignment": "*fp32", **STRIDES}
    types |= {"n_rows": "i32", "n_tokens": "i32"}
    constants = {"stride_f": 1, "N_FEATURES": N_FEATURES, **SIZES, "ROWS": 4, "BLOCK": 1024}
    return compiled(triton_kernels.prepare, types, constants, capability)


def loss(capability: int) -> Any:
    types = {"sums": "*fp32", "loss": "*fp32", "n_sequences": "i32", "inverse_pairs": "fp32", "offset": "fp32"}
    return compiled(triton_kernels.mean_loss, types, {"LOG": True, "N_TILES": 36, "TILES": 64, "ROWS": 64}, capability)


def head_rows(capability: int) -> Any:
    types = {"product_pointer": "*bf16", "bias_pointer": "*fp32", "target_pointer": "*i64", "loss_pointer": "*fp32"}
    constants = {"ignored": IGNORED, "with_grad": True, "block": 4096, "num_warps": 8}
    return compiled(head_gpu.row_kernel, types | {"n_columns": "i32"}, constants, capability)


def options_of(configuration: triton.Config) -> dict[str, int]:
    return {**configuration.kwargs, "num_warps": configuration.num_warps, "num_stages": configuration.num_stages}


def kernels(capability: int) -> Iterator[tuple[str, Any]]:
    """All configurations in bfloat16, each of `pairs` for another variant; in float32 the first."""
    for variant, configuration in zip(FAMILY, triton_kernels.PAIRS, strict=True):
        yield f"pairs bfloat16 {variant} {configuration}", pairs(capability, torch.bfloat16, variant, configuration)
    for configuration in triton_kernels.GRADIENT:
        yield f"gradient bfloat16 {configuration}", gradient(capability, torch.bfloat16, configuration)
    yield "pairs float32 angular", pairs(capability, torch.float32, "angular", triton_kernels.PAIRS[0])
    yield "pairs float32 angular 0.1", pairs(capability, torch.float32, "angular", triton_kernels.PAIRS[0], 0.1)
    yield "gradient float32", gradient(capability, torch.float32, triton_kernels.GRADIENT[0])
    yield "prepare", prepare(capability)
    yield "loss", loss(capability)
    yield "head's rows", head_rows(capability)


def main(capability: int) -> None:
    for name, kernel in kernels(capability):
        matmuls = re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"])
        figures = {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
        print(json.dumps({"capability": capability, "kernel": name, "matmuls": sorted(set(matmuls)), **figures}))


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(int(given))
