"""What a command sets in its process before anything else is loaded. Import this first.

GNU OpenMP's threads spin for milliseconds before they sleep. That is fastest on an idle machine; where other processes
use the cores as well, a thread spins for one that is not running, and small steps become many times slower. Spinning
for a shorter, bounded time costs an idle machine next to nothing: `python -m bench.threads` measures it. torch reads
GOMP_SPINCOUNT when it is loaded; it is set here unless the user has set it or OMP_WAIT_POLICY.

Ctrl-C ends a command without a traceback, also while torch is loaded, which takes seconds.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

SPIN_COUNT = "3000"

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Like `sys.excepthook`, without a traceback for Ctrl-C; the exit code stays that of an interrupt."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
