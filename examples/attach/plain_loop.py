"""The dispersion loss in a loop like torchtitan's: blocks recomputed, a loss that is summed and already divided.

python examples/attach/plain_loop.py <model> <text file>                       needs pip install 'nanodisp[eval]'
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanodisp.dispersion import Attached, attach


def main(name: str, text: str, steps: int = 100, length: int = 256, batch: int = 8, accumulate: int = 4) -> Attached:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.tensor(AutoTokenizer.from_pretrained(name)(Path(text).read_text(encoding="utf-8"))["input_ids"])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    handle = attach(model, lambda_disp=0.1)
    print(handle)
    for step in range(1, steps + 1):
        chosen = blocks[torch.randint(len(blocks), (accumulate, batch))]
        n_tokens = accumulate * batch * (length - 1)  # of all micro-batches: their losses are summed
        for micro in chosen:
            logits = model(micro).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, micro[:, 1:].flatten(), reduction="sum") / n_tokens
            handle.follow(loss, share=1 / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {accumulate * loss.item():.4f}  dispersion {handle.value:.4f}")
    return handle


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
