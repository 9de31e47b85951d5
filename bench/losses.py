"""The cost of every dispersion loss: forward and backward of one layer's tokens, beside `angular`.

    python -m bench.losses          # writes bench/results/losses-<device>.json

All formulas alternate; the medians of the rounds are reported, in milliseconds at the first number of tokens and as a
multiple of `angular` at each. Formulas with a fused kernel use it, as in training. All shapes have as many tokens.
"""

from __future__ import annotations

import statistics

import torch

from bench.kernels import forward_and_backward, loss_of
from bench.measure import alternate, device_name, parser_of, undisturbed, write
from nanodisp.dispersion.formulas import VARIANTS

SHAPES = [(16, 256, 128), (4, 1024, 128), (1, 4096, 128)]  # B, N, F
ROUNDS = 11


def main() -> None:
    parser_of(__doc__).parse_args()
    medians: dict[tuple[int, int, int], dict[str, float]] = {}
    for shape in SHAPES:
        torch.manual_seed(0)
        z = torch.randn(shape, requires_grad=True)
        steps = {name: forward_and_backward(loss_of(name, "auto"), z) for name in VARIANTS}
        times = alternate(steps, undisturbed, ROUNDS, warmup=1)
        medians[shape] = {name: statistics.median(of) for name, of in times.items()}
    first = SHAPES[0]
    names = sorted(VARIANTS, key=lambda name: medians[first][name])
    print("| loss | ms | " + " | ".join(f"{b} x {n} x {f}" for b, n, f in SHAPES) + " |")
    print("| --- |" + " --- |" * (1 + len(SHAPES)))
    for name in names:
        times_angular = [f"{medians[shape][name] / medians[shape]['angular']:.2f}" for shape in SHAPES]
        print(f"| {name} | {medians[first][name]:.2f} | {' | '.join(times_angular)} |")
    rows = [{"shape": shape, "median_ms": of} for shape, of in medians.items()]
    write("losses", {"device": device_name(), "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
