"""The model card of an exported run: description, figures, configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nanodisp.data.tokenizer import Tokenizer
from nanodisp.data.tokenizer_json import JsonTokenizer
from nanodisp.hf.families import TITLES
from nanodisp.hf.tokenizer import END_OF_TEXT
from nanodisp.runs import checkpoint
from nanodisp.runs.metrics import METRICS, read_records


def model_card(saved: checkpoint.Checkpoint, kind: str, tokenizer: Tokenizer | None) -> str:
    """README.md: figures of the last validation up to the checkpoint, and the configuration without local paths.

    `kind` is the model_type of its config.json.
    """
    run = saved.path.resolve().parent.parent
    published = ("model", "data", "dispersion", "optim", "train", "seed", "init_from")
    config: dict[str, Any] = {key: saved.state["config"][key] for key in published if key in saved.state["config"]}
    config["data"] = {key: value for key, value in config["data"].items() if key not in ("path", "folder")}
    interventions = saved.state["config"].get("intervention", {})
    if used := {key: value for key, value in interventions.items() if value is not None}:
        config["intervention"] = used
    config["train"] = {key: value for key, value in config["train"].items() if key != "eval_task"}
    config["data"]["tokenizer"] = without_path(config["data"]["tokenizer"])
    for section, key in ((config, "init_from"), (config.get("intervention", {}), "teacher")):
        if section.get(key) is not None:
            section[key] = without_path(section[key])
    figures = ["The model has not been validated."]
    validations = [record for record in read_records(run / METRICS, "val") if record["step"] <= saved.step]
    if validations:
        last = validations[-1]
        rows = {"loss, nats per token": last.get("loss"), "bits per byte": last.get("bpb")}
        cosines = " ".join(as_text(cosine, ".3f") for cosine in last.get("mean_cosine") or ())
        figures = [f"| validation at step {last['step']} | |", "| --- | --- |"]
        figures += [f"| {what} | {as_text(value, '.4f')} |" for what, value in rows.items() if value is not None]
        figures += [f"| mean cosine of a sequence's tokens, from the embedding to the last layer | {cosines} |"]
    table = "\n".join(figures)
    end = tokenizer.end if isinstance(tokenizer, JsonTokenizer) else END_OF_TEXT
    documents = f" A document begins\nafter `{end}`, which no text encodes to." if tokenizer is not None else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanodisp, {kind}]
---

# {run.name}

A {TITLES[kind]} trained with nanodisp for {saved.step:,} steps, {saved.state.get("tokens", 0):,} tokens.{documents}

{table}

```yaml
{OmegaConf.to_yaml(OmegaConf.create(config))}```
"""


def without_path(name: str) -> str:
    """A hub id as it is; of a local path the last part."""
    of_hub = re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?", name) and not Path(name.removeprefix("hf:")).exists()
    return name if of_hub else Path(name).name


def as_text(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "nan"
