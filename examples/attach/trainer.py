"""The dispersion loss in a Hugging Face Trainer: `attach` before it is made, and a callback that logs its value.

python examples/attach/trainer.py <model> <text file> <folder to write>        needs pip install 'nanodisp[eval]'
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from nanodisp.dispersion import attach


def main(name: str, text: str, to: str, length: int = 256, **settings: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ids = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8"), verbose=False)["input_ids"])
    blocks = [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]

    handle = attach(model, lambda_disp=0.1)
    print(handle)

    class LogDispersion(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                state.log_history[-1]["dispersion"] = logs["dispersion"] = handle.value

    settings = {"max_steps": 100, "logging_steps": 10, "save_strategy": "no", "report_to": "none", **settings}
    arguments = TrainingArguments(output_dir=to, learning_rate=5e-5, gradient_accumulation_steps=4, **settings)
    trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[LogDispersion()])
    trainer.train()
    trainer.save_model(to)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
