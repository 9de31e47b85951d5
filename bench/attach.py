"""`attach` beside the explicit sum, on a model of Hugging Face: the same losses, gradients and weights, step by step.

    python -m bench.attach --model smollm2 --text english.txt [--lambda-disp 1 --steps 50 --batch 4 --block 128]

Two copies of the model see the same batches. The loop of one is left as it is, with the loss attached; the other adds
lambda * the dispersion of `output_hidden_states`. Then the mean cosine of every layer, before and after, on the end of
the text, which is not trained on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodisp.condensation.cosine import mean_cosine
from nanodisp.dispersion import DispersionLoss, attach
from nanodisp.errors import UserError, optional

HELD_OUT = 8  # sequences


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--text", required=True, help="a text file")
    for name, default in (("steps", 50), ("batch", 4), ("block", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in (("lambda-disp", 1.0), ("lr", 5e-5)):
        parser.add_argument(f"--{name}", type=float, default=value)
    run(parser.parse_args(argv))


def run(settings: argparse.Namespace) -> None:
    transformers = optional("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    models = [transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True) for model in models]
    ids = torch.tensor(tokenizer(Path(settings.text).read_text(), verbose=False)["input_ids"])
    blocks = ids[: len(ids) // settings.block * settings.block].view(-1, settings.block)
    needed = settings.steps * settings.batch + HELD_OUT
    if len(blocks) < needed:
        raise UserError(f"{settings.text} has {len(blocks)} blocks of {settings.block} tokens: {needed} are needed")
    held_out, before = blocks[-HELD_OUT:], cosines(models[0], blocks[-HELD_OUT:])
    handle = attach(models[0], lambda_disp=settings.lambda_disp)
    print(handle)
    apart: list[list[float]] = []
    seconds, gradients, weights = [0.0, 0.0], math.nan, math.nan
    for step, batch in enumerate(blocks[: settings.steps * settings.batch].split(settings.batch), start=1):
        losses: list[Tensor] = []
        for i, model in enumerate(models):
            started = time.perf_counter()
            optimizers[i].zero_grad(set_to_none=False)
            out = model.train()(batch, labels=batch, output_hidden_states=i == 1)
            losses.append(out.loss.detach())
            total = out.loss if i == 0 else out.loss + settings.lambda_disp * dispersion(out.hidden_states)
            total.backward()
            seconds[i] += time.perf_counter() - started
        shown = step % 10 == 0 or step == 1
        if shown:
            gradients = distance([p.grad for p in models[0].parameters()], [p.grad for p in models[1].parameters()])
        for optimizer in optimizers:
            optimizer.step()
        apart.append([abs(losses[0] - losses[1]).item()])
        if shown:
            weights = distance(list(models[0].parameters()), list(models[1].parameters()))
            apart[-1] += [gradients, weights]
            print(
                f"step {step:3}  loss {losses[0]:.4f} and {losses[1]:.4f}  dispersion {handle.value:.4f}  "
                f"gradients {gradients:.1e} apart, weights {weights:.1e}",
                flush=True,
            )
    handle.detach()
    after = cosines(models[0], held_out)
    largest = [max(each[i] for each in apart if len(each) > i) for i in range(3)]
    print(
        f"largest difference of losses {largest[0]:.1e}; of gradients {largest[1]:.1e} and weights {largest[2]:.1e}, "
        "as norms relative to theirs, in the steps shown"
    )
    print(f"mean cosine of layers 1 to {len(before) - 1}: {mean(before[1:]):.4f} before, {mean(after[1:]):.4f} after")
    for layer, pair in enumerate(zip(before, after, strict=True)):
        print(f"  layer {layer:2}  {pair[0]:.4f}  {pair[1]:.4f}")
    means = [each / len(apart) for each in seconds]
    print(f"seconds per forward and backward: {means[0]:.2f} attached, {means[1]:.2f} explicit")


def dispersion(hidden_states: Sequence[Tensor]) -> Tensor:
    disperse = DispersionLoss()
    return torch.stack([disperse(hidden) for hidden in hidden_states[1:]]).mean()


@torch.no_grad()
def cosines(model: nn.Module, idx: Tensor) -> list[float]:
    return [mean_cosine(hidden).item() for hidden in model.eval()(idx, output_hidden_states=True).hidden_states]


def distance(found: Sequence[Any], right: Sequence[Any]) -> float:
    """|found - right| / |right| over all tensors together."""
    with torch.no_grad():
        gap = sum(torch.dist(a, b).square() for a, b in zip(found, right, strict=True))
        return float((gap / sum(b.norm().square() for b in right)) ** 0.5)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
