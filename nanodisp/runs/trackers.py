"""Weights & Biases and TensorBoard, which receive a run's records besides metrics.jsonl if asked for.

Both get the scalars of a record as "val/loss" or "val/mean_cosine/layer_00", and no step twice.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from nanodisp.config import WandbConfig


class Tracker(Protocol):
    """The methods that `Metrics` calls. An error in one of them ends the tracker, not the run."""

    name: str

    def log(self, record: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Starts or resumes the W&B run whose id is kept in the run's folder."""

    name = "W&B"

    def __init__(self, folder: Path, config: dict[str, Any], wandb_config: WandbConfig) -> None:
        import wandb

        id_file, self.logged_file = folder / "wandb" / "id", folder / "wandb" / "logged"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        self.logged = set(self.logged_file.read_text().splitlines()) if self.logged_file.exists() else set()
        self.run = wandb.init(
            mode=wandb_config.mode,  # type: ignore[arg-type]
            project=wandb_config.project,
            entity=wandb_config.entity,
            group=wandb_config.group,
            tags=list(wandb_config.tags),
            name=folder.name,
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=config,
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        # steps repeated after an interruption have the same figures: keep those that W&B already has
        key = f"{record['step']} {record['split']}"
        if key not in self.logged:
            self.run.log({"step": record["step"], **scalars(record)})
            with self.logged_file.open("a") as file:
                file.write(key + "\n")

    def flush(self) -> None: ...

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Writes event files into the run's folder; events of an interrupted run after `step` are purged."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self.flush, self.close = self.writer.flush, self.writer.close

    def log(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers by name: "val/loss", and a list as "val/mean_cosine/layer_00", …; without nulls."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat |= {f"{key}/layer_{layer:02d}": each for layer, each in enumerate(value)}
        elif key not in ("step", "split"):
            flat[key] = value
    return {f"{record['split']}/{key}": value for key, value in flat.items() if value is not None}
