"""Where the numbers of a run go: the terminal, metrics.jsonl and, if asked for, Weights & Biases.

Only rank 0 has any of it; on other ranks every call does nothing. A record is one line of
metrics.jsonl, and what W&B gets: "step" is the number of updates done, "split" is "train", "val" or
"condensation" (mean cosine by layer alone, more often; not shown).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanodisp.errors import UserError

WANDB_MODES = ("disabled", "offline", "online")


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

    def begin(self, *, config: dict[str, Any], wandb_config: WandbConfig, step: int, total_steps: int) -> None:
        """Open the records.

        Args:
            config: the whole configuration as plain containers, for W&B.
            wandb_config: see `WandbConfig`.
            step, total_steps: where the run begins and ends. Records of later steps than `step`,
                left by an interrupted run, are dropped: they are about to be made again.
        """
        if not self.enabled:
            return
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

    def say(self, text: str) -> None:
        """A line for the reader, above the progress line."""
        if self.enabled:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the live progress line, on a terminal."""
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """Write one record to metrics.jsonl and W&B, and show it."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps({key: _json_number(value) for key, value in record.items()}) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._not_written(error) from error
        if record["split"] != "condensation":  # too many lines to read
            self.say(describe(record, self.total_steps))
        if self.wandb is not None:
            split = record["split"]
            values = {f"{split}/{key}": value for key, value in record.items() if key not in ("split", "mean_cosine")}
            for layer, value in enumerate(record.get("mean_cosine", ())):
                values[f"{split}/mean_cosine/layer_{layer:02d}"] = value
            self._guarded("log", lambda: self.wandb.log({"step": record["step"], **values}))

    def flush(self) -> None:
        """What was recorded survives a power cut."""
        if self.enabled:
            os.fsync(self.file.fileno())

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
            self._guarded("finish", lambda: self.wandb.finish())

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

        self._guarded("init", start)

    def _guarded(self, what: str, action: Any) -> None:
        """W&B is a guest: whatever goes wrong there, training goes on."""
        try:
            action()
        except Exception as error:
            self.wandb = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.say(f"W&B {what} failed ({reason[0]}): the run goes on without it; metrics.jsonl has everything")


def describe(record: dict[str, Any], total_steps: int) -> str:
    """A record as one line of text."""
    parts = [f"step {record['step']:>{len(str(total_steps))}}/{total_steps}", f"{record['split']:5}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("bpb", "bpb {:.4f}"),
        ("dispersion", "dispersion {:.4f}"),
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
