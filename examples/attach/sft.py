"""The dispersion loss in TRL's SFTTrainer, which computes its loss outside of the model: `follow_trainer`.

python examples/attach/sft.py <model> <jsonl with prompt and completion> <folder to write>      needs pip install trl
"""

import sys
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nanodisp.dispersion import attach


def main(name: str, data: str, to: str, **settings: Any) -> SFTTrainer:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    handle = attach(model, lambda_disp=0.1)  # padding is left out: the attention mask says where it is
    print(handle)

    settings = {"max_steps": 100, "save_strategy": "no", "report_to": "none", **settings}
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=to, learning_rate=2e-5, gradient_accumulation_steps=4, **settings),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    handle.follow_trainer(trainer)
    trainer.train()
    print(f"dispersion {handle.value:.4f}")
    trainer.save_model(to)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
