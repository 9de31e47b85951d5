"""The dispersion loss in a Hugging Face Trainer, for any causal language model.

    python examples/hf_trainer.py model=<folder or hub id> data=<text file> to=<folder> lambda_disp=0.1

continues training the model on a text and writes it, with its tokenizer, to the folder `to`. Needs
`pip install 'nanodisp[eval]'`. Another project only has to copy `DispersionTrainer`.
Weights are read and written as safetensors; a model that comes with its own code is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from nanodisp import DispersionLoss, cli
from nanodisp.errors import UserError, first_line, optional


class DispersionTrainer(Trainer):
    """A Trainer that minimises cross-entropy + lambda_disp * dispersion; evaluation is cross-entropy alone.

    The dispersion is the mean over every layer's output, at `max_tokens` positions drawn again for each micro-batch.
    Padding would count as tokens: pack texts into full blocks instead.
    """

    def __init__(self, *args: Any, lambda_disp: float = 0.1, max_tokens: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.disperse, self.lambda_disp, self.max_tokens = DispersionLoss("angular"), lambda_disp, max_tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_hidden_states": True}
        loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
        positions = torch.randperm(inputs["input_ids"].size(1))[: self.max_tokens]
        terms = [self.disperse(hidden[:, positions.to(hidden.device)]) for hidden in out.hidden_states[1:]]
        dispersion = torch.stack([term.to(loss.device) for term in terms]).mean()  # layers may be on several GPUs
        # With num_items_in_batch the loss is already a share of the batch's; else the Trainer divides the sum.
        parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = loss + self.lambda_disp * dispersion / parts
        return (loss, out) if return_outputs else loss


@dataclass
class ExampleConfig:
    """What to train, on what, and how.

    model: a folder or a hub id.
    data: a text file.
    to: the folder to write.
    lambda_disp: weight of the dispersion loss.
    max_tokens: tokens of a sequence that it uses.
    block_size: tokens of a sequence.
    steps: optimizer updates.
    batch_size, accumulate: sequences of a forward pass, and passes of an update.
    lr: learning rate.
    seed: of the order of the sequences and the tokens drawn.
    """

    model: str = cli.MISSING
    data: str = cli.MISSING
    to: str = cli.MISSING
    lambda_disp: float = 0.1
    max_tokens: int = 256
    block_size: int = 256
    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 5e-5
    seed: int = 1

    def __post_init__(self) -> None:
        for name, lowest in (("max_tokens", 2), ("block_size", 2), ("steps", 1), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {lowest}")
        for name in ("lr", "lambda_disp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, at least 0")


def load(model: str) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        options = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(model, **options), tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"model={model} cannot be loaded: {first_line(error)}") from error


def read_blocks(path: str, tokenizer: Any, block_size: int) -> list[dict[str, torch.Tensor]]:
    """The text's tokens in full blocks, without the rest; the labels are the blocks, because models shift them."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"data={path} cannot be read: {error.strerror}; give a text file") from error
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
    if not len(blocks):
        raise UserError(f"data={path} has {len(tokens)} tokens: block_size={block_size} needs more text")
    return [{"input_ids": block, "labels": block} for block in blocks]


def main(argv: Sequence[str]) -> None:
    config = cli.parse(ExampleConfig, argv)
    optional("accelerate")  # the Trainer's own message is a page long
    if Path(config.to).is_file():
        raise UserError(f"to={config.to} is a file: give a folder")
    model, tokenizer = load(config.model)
    context = getattr(model.config, "max_position_embeddings", config.block_size)
    if config.block_size > context:
        raise UserError(f"block_size={config.block_size} is longer than the model's context: give block_size={context}")
    settings = TrainingArguments(
        output_dir=config.to,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        seed=config.seed,
        logging_steps=10,
        save_strategy="no",  # the Trainer's own checkpoints are pickles
        report_to="none",
    )
    trainer = DispersionTrainer(
        model,
        settings,
        train_dataset=read_blocks(config.data, tokenizer, config.block_size),
        lambda_disp=config.lambda_disp,
        max_tokens=config.max_tokens,
    )
    trainer.train()
    model.save_pretrained(config.to)
    tokenizer.save_pretrained(config.to)


if __name__ == "__main__":
    cli.run(main, ExampleConfig)
