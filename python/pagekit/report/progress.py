"""Progress of long work, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

from rich import progress
from rich.console import Console


class Progress:
    """Shows one thing at a time. A context manager; at its end nothing is left on a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._said = ""

    def told(self, doing: str, done: int, of: int) -> None:
        """Show that ``done`` of ``of`` steps are done, and what comes now."""
        self._bar.update(self._task, description=doing, completed=done, total=of)
        kind = doing.partition(":")[0]
        if not self._console.is_terminal and kind != self._said:
            self._console.print(f"{kind} …")
            self._said = kind

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
