"""The dispersion loss in Lightning: the accumulation of its Trainer reaches the dispersion through the model's loss.

python examples/attach/lightning_module.py <model> <text file>                      needs pip install lightning
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanodisp.dispersion import attach


class Module(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()
        self.handle = attach(self.model, lambda_disp=0.1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


def main(name: str, text: str, length: int = 256, **settings: Any) -> Module:
    ids: Any = torch.tensor(AutoTokenizer.from_pretrained(name)(Path(text).read_text(encoding="utf-8"))["input_ids"])
    blocks = DataLoader(ids[: len(ids) // length * length].view(-1, length), batch_size=8, shuffle=True)
    module, settings = Module(name), {"max_steps": 100, "accumulate_grad_batches": 4, **settings}
    lightning.Trainer(**settings).fit(module, blocks)
    return module


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
