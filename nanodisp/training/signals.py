"""Being told to stop: by the user, by the machine's owner, by a scheduler that takes the machine back.

SIGINT, SIGTERM and SIGUSR1 do not interrupt a step. They leave a wish, which the training loop looks at
between steps: it saves and leaves with `EXIT_CODE`. A second SIGINT leaves at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class StopSignals:
    """While entered, notes the first of `SIGNALS` in `received`, by its name; None as long as there is none.

    Python allows handlers in the main thread alone: elsewhere signals keep their own way.
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
