"""The figures of a run: metrics.jsonl, the terminal, and the trackers (`trackers.py`).

Only ranks with a folder (0, or the first of each host) write; on others every call does nothing. A record is one line
of metrics.jsonl: "step" is the number of updates done, "split" is "train", "val", "task" (questions and benchmarks) or
"condensation" (only the layers' figures, recorded more often and not shown). Every other key is a figure under its own
name, a number or a list with one per layer; a new one is recorded, shown and tracked without a change here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanodisp.condensation.layers import NOT_ON_THE_TERMINAL
from nanodisp.config import WandbConfig
from nanodisp.errors import InUse, UserError, first_line, optional, to_stderr
from nanodisp.files import finite, write_whole
from nanodisp.runs.trackers import TensorBoard, Tracker, Wandb

METRICS = "metrics.jsonl"

# The format of a figure, if not "name 1.2345".
FORMS = {
    "examples": "of {:,}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
}
NOT_SHOWN = ("step", "split", "tokens", "seconds", "bad_steps", "lambda_disp", *NOT_ON_THE_TERMINAL)


class Metrics:
    """The figures of one run.

    Locks the run's folder until it is closed; as a context, it writes the error that ended the run to `error.txt`.

    Args:
        folder: the run's folder, created if needed; None on ranks that write nothing.

    Raises UserError when another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.enabled = folder is not None
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self.file: Any = None
        self.first_lap: tuple[float, int] | None = None  # time and step of the first training figures
        if folder is None:
            return
        self.folder, self.path, self.error_file = folder, folder / METRICS, folder / "error.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("w")
            take(self.lock, folder)
        except BlockingIOError:
            raise InUse(f"another process is training into {folder}; wait for it, or give another run_name") from None
        except OSError as error:
            raise UserError(f"the run's folder {folder} cannot be written: {error}; choose another out_dir") from error

    def begin(
        self,
        *,
        config: dict[str, Any],
        wandb_config: WandbConfig,
        step: int,
        total_steps: int,
        tensorboard: bool = False,
        quiet: bool = False,
    ) -> None:
        """Open the records.

        Args:
            config: the full configuration as plain containers, for W&B.
            wandb_config: see `WandbConfig`.
            step, total_steps: where the run begins and ends. Records of steps after `step`, left by an interrupted run,
                are dropped: training will write them again.
            tensorboard: whether TensorBoard gets the records too.
            quiet: only write metrics.jsonl: another rank prints, and has the trackers.

        Raises UserError when the records cannot be written, or tensorboard is asked for but not installed.
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
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=quiet)
        if quiet:
            return
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
            self._start(Wandb.name, lambda: Wandb(self.folder, config, wandb_config))
        if tensorboard and step < total_steps:
            self._start(TensorBoard.name, lambda: TensorBoard(self.folder, step))

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        if self.enabled:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress line, if stdout is a terminal."""
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """Write one record to metrics.jsonl and the trackers, and print it."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps(finite(record)) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._not_written(error) from error
        if record["split"] != "condensation":  # too many lines to read
            self.say(describe(record, self.total_steps) + self._remaining(record))
        self._each("log", lambda tracker: tracker.log(record))

    def flush(self) -> None:
        """Make sure that all records survive a power cut."""
        if not self.enabled:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:  # a quota, or a network disk, may report it only now
            raise self._not_written(error) from error
        self._each("flush", lambda tracker: tracker.flush())

    def close(self) -> None:
        if not self.enabled:
            return
        if self.progress is not None:
            self.progress.stop()
        with contextlib.suppress(OSError):  # already reported
            if self.file is not None:
                self.file.close()
        self.lock.close()
        self._each("close", lambda tracker: tracker.close())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if self.file is not None and isinstance(error, Exception):  # an interrupted run is unfinished, not failed
            with contextlib.suppress(OSError):
                self.error_file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        self.close()

    def _remaining(self, record: dict[str, Any]) -> str:
        """The time that the run will still take, for lines of training figures without a progress bar."""
        if self.progress is not None or record["split"] != "train":
            return ""
        began, first = self.first_lap = self.first_lap or (time.perf_counter(), record["step"])
        if not first < record["step"] < self.total_steps:
            return ""
        seconds = (time.perf_counter() - began) / (record["step"] - first) * (self.total_steps - record["step"])
        return f"  {datetime.timedelta(seconds=round(seconds))} left"

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written: {error.strerror}. Checkpoints are intact; free some space or fix the "
            "permissions, and run the same command again to resume"
        )

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self.trackers.append(make())
        except Exception as error:
            self._tracker_failed(name, "start", error)

    def _each(self, what: str, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self._tracker_failed(tracker.name, what, error)

    def _tracker_failed(self, name: str, what: str, error: Exception) -> None:
        """Report an error of a tracker; training continues without it."""
        self.say(
            f"{name} {what} failed ({first_line(error)}): the run continues without it; metrics.jsonl has everything"
        )


def take(lock: TextIO, folder: Path) -> None:
    """Lock a run's folder; the system releases it when the process ends. Some network file systems have no locks.

    Raises BlockingIOError when another process holds it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        to_stderr(f"{folder}: its file system has no locks ({error.strerror}): let no other process train into it")


def describe(record: dict[str, Any], total_steps: int) -> str:
    """A record as one line of text, without what is None."""
    parts = [f"step {record['step']:>{len(str(total_steps))}}/{total_steps}", f"{record['split']:5}"]
    for key, value in record.items():
        if isinstance(value, list) and key not in NOT_SHOWN:
            parts.append(f"{key.replace('_', ' ')} by layer " + " ".join(f"{each:.2f}" for each in value))
        elif key not in NOT_SHOWN and value is not None:
            parts.append(FORMS.get(key, key.replace("_", " ") + " {:.4f}").format(value))
    return "  ".join(parts)


def drop_records_after(path: Path, step: int) -> None:
    """Keep the complete lines of steps up to `step`, atomically; a line cut short by a kill is dropped too."""
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
    write_whole(path, "".join(kept).encode())


def read_records(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The complete records of a metrics.jsonl, of one split or of all; a line that a kill cut short is skipped.

    Each has a "split" and an integer "step"; nothing else is guaranteed in a file that anybody may have written.
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
