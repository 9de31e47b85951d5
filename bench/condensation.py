"""Time of measuring condensation beside the PyPI package `embedding-condensation`, on the same model and windows.

    python -m bench.condensation                # GPT-2's shape (124M), 100 windows of 512 tokens

Needs transformers and, for the comparison, `pip install embedding-condensation nltk`. The model is transformers' GPT-2
without its head, with random weights: the time does not depend on them. The two alternate, half of the windows each
time; reported are their total times, and the growth of the process while all windows are measured.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import Tensor

from bench import measure
from nanodisp.condensation import measure as condensation

CHUNK = 50


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--windows", type=measure.positive, default=100)
    parser.add_argument("--block", type=measure.positive, default=512)
    arguments = parser.parse_args()

    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config()).eval()
    windows = torch.randint(50257, (arguments.windows, arguments.block))
    package = package_on(model)
    report: dict[str, Any] = {"device": measure.device_name(), **vars(arguments)}
    seconds = {"nanodisp": 0.0, "embedding-condensation": 0.0}
    means: dict[str, list[Tensor]] = {name: [] for name in seconds}
    condensation.measure(model, windows[:1])
    for chunk in windows.split(CHUNK):
        began = time.perf_counter()
        ours = condensation.measure(model, chunk.split(4), include_diagonal=True)
        seconds["nanodisp"] += time.perf_counter() - began
        means["nanodisp"].append(torch.from_numpy(ours.mean))
        if package is not None:
            began = time.perf_counter()
            means["embedding-condensation"].append(package(chunk))
            seconds["embedding-condensation"] += time.perf_counter() - began
    report["seconds_per_window"] = {name: total / len(windows) for name, total in seconds.items()}
    for name, each in report["seconds_per_window"].items():
        print(f"{name:24}{each:8.3f} s per window")
    if package is not None:
        report["faster"] = seconds["embedding-condensation"] / seconds["nanodisp"]
        a, b = (torch.stack(values).mean(dim=0) for values in means.values())
        print(f"{report['faster']:.2f} times as fast; layer means differ by at most {(a - b).abs().max():.1e}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    condensation.measure(model, windows.split(4))
    report["growth_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"all {len(windows)} windows in one call: peak memory grew by {report['growth_mib']:.0f} MiB")
    measure.write("condensation", report)


def package_on(model: torch.nn.Module) -> Any:
    """windows [n, T] -> layer means [L + 1] by the package; None if it is not installed."""
    try:
        import nltk

        nltk.download = lambda *_, **__: None  # the package downloads data that is not used here
        from embedding_condensation import measure_embedding_condensation
    except ImportError:
        print("embedding-condensation is not installed: no comparison")
        return None

    def run(windows: Tensor) -> Tensor:
        found = measure_embedding_condensation(
            model,
            lambda text, **_: {"input_ids": windows[int(text)][None]},
            texts=[str(row) for row in range(len(windows))],
            repetitions=len(windows),
            plot=False,
            save_path=None,
            show_progress=False,
        )
        return torch.as_tensor(found.cossim_by_layer.mean(axis=(1, 2)))

    return run


if __name__ == "__main__":
    main()
