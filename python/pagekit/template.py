"""Templates: where memory comes from, and the page cache that its forks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ._closing import Closing
from ._native import core
from .callback import Callback, source_of
from .working_set import Recording, Replay, WorkingSet

PAGE_SIZE = 4096
"""Bytes in a page."""


class Template(Closing):
    """An opened stack (a source, and layers around it) with its shared page cache.

    A page is fetched once, whoever asks for it, and kept for all forks until :meth:`close`.

    Args:
        spec: where the pages come from: ``file:PATH``, ``zero:SIZE``, or
            ``python:MODULE:FUNCTION:SIZE[,timeout=30s]``; or that function itself.
        size: bytes, a multiple of :attr:`page_size`; with a function only.
        layers: pieces around the source, outermost first: ``stats``, ``delay=2ms,1GB/s,16``
            (a store that far away, that fast, with so many requests at once), ``fail=3``, ``pass``.
        deadline: seconds after which a page is given up whose fetch still fails.

    A function is called with (offset, length), multiples of the page size, and returns exactly so
    many bytes (any object with a buffer), or None for zeros: the same ones whenever it is asked. It
    runs in a helper process, a fresh interpreter that imports its module; never in this one, where
    a thread that waits for a page may hold the GIL. One call is under way at a time.

    Raises:
        UsageError: a spec that means nothing, a file that is no memory image, or a function that a
            helper process cannot import.
        Missing: there is no such file.
        CallbackError: the module of a function raises when it is imported.
        SourceTimeout: it is not imported in time.
        Unsupported: not Linux, or pages of another size than 4096 bytes.

    Threads: every method may be called from any thread; those that fetch give up the GIL meanwhile.
    """

    def __init__(
        self,
        spec: str | Callback,
        *,
        size: int | None = None,
        layers: Sequence[str] = (),
        deadline: float = 5.0,
    ) -> None:
        spec = source_of(spec, size)
        self._core = core().Template(spec, list(layers), deadline)
        self.spec = spec
        self.layers = tuple(layers)
        self.page_size = PAGE_SIZE

    @property
    def size(self) -> int:
        """Bytes, a multiple of :attr:`page_size`."""
        return int(self._core.size())

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, of any alignment, fetched where they are absent.

        Raises:
            UsageError: it reaches beyond the template.
            SourceError: a fetch failed until the deadline.
            CallbackError: the function that makes the page raised (that is the ``__cause__``), or
                returned something else than so many bytes.
            SourceTimeout: it did not return in time.
            IntegrityError: the source was cut short, or the template is damaged.
        """
        return bytes(self._core.read(offset, length))

    def load(self, *, request: int = 1 << 20, parallel: int | None = None) -> None:
        """Fetches everything that is not there yet. Raises as :meth:`read` does.

        Args:
            request: bytes of one read of the source, 2 MiB at most.
            parallel: reads at once; as many as suit the source if None.
        """
        self._core.load(request, parallel)

    def record(self) -> Recording:
        """Begins to record which pages forks demand, instead of what was recorded before.

        Pages come one by one while it lasts, so that each is demanded itself. Over ``share``, pages
        that are in the template already never trap and are not seen: begin with an empty template.

        Raises:
            SourceError, IntegrityError: the source cannot be asked what it is.
        """
        return Recording(self._core.record())

    def replay(
        self,
        working_set: WorkingSet,
        *,
        rest: bool = False,
        rate: int | None = None,
        parallel: int | None = None,
    ) -> Replay:
        """Fetches the pages of ``working_set`` ahead, in the background, for all forks at once.

        What is critical also goes on, as it comes, into memory that has to be filled itself:
        targets of ``copy``, and the kernel's cache of a mount, those that attach later included.

        Args:
            working_set: what to fetch; it must have been recorded of the same content.
            rest: fetch also what was demanded only after "ready", into the template's file.
            rate: bytes a second at most; as fast as the source is if None.
            parallel: reads at once; as many as suit the source if None, leaving some to demand.

        Raises:
            IntegrityError: the working set is of another template.
            SourceError: the source cannot be asked what it is.
        """
        return Replay(self._core.replay(working_set._core, rest, rate, parallel))

    def audit(self) -> None:
        """Compares the shared file with the record of what was published.

        Raises:
            IntegrityError: the file holds a page that was never published, because some process
                read a hole of it; nothing is served from the template any more.
        """
        self._core.audit()

    def statistics(self) -> dict[str, Any]:
        """Counters, now: ``present_pages``, ``zero_pages``, ``fetches``, ``bytes_read``, …"""
        statistics: dict[str, Any] = json.loads(self._core.statistics())
        statistics["stack"] = dict(statistics["stack"])
        return statistics

    def close(self) -> None:
        """Lets go of the pages, once no server and no fork uses them. Closing twice is fine."""
        self._core.close()

    def __repr__(self) -> str:
        return f"Template({self.spec!r}, layers={self.layers!r})"
