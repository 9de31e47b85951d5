"""Compiles the Triton kernels for GPUs that are not present; prints one JSON line per kernel.

A separate program, because the interpreter that the tests use cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanodisp.dispersion.kernels import FAMILY, gpu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], unaligned: set[str], capability: int
) -> Any:
    """The kernel for sm_<capability>; every pointer and integer that is not `unaligned` is a multiple of 16."""
    names = kernel.arg_names
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if n not in unaligned and types[n] != "fp32"}
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


def pair_tiles(capability: int, dtype: torch.dtype, variant: str) -> Any:
    options = gpu.tile_options(dtype, capability // 10)
    pointer = "*fp32" if dtype == torch.float32 else "*bf16"
    types = {"z": pointer, "norm": "*fp32", "h_matrix": pointer, "sums": "*fp32"}
    types |= dict.fromkeys(("stride_b", "stride_n", "h_stride", "n_tokens", "n_features"), "i32") | {"exponent": "fp32"}
    constants = {
        "VARIANT": variant,
        "WITH_GRAD": True,
        "OPERAND": gpu.OPERAND_TYPE[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }
    return compiled(gpu._pair_tiles, types, constants | options, {"n_tokens"}, capability)


def row_kernel(kernel: Any, pointers: dict[str, str], capability: int, n_features: int) -> Any:
    integers = ("stride_b", "stride_n", "stride_f", "n_tokens", "n_features")
    types = pointers | dict.fromkeys(integers, "i32")
    return compiled(kernel, types, gpu._row_options(n_features), {"stride_f", "n_tokens"}, capability)


def main(capability: int) -> None:
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    kernels = {(name, v, "any"): pair_tiles(capability, dtype, v) for name, dtype in dtypes.items() for v in FAMILY}
    for n_features in (768, 1600):
        pointers = {"z": "*bf16", "norm": "*fp32"}
        kernels["norms", "", n_features] = row_kernel(gpu._norms, pointers, capability, n_features)
        pointers = {"z": "*bf16", "a": "*fp32", "norm": "*fp32", "factor": "*fp32", "dz": "*bf16"}
        kernels["dz", "", n_features] = row_kernel(gpu._through_normalisation, pointers, capability, n_features)
    for name, kernel in kernels.items():
        matmuls = re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"])
        figures = {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
        print(json.dumps({"kernel": " ".join(map(str, name)), "matmuls": sorted(set(matmuls)), **figures}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
