"""Where the numbers of a run go: the terminal, metrics.jsonl and, if asked for, Weights & Biases and TensorBoard.

Only rank 0 has any of it; on other ranks every call does nothing. A record is one line of
metrics.jsonl, and what the others get: "step" is the number of updates done, "split" is "train", "val", "task" (answers
to multiple-choice questions) or "condensation" (mean cosine by layer alone, more often; not shown).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanodisp.errors import UserError, first_line, optional

WANDB_MODES = ("disabled", "offline", "online")
GUESTS = {"wandb": "W&B", "tensorboard": "TensorBoard"}


@dataclass
class WandbConfig:
    """Weights & Biases.

    mode: "disabled", "offline" (files in the run's folder, for `wandb sync`) or "online".
    project, entity, group, tags: as W&B understands them.
    """

    mode: str = "disabled"
    project: str = "nanodisp"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise ValueError(f"wandb.mode={self.mode} is unknown; choose one of {', '.join(WANDB_MODES)}")


class Metrics:
    """The numbers of one run.

    As a context it holds the run's folder for itself, and leaves what ended the run in `error.txt`.

    Args:
        folder: the run's folder, made if need be; None on ranks other than 0.

    Raises UserError when another process has the folder, or it can not be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.enabled = folder is not None
        self.progress: Progress | None = None
        self.wandb: Any = None
        self.tensorboard: Any = None
        self.file: Any = None
        if folder is None:
            return
        self.folder, self.path, self.error_file = folder, folder / "metrics.jsonl", folder / "error.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
        except BlockingIOError:
            raise UserError(
                f"another process is training into {folder}; wait for it, or give another run_name"
            ) from None
        except OSError as error:
            raise UserError(f"the run's folder {folder} can not be written: {error}; choose another out_dir") from error

    def begin(
        self,
        *,
        config: dict[str, Any],
        wandb_config: WandbConfig,
        step: int,
        total_steps: int,
        tensorboard: bool = False,
    ) -> None:
        """Open the records.

        Args:
            config: the whole configuration as plain containers, for W&B.
            wandb_config: see `WandbConfig`.
            step, total_steps: where the run begins and ends. Records of later steps than `step`,
                left by an interrupted run, are dropped: they are about to be made again.
            tensorboard: whether TensorBoard gets the records too.

        Raises UserError when the records can not be written, or tensorboard is asked for and not installed.
        """
        if not self.enabled:
            return
        if tensorboard:
            optional("tensorboard", extra="tensorboard")
        try:
            self.error_file.unlink(missing_ok=True)  # of an earlier attempt
            drop_records_after(self.path, step)
            self.file = self.path.open("a")
        except OSError as error:
            raise self._not_written(error) from error
        self.total_steps = total_steps
        self.console = Console(highlight=False, soft_wrap=True, emoji=False)
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar = self.progress.add_task("training", total=total_steps, completed=max(step, 0))
            self.progress.start()
        if wandb_config.mode != "disabled":
            self._start_wandb(self.folder, config, wandb_config)
        if tensorboard and step < total_steps:
            self._guarded("tensorboard", "start", lambda: self._start_tensorboard(step))

    def say(self, text: str) -> None:
        """A line for the reader, above the progress line."""
        if self.enabled:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the live progress line, on a terminal."""
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """Write one record to metrics.jsonl, W&B and TensorBoard, and show it."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps({key: _json_number(value) for key, value in record.items()}) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._not_written(error) from error
        if record["split"] != "condensation":  # too many lines to read
            self.say(describe(record, self.total_steps))
        self._guarded("wandb", "log", lambda: self._log_to_wandb(record))
        self._guarded("tensorboard", "log", lambda: self._log_to_tensorboard(record))

    def flush(self) -> None:
        """What was recorded survives a power cut."""
        if self.enabled:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:  # a quota, or a disk in a network, may tell only now
                raise self._not_written(error) from error
            if self.tensorboard is not None:
                self._guarded("tensorboard", "flush", self.tensorboard.flush)

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} can not be written: {error.strerror}. Checkpoints are whole; free some space or mend the "
            "permissions, and run the same command again to go on"
        )

    def close(self) -> None:
        if not self.enabled:
            return
        if self.progress is not None:
            self.progress.stop()
        with contextlib.suppress(OSError):  # what could not be written has been told
            if self.file is not None:
                self.file.close()
        self.lock.close()
        if self.wandb is not None:
            self._guarded("wandb", "finish", self.wandb.finish)
        if self.tensorboard is not None:
            self._guarded("tensorboard", "close", self.tensorboard.close)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if self.file is not None and isinstance(
            error, Exception
        ):  # not an interruption: that run is unfinished, not failed
            with contextlib.suppress(OSError):
                self.error_file.write_text("".join(traceback.format_exception(error)))
        self.close()

    def _start_wandb(self, folder: Path, config: dict[str, Any], wandb_config: WandbConfig) -> None:
        """Join or go on with the W&B run whose id stands in the run's folder."""
        id_file = folder / "wandb" / "id"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))

        self.logged_file = folder / "wandb" / "logged"
        self.logged = set(self.logged_file.read_text().splitlines()) if self.logged_file.exists() else set()

        def start() -> None:
            import wandb

            self.wandb = wandb.init(
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
            self.wandb.define_metric("*", step_metric="step")

        self._guarded("wandb", "init", start)

    def _log_to_wandb(self, record: dict[str, Any]) -> None:
        # What W&B has it keeps: of steps that are made again after an interruption, which are the same, nothing twice.
        key = f"{record['step']} {record['split']}"
        if self.wandb is not None and key not in self.logged:
            self.wandb.log({"step": record["step"], **scalars(record)})
            with self.logged_file.open("a") as file:
                file.write(key + "\n")

    def _start_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what an interrupted run wrote from purge_step on.
        self.tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)

    def _log_to_tensorboard(self, record: dict[str, Any]) -> None:
        if self.tensorboard is not None:
            for name, value in scalars(record).items():
                self.tensorboard.add_scalar(name, value, record["step"])

    def _guarded(self, guest: str, what: str, action: Callable[[], object]) -> None:
        """W&B and TensorBoard are guests: whatever goes wrong there, training goes on."""
        try:
            action()
        except Exception as error:
            setattr(self, guest, None)
            self.say(
                f"{GUESTS[guest]} {what} failed ({first_line(error)}): the run goes on without it; "
                "metrics.jsonl has everything"
            )


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers as W&B and TensorBoard know them: "val/loss", "val/mean_cosine/layer_00"; nulls left out."""
    split = record["split"]
    layers = {f"mean_cosine/layer_{layer:02d}": value for layer, value in enumerate(record.get("mean_cosine", ()))}
    values = {key: value for key, value in record.items() if key not in ("step", "split", "mean_cosine")} | layers
    return {f"{split}/{key}": value for key, value in values.items() if value is not None}


def describe(record: dict[str, Any], total_steps: int) -> str:
    """A record as one line of text."""
    parts = [f"step {record['step']:>{len(str(total_steps))}}/{total_steps}", f"{record['split']:5}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("bpb", "bpb {:.4f}"),
        ("accuracy", "accuracy {:.4f}"),
        ("examples", "of {:,}"),
        ("dispersion", "dispersion {:.4f}"),
        ("distillation", "distillation {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad {:.2f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "mfu {:.1%}"),
    ):
        if record.get(key) is not None:
            parts.append(form.format(record[key]))
    if "mean_cosine" in record:
        parts.append("mean cosine by layer " + " ".join(f"{value:.2f}" for value in record["mean_cosine"]))
    return "  ".join(parts)


def drop_records_after(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`, atomically; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write("".join(kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The whole records of a metrics.jsonl, of one split or of all: a line that a kill cut short is passed over.

    Each has a "split" and an integer "step"; nothing else is sure of a file that somebody else may have written.
    """
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            if record["split"] == split or split is None:
                records.append(record)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
    return records
