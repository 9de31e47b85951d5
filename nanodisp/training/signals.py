"""Requests to stop, from the user or from a scheduler that takes the machine back.

SIGINT, SIGTERM and SIGUSR1 do not interrupt a step. They set a flag that the training loop checks between steps: it
saves and exits with `EXIT_CODE`. A second SIGINT exits at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from nanodisp.process import NOT_DONE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = NOT_DONE


class StopSignals:
    """As a context, keeps the name of the first of `SIGNALS` to arrive in `received` (None until then).

    Python allows signal handlers only in the main thread: in another one this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
