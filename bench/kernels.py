"""Time of the fused dispersion loss against the formula in plain PyTorch, eager and compiled.

    python -m bench.kernels                     # the CPU kernel; about a minute
    python -m bench.kernels --device cuda       # the Triton kernel: checks, then times; starts no row after 4 minutes,
                                                # and, started again, goes on with those that are missing
    python -m bench.kernels --dry-run           # the code of --device cuda in Triton's interpreter, at toy sizes

Forward and backward together, the implementations in alternation; reported are the median of the rounds and their
interquartile range. The report is written to bench/results/ (or the folder $OUT) with the device's name in the
file's name, on a GPU after each row. A dry run writes nothing, because its times are meaningless.

Needs only torch, numpy, triton (for --device cuda) and nanodisp.dispersion.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.measure import (
    Step,
    alternate,
    device_name,
    matmul_rate,
    show,
    summary,
    time_by_operator,
    undisturbed,
    wall_clock,
)

FAMILY = ("angular", "orthogonalization", "cosine")
ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 4e-3}
MATMULS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
GPU_SHAPES = [(16, 1024, 768), (192, 256, 768), (8, 1024, 1600), (4, 2048, 1024)]  # 192: 16 of each of 12 layers
TIME_LIMIT = 240.0  # seconds after which no row is started


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="run the code of --device cuda on the CPU, tiny")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before nanodisp reads it
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; omit --device cuda, or use --dry-run")

    report: dict[str, Any] = {}
    if arguments.dry_run:
        from triton.runtime import interpreter

        interpreter._convert_float = rounding(interpreter._convert_float)
        gpu_report(report, Interpreter(), [(2, 70, 24)], rounds=1)
        print("dry run: no file written")
    elif arguments.device == "cuda":
        file = measure.path_of("kernels", device_name("cuda"))
        report["rows"] = json.loads(file.read_text())["rows"] if file.exists() else []
        gpu_report(report, Gpu(), GPU_SHAPES, rounds=15)
    else:
        cpu_report(report)
    if not arguments.dry_run:
        measure.write("kernels", report)
    if wrong := [check for check in report.get("checks", ()) if not check["is_right"]]:
        raise SystemExit(f"{len(wrong)} gradients are wrong, see above")


# --- measurements -------------------------------------------------------------------------


def loss_of(variant: str, backend: str) -> Callable[[Tensor], Tensor]:
    from nanodisp.dispersion import DispersionLoss  # late: a dry run sets the environment first

    return DispersionLoss(variant, 1.0, backend)


def forward_and_backward(loss: Callable[[Tensor], Tensor], z: Tensor) -> Step:
    return lambda: torch.autograd.grad(loss(z), z)[0]


def under_autocast(step: Step, device: str, enabled: bool) -> Step:
    """The step as in training: float32 z, matmuls in bfloat16."""

    def run() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return step()

    return run


def gradient_error(gradient: Tensor, variant: str, z: Tensor) -> float:
    """Relative to float64 autograd of the formula, one sequence at a time."""
    difference = norm = 0.0
    for sequence, its_gradient in zip(z.detach(), gradient, strict=True):
        exact_z = sequence[None].double().requires_grad_()
        exact = torch.autograd.grad(loss_of(variant, "reference")(exact_z) / len(z), exact_z)[0]
        difference += (its_gradient.double() - exact).square().sum().item()
        norm += exact.square().sum().item()
    return (difference / norm) ** 0.5


class Saved:
    """A tensor that autograd keeps for backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(loss: Callable[[Tensor], Tensor], z: Tensor) -> dict[str, int]:
    """Bytes that autograd saves in forward: the sum over all tensors, and the distinct memory still held at its end."""
    total = 0
    held: weakref.WeakSet[Saved] = weakref.WeakSet()

    def save(tensor: Tensor) -> Saved:
        nonlocal total
        total += tensor.nbytes
        saved = Saved(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        result = loss(z)
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in held}
    del result
    return {"added_up": total, "distinct": sum(storages.values())}


# --- the CPU ----------------------------------------------------------------------------------


def cpu_report(report: dict[str, Any]) -> None:
    report["device"] = device_name()
    report["rows"] = []
    print(f"{report['device']}, PyTorch {torch.__version__}: forward + backward against the formula in PyTorch")
    titles = ("formula, ms", "fused, ms", "faster", "matmuls", "kept, MiB", "fused", "error")
    widths = (16, 17, 8, 9, 13, 10, 10)
    print(" " * 44 + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    rows = [
        ("angular", (8, 1024, 768), "float32", 9),
        ("angular", (8, 1024, 768), "bfloat16", 9),  # autocast
        ("angular", (4, 256, 768), "float32", 101),
        ("orthogonalization", (8, 1024, 768), "float32", 5),
        ("cosine", (8, 1024, 768), "float32", 5),
        ("orthogonalization", (8, 1024, 768), "bfloat16", 5),
        ("cosine", (8, 1024, 768), "bfloat16", 5),
    ]
    for variant, shape, dtype, rounds in rows:
        report["rows"].append(cpu_row(variant, shape, dtype, rounds))


def cpu_row(variant: str, shape: tuple[int, int, int], dtype: str, rounds: int) -> dict[str, Any]:
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference, fused = loss_of(variant, "reference"), loss_of(variant, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        steps = {"reference": forward_and_backward(reference, z), "fused": forward_and_backward(fused, z)}
        times = {name: summary(t) for name, t in alternate(steps, undisturbed, rounds).items()}
        kept = {"reference": saved_bytes(reference, z), "fused": saved_bytes(fused, z)}
        error = gradient_error(steps["fused"](), variant, z)
        matmuls = sum(share for name, share in time_by_operator(steps["fused"]).items() if name in MATMULS)
    ratio = times["reference"]["median_ms"] / times["fused"]["median_ms"]
    print(
        f"{variant:18}{'x'.join(map(str, shape)):>14}{dtype:>11} "
        f"{show(times['reference'])}{show(times['fused'])}{ratio:7.2f}x{matmuls:9.0%}"
        f"{mebibytes(kept['reference']):>13}{mebibytes(kept['fused']):>10}{error:10.1e}",
        flush=True,
    )
    return {
        "variant": variant,
        "shape": shape,
        "dtype": dtype,
        "times": times,
        "faster": ratio,
        "share_of_matmuls": matmuls,
        "saved_bytes": kept,
        "gradient_error": error,
    }


def mebibytes(kept: dict[str, int]) -> str:
    """The sum over all tensors, and in brackets the distinct memory."""
    return f"{kept['added_up'] / 2**20:.0f} ({kept['distinct'] / 2**20:.0f})"


# --- the GPU ------------------------------------------------------------------------------------


class Gpu(measure.Cuda):
    device = "cuda"
    compiler = "inductor"
    matmul_size = 8192


def rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter's `_convert_float`, but to bfloat16 as a GPU rounds.

    By itself it truncates: twice the error, all of one sign.
    """
    import triton.language as tl

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.from_numpy(data.copy()).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16").reshape(data.shape)

    return rounded


class Interpreter:
    """Replaces `Gpu` in a dry run on the CPU."""

    device = "cpu"
    compiler = "aot_eager"
    matmul_size = 64

    def timer(self, step: Step) -> float:
        return wall_clock(step)

    def peak_bytes(self, step: Step) -> int:
        return step().nbytes

    def graph(self, step: Step) -> Step:
        return step


def gpu_report(
    report: dict[str, Any], machine: Gpu | Interpreter, shapes: list[tuple[int, int, int]], rounds: int
) -> None:
    import triton

    start = time.perf_counter()
    report |= {"device": device_name(machine.device), "triton": triton.__version__}
    print(f"{report['device']}, PyTorch {torch.__version__}, Triton {triton.__version__}")
    report["checks"] = check_gradients(machine)
    report["launches"] = {"x".join(map(str, shape)): count_launches(shape) for shape in shapes}
    print(f"launches of loss and gradient, in bfloat16: {report['launches']}")
    rate = matmul_rate(machine.device, torch.bfloat16, machine.matmul_size, machine.timer, rounds)
    report["matmul_tflops"] = rate / 1e12
    print(f"bfloat16 matmul of {machine.matmul_size}^3: {report['matmul_tflops']:.0f} TFLOP/s")
    print("forward + backward, ms; fused also as a CUDA graph, without Python between kernels")
    print(f"{'':46}{'eager':>16}{'compiled':>17}{'fused':>17}{'graph':>17}   against   peak MiB   of matmul")
    rows, report["left_out"] = report.setdefault("rows", []), []
    done = [(row["variant"], tuple(row["shape"]), row["dtype"]) for row in rows]
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for variant in FAMILY:
                row = (variant, shape, str(dtype).removeprefix("torch."))
                if row not in done and time.perf_counter() - start > TIME_LIMIT:
                    report["left_out"].append(row)
                elif row not in done:
                    rows.append(gpu_row(machine, variant, shape, dtype, rounds, report["matmul_tflops"]))
                    if machine.device == "cuda":
                        measure.write("kernels", report, say=False)
    report["seconds"] = time.perf_counter() - start
    if report["left_out"]:
        print(f"not enough time for {len(report['left_out'])} rows")
    print(f"{report['seconds']:.0f} s in total")


def count_launches(shape: tuple[int, int, int]) -> int:
    """Of the fused loss and its gradient in bfloat16, by the number of groups that H takes."""
    from nanodisp.dispersion.kernels import gpu

    n_sequences, n_tokens, _ = shape
    return 2 + 2 * -(-n_sequences // gpu.sequences_at_once(n_sequences, n_tokens, torch.bfloat16, side=128))


def random_tokens(machine: Gpu | Interpreter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return z.to(machine.device, dtype).requires_grad_()


def check_gradients(machine: Gpu | Interpreter) -> list[dict[str, Any]]:
    """Compare gradients with float64, and two runs bit for bit, before anything is timed.

    A gradient over its limit is said and kept as `is_right`; `main` fails for it once everything is measured.
    """
    checks: list[dict[str, Any]] = []
    on_gpu = machine.device == "cuda"
    # (160, 1024, 64) takes more than one group; every shape tunes anew, so they are few
    shapes = [(2, 70, 64), (3, 300, 768), (1, 129, 4096), (160, 1024, 64)] if on_gpu else [(2, 70, 64)]
    for shape in shapes:
        for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
            for variant in FAMILY:
                z = random_tokens(machine, shape, dtype)
                step = under_autocast(forward_and_backward(loss_of(variant, "triton"), z), machine.device, autocast)
                error = gradient_error(step(), variant, z)
                name = "bfloat16" if autocast else str(dtype).removeprefix("torch.")
                checks.append({"variant": variant, "shape": shape, "dtype": name, "gradient_error": error})
                checks[-1]["autocast"] = autocast
                if not torch.equal(step(), step()):
                    raise SystemExit(f"two runs differ: {checks[-1]}")
                if checks[-1].setdefault("is_right", error <= ERROR_LIMIT[name]) is False:
                    print(f"the gradient is wrong by more than {ERROR_LIMIT[name]}: {checks[-1]}")
    for name in ERROR_LIMIT:
        worst = max(check["gradient_error"] for check in checks if check["dtype"] == name)
        print(f"gradients checked: largest error in {name} {worst:.1e}")
    return checks


def gpu_row(
    machine: Gpu | Interpreter,
    variant: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rounds: int,
    matmul_tflops: float,
) -> dict[str, Any]:
    torch.compiler.reset()  # so that every row compiles again
    z = random_tokens(machine, shape, dtype)
    reference = loss_of(variant, "reference")
    fused = forward_and_backward(loss_of(variant, "triton"), z)
    steps = {
        "reference": forward_and_backward(reference, z),
        "compiled": forward_and_backward(torch.compile(reference, backend=machine.compiler, dynamic=False), z),
        "fused": fused,
        "fused_graph": machine.graph(fused),
    }
    times = {name: summary(t) for name, t in alternate(steps, machine.timer, rounds).items()}
    peak = {name: machine.peak_bytes(steps[name]) for name in ("reference", "compiled", "fused")}
    n_sequences, n_tokens, n_features = shape
    needed = 3 * n_sequences * n_tokens**2 * n_features  # FLOPs: N^2 F of the symmetric cosines, 2 N^2 F of H u
    median = {name: figures["median_ms"] for name, figures in times.items()}
    row: dict[str, Any] = {
        "variant": variant,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "times": times,
        "faster_than_eager": median["reference"] / median["fused"],
        "faster_than_compiled": median["compiled"] / median["fused"],
        "peak_bytes": peak,
        "share_of_matmul_rate": {
            name: needed / median[name] / 1e9 / matmul_tflops for name in ("fused", "fused_graph")
        },
    }
    print(
        f"{variant:18}{'x'.join(map(str, shape)):>14}{row['dtype']:>11}   "
        + " ".join(show(times[name]) for name in steps)
        + f"{row['faster_than_eager']:6.1f}x{row['faster_than_compiled']:5.1f}x"
        + f"{peak['reference'] / 2**20:7.0f}/{peak['fused'] / 2**20:.0f}"
        + "".join(f"{share:7.0%}" for share in row["share_of_matmul_rate"].values()),
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
