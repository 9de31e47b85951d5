"""What a command sets in its process before anything else is loaded. Import this first.

GNU OpenMP's threads spin for milliseconds before they sleep. That is fastest on an idle machine; where other processes
use the cores as well, a thread spins for one that is not running, and small steps become many times slower. Spinning
for a shorter, bounded time costs an idle machine next to nothing: `python -m bench.threads` measures it. torch reads
GOMP_SPINCOUNT when it is loaded; it is set here unless the user has set it or OMP_WAIT_POLICY.

Ctrl-C ends a command of ours at once and without a traceback. A KeyboardInterrupt could not do that: while torch and
others are loaded, which takes seconds, they turn it into errors of their own. A training run saves first
(`training/signals.py`), and chooses when Python collects garbage. Before its first step there is nothing to save: then
SIGTERM and SIGUSR1, by which a scheduler takes the machine back, end it at once with the exit code that says "again".

Where code that is not Python's crashes (SIGSEGV, SIGABRT), a command of ours says where each of its threads was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SPIN_COUNT = "3000"
NOT_DONE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train.py", "sample.py", "nanodisp", "data", "bench", "examples")  # files and folders with commands


def end_quietly(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(2, f"{show_cursor}\ninterrupted\n".encode())
    os._exit(130)


def end_before_the_first_step(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: ended before a step, nothing to save\n".encode())
    os._exit(NOT_DONE)


def is_ours(program: str) -> bool:
    """Whether a program's file is one of our commands, and not one that merely imports them, such as pytest."""
    path = Path(program).resolve()
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[:1] in [(name,) for name in COMMANDS]


@contextlib.contextmanager
def garbage_collected_by_hand() -> Iterator[None]:
    """In the block, Python looks for garbage only where `gc.collect` is called, and not among what exists already.

    Its own collections go through all objects of torch, which takes a tenth of a second, in the middle of a step; one
    rank that does so keeps the others waiting.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
if is_ours(getattr(sys.modules["__main__"], "__file__", None) or ""):
    signal.signal(signal.SIGINT, end_quietly)
    with contextlib.suppress(RuntimeError, OSError):  # stderr is closed, or no file
        faulthandler.enable()
    if Path(sys.modules["__main__"].__file__ or "").name == "train.py":
        signal.signal(signal.SIGTERM, end_before_the_first_step)
        signal.signal(signal.SIGUSR1, end_before_the_first_step)
