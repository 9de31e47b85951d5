"""Time per token of GPT-2 124M at a full context: with the cache, eager and compiled, and without one.

    python -m bench.sampling                                   # float32 and bfloat16 weights
    python -m bench.sampling --batch-size 8 --dtypes bfloat16
    python -m bench.sampling --device cuda

The cache holds 1000 tokens; `--tokens` more are generated, each sampled with top_k=50. Without a cache the model
reads the complete context for each token, and its head only the last position. The kinds alternate; weights are
random. `faster` is relative to no cache in the same dtype, the median of each round's ratio.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F

from bench import measure
from bench.measure import Step
from nanodisp.models.generate import sample_token
from nanodisp.models.gpt import GPT, GPTConfig

CONTEXT = 1000


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=measure.positive, default=1)
    parser.add_argument("--tokens", type=measure.positive, default=16, choices=range(1, 25), metavar="1..24")
    parser.add_argument("--rounds", type=measure.positive, default=7)
    arguments = parser.parse_args()
    report: dict[str, Any] = {**vars(arguments), "device": measure.device_name(arguments.device), "kinds": {}}
    print(f"{report['device']}: {arguments.batch_size} x {CONTEXT} tokens of context")
    for dtype in arguments.dtypes:
        steps, compile_seconds = steps_of(arguments, getattr(torch, dtype))
        times = measure.alternate(steps, measure.wall_clock, arguments.rounds)
        # a step without cache generates one token, the others `tokens`
        per_token = {k: [t / (1 if k == "no cache" else arguments.tokens) for t in ts] for k, ts in times.items()}
        for kind, milliseconds in per_token.items():
            figures = measure.summary(milliseconds)
            faster = 1 / (1 + measure.overhead(milliseconds, per_token["no cache"]))
            rate = arguments.batch_size / figures["median_ms"] * 1e3
            report["kinds"][f"{kind}, {dtype}"] = {**figures, "tokens_per_second": rate, "faster": faster}
            print(f"{kind:16}{dtype:10}{measure.show(figures)}ms a token{rate:9.1f} tokens/s{faster:7.1f}x")
        report["kinds"][f"cache compiled, {dtype}"]["compile_seconds"] = compile_seconds
        print(f"                {dtype:10}compiled in {compile_seconds:.0f} s")
    measure.write(f"sampling-{arguments.batch_size}", report)


@torch.no_grad()
def steps_of(arguments: Any, dtype: torch.dtype) -> tuple[dict[str, Step], float]:
    """The kinds of steps, compiled, and the seconds that compilation took."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    eager, compiled = (GPT(GPTConfig(vocab_size=50257)).to(device, dtype).eval() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_one_token()
    context = torch.randint(50257, (arguments.batch_size, CONTEXT), device=device)
    last = torch.tensor([[CONTEXT - 1]], device=device)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        return sample_token(logits[:, -1], 0.8, 50, 1.0, None)

    @torch.no_grad()
    def without_cache() -> list[int]:
        taken = eager(context, head=False, take=([eager.config.n_layer], last)).hidden[0]  # [B, 1, C]
        return sample(F.linear(taken, eager.embedding.weight, eager.never_predicted.to(dtype))).tolist()

    def cached(model: GPT) -> Step:
        cache = model.new_cache(arguments.batch_size)
        model(context, cache=cache)

        @torch.no_grad()
        def step() -> None:
            cache.length = CONTEXT
            token = context[:, -1]
            for _ in range(arguments.tokens):
                token = sample(model(token[:, None], cache=cache).logits)
                token.tolist()  # each token is read before the next, as sample.py does

        return step

    steps = {"no cache": without_cache, "cache": cached(eager), "cache compiled": cached(compiled)}
    start = time.perf_counter()
    steps["cache compiled"]()
    return steps, time.perf_counter() - start


if __name__ == "__main__":
    main()
