"""How OpenMP's threads wait for each other. Import this before torch, which reads the setting when it is loaded.

GNU OpenMP's threads spin for milliseconds before they sleep. That is fastest on an idle machine; where other processes
use the cores as well, a thread spins for one that is not running, and small steps become many times slower. Spinning
for a shorter, bounded time costs an idle machine next to nothing: `python -m bench.threads` measures it.

Importing this module sets GOMP_SPINCOUNT, unless the user has set it or OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os

SPIN_COUNT = "3000"

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
