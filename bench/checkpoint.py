"""Times how long a checkpoint keeps training waiting: saved in the background, and not in the background.

    python -m bench.checkpoint                  # GPT-2 124M with AdamW's state, 1.5 GB
    python -m bench.checkpoint --folder /data   # on another disk

The two alternate. "stall" is how long `Saver.save` keeps the training thread; "write" how long the background
takes from then on, with nothing else to do; "waited for" is `checkpoint.save`, flushed to disk and renamed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import measure
from nanodisp.distributed import start
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.runs import checkpoint
from nanodisp.training import optim


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--rounds", type=measure.positive, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    arguments = parser.parse_args()
    start("cpu")
    model = GPT(GPTConfig(vocab_size=50257))
    optimizers = optim.build_optimizers(model, optim.OptimConfig(lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    weights, tensors = model.state_dict(), optim.state_tensors(model, optimizers)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    state: dict[str, Any] = {"step": 0, "config": {}}
    try:
        with checkpoint.Saver(folder / "background", keep_last=1, keep_every=None) as saver:
            steps = {
                "stall": lambda: saver.save(weights, tensors, state),
                "write": saver.wait,
                "waited for": lambda: checkpoint.save(folder / "waited_for", weights, tensors, state),
            }
            times = measure.alternate(steps, measure.wall_clock, arguments.rounds, warmup=0)
    finally:
        shutil.rmtree(folder)
    times = {name: values[1:] for name, values in times.items()}  # the first save allocates its copies
    report: dict[str, Any] = {"device": measure.device_name()}
    report |= {name: measure.summary(values) for name, values in times.items()}
    report["bytes"] = sum(tensor.nbytes for tensor in (*weights.values(), *tensors.values()))
    report["stall_of_waited_for"] = 1 + measure.overhead(times["stall"], times["waited for"])
    print(f"{report['device']}: {report['bytes'] / 1e9:.2f} GB")
    for name in times:
        print(f"{name:12}{measure.show(report[name])} ms")
    print(f"training waits for {report['stall_of_waited_for']:.1%} of a save that is waited for")
    measure.write("checkpoint", report)


if __name__ == "__main__":
    main()
