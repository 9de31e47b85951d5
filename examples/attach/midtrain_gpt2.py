"""The paper's mid-training of GPT-2 in a loop of its own; `train.py experiment=midtrain_gpt2` is the same with ours.

python examples/attach/midtrain_gpt2.py <gpt2 or its folder> <text file> <folder to write>     needs 'nanodisp[eval]'
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from nanodisp.dispersion import Attached, attach


def main(name: str, text: str, to: str, steps: int = 1526, length: int = 1024, batch: int = 32, n: int = 4) -> Attached:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, device_map=device).train()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8"), verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 5, steps)
    handle = attach(model, variant="angular", lambda_disp=0.1, max_tokens=256, clamp=0.1)
    for step in range(1, steps + 1):
        for micro in blocks[torch.randint(len(blocks), (n, batch))].to(device):
            with torch.autocast(device, torch.bfloat16):
                loss = model(micro, labels=micro).loss
            (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}  dispersion {handle.value:.4f}")
    model.save_pretrained(to)
    return handle


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
