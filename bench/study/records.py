"""The records of the study: docs/study/records/<design>.jsonl has one line for every finished run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.study import tokens
from bench.study.plan import Losses, Size
from nanodisp.runs.evaluation import EVALUATION, read_evaluation
from nanodisp.runs.metrics import METRICS, read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "study" / "records"


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def final_loss(folder: Path) -> float | None:
    """The validation loss of a finished run, infinite where it diverged; None for a run that is not finished."""
    error = folder / "error.txt"
    if error.is_file() and "not finite" in error.read_text():
        return math.inf
    if not (folder / "config.yaml").is_file():
        return None
    config = OmegaConf.load(folder / "config.yaml")
    total = math.ceil(config.train.tokens / (config.train.batch_size * config.model.block_size))
    last = [r for r in read_records(folder / METRICS) if r["split"] == "val" and r["step"] >= total]
    saved = (folder / "checkpoints" / f"step_{total:08d}").is_dir()
    return (math.inf if last[-1]["loss"] is None else last[-1]["loss"]) if last and saved else None


def known_losses(out: Path) -> Losses:
    """Of the runs that are recorded, and of those in `out`."""
    losses: Losses = {}
    for record in recorded(RECORDS):
        losses[record["name"]] = math.inf if record["loss"] is None else record["loss"]
    for folder in sorted(out.glob("*/")):
        if (loss := final_loss(folder)) is not None:
            losses[folder.name] = loss
    return losses


def compact(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Some keys of a metrics record, with floats rounded."""

    def shorten(value: Any) -> Any:
        if isinstance(value, list):
            return [shorten(item) for item in value]
        return round(value, 6 if abs(value) > 1 else 5) if isinstance(value, float) else value

    return {key: shorten(record[key]) for key in keys if record.get(key) is not None}


def record_of(folder: Path) -> dict[str, Any]:
    """Everything about a finished run that the report needs, without paths."""
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for key in ("wandb", "out_dir", "run_name", "device", "resume", "dry_run", "tensorboard", "command"):
        config.pop(key, None)
    for key in ("path", "folder"):
        config["data"].pop(key, None)
    config["data"]["tokenizer"] = Path(config["data"]["tokenizer"]).name
    for section, key in ((config, "init_from"), (config["intervention"], "teacher")):
        section[key] = section[key] and Path(section[key]).name
    metrics = read_records(folder / METRICS)
    validations = [r for r in metrics if r["split"] == "val"]
    model = config["model"]
    size = Size(model["n_layer"], model["n_embd"], model["n_head"], block_size=model["block_size"])
    about = json.loads((folder / "machine.json").read_text())
    evaluated = read_evaluation(folder / EVALUATION)
    train = ("step", "loss", "dispersion", "grad_norm", "tokens_per_second")
    return {
        **{"name": folder.name, "design": folder.name.partition("-")[0], "loss": validations[-1]["loss"]},
        **{"non_embedding": size.non_embedding, "parameters": size.total(model["vocab_size"])},
        **{"seconds": validations[-1]["seconds"], **about},
        "val": [compact(r, ("step", "loss", "bpb", "mean_cosine")) for r in validations],
        "train": [compact(r, train) for r in metrics if r["split"] == "train"],
        "condensation": [compact(r, ("step", "mean_cosine")) for r in metrics if r["split"] == "condensation"],
        **tokens.read(folder),
        "tasks": {task: tasks_entry(entry) for task, entry in evaluated.get("tasks", {}).items()},
        "config": config,
    }


def one_line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"))


def tasks_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A benchmark in a record: its number of examples, and each metric's value."""
    return {"examples": entry["examples"], **{name: figure["value"] for name, figure in entry["metrics"].items()}}


def write_records(out: Path) -> None:
    """Add the finished runs of `out` to the records, one file for each design; failed ones with null as their loss."""
    by_design: dict[str, dict[str, str]] = {}
    for record in recorded(RECORDS):
        by_design.setdefault(record["design"], {})[record["name"]] = one_line(record)
    for folder in sorted(out.glob("*/")):
        if (loss := final_loss(folder)) is not None:
            record = record_of(folder) | ({"loss": None} if loss == math.inf else {})
            by_design.setdefault(record["design"], {})[folder.name] = one_line(record)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for design, lines in sorted(by_design.items()):
        (RECORDS / f"{design}.jsonl").write_text("".join(lines[name] + "\n" for name in sorted(lines)))
        print(f"{design}: {len(lines)} runs")
