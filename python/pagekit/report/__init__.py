"""How results are shown: as JSON for programs, as tables for people."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 100


def console() -> Console:
    """Standard output: as wide as the terminal, or as a page if it is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH)
