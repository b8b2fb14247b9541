"""How verbs that start processes end: in order, whatever ends them."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def end_on_sigterm() -> None:
    """Make SIGTERM end this process as Ctrl-C does: through every ``finally``."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
