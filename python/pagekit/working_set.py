"""Working sets: the pages that forks demand before they are ready, recorded and replayed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Self

from ._native import core

if TYPE_CHECKING:
    from .template import Template

_PAGE_SIZE = 4096


class WorkingSet:
    """Pages of a template in the coarse order in which they were demanded.

    *Critical* are those that were demanded before the sandbox was ready. Made by
    :meth:`Recording.finish` or :meth:`load`, never changed. Sets of one template are united by
    ``|``: a page is as early, and as critical, as in the one that has it earlier.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self.identity, self.recordings, self.critical_pages, self.pages = core.described()
        """What the template is (hexadecimal); how many recordings are united; how many pages."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that :meth:`save` wrote.

        Raises:
            Missing: it cannot be read.
            IntegrityError: it is no working set, or damaged.
        """
        return cls(core().WorkingSet.load(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file, whole or not at all; one that is there is replaced.

        Raises:
            Missing: the file cannot be written there.
        """
        self._core.save(path)

    def check(self, template: Template) -> None:
        """Raises :class:`~pagekit.errors.IntegrityError` if it is of another template."""
        template._core.check(self._core)

    @property
    def bytes(self) -> int:
        """Bytes of all its pages."""
        return int(self.pages * _PAGE_SIZE)

    @property
    def phases(self) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
        """Runs of pages, as (first page, pages), in phases from early to late: the critical ones,
        and the others."""
        critical, rest = self._core.phases()
        return critical, rest

    def page_numbers(self) -> set[int]:
        """The numbers of all its pages."""
        critical, rest = self.phases
        return {
            page
            for phase in critical + rest
            for start, pages in phase
            for page in range(start, start + pages)
        }

    def __or__(self, other: WorkingSet) -> WorkingSet:
        """Both in one.

        Raises:
            IntegrityError: they are of different templates.
        """
        if not isinstance(other, WorkingSet):
            return NotImplemented
        return WorkingSet(self._core.union(other._core))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkingSet) and bool(self._core.equals(other._core))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"WorkingSet({self.critical_pages} critical pages of {self.pages}, "
            f"{self.recordings} recordings of {self.identity[:16]}…)"
        )


class Recording:
    """A recording under way, made by :meth:`pagekit.Template.record`. For any thread."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def ready(self) -> None:
        """The sandbox is ready: what is demanded later is not critical. The first call counts."""
        self._core.ready()

    def finish(self, *, settle: float | None = None, time: float | None = None) -> WorkingSet:
        """Ends the recording and returns what was demanded.

        Without a call of :meth:`ready`, everything is critical, unless one of these says otherwise:

        Args:
            settle: what comes after nothing new was demanded for so many seconds is not critical.
            time: what comes so many seconds after the first demand is not critical.
        """
        self._core.stop()
        return WorkingSet(self._core.working_set(settle, time))


class Replay:
    """A replay under way, made by :meth:`pagekit.Template.replay`. For any thread."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def wait(self, timeout: float = 3600.0) -> bool:
        """Waits until everything is fetched; false if ``timeout`` seconds pass first.

        Raises:
            SourceError, IntegrityError: why it ended early. Pages that are demanded are still
                fetched.
        """
        return bool(self._core.wait(timeout))

    def cancel(self) -> None:
        """Ends it, after the reads that are under way."""
        self._core.cancel()

    def statistics(self) -> dict[str, Any]:
        """Counters, now: ``planned_pages`` (small gaps between pages are fetched along),
        ``critical_pages``, ``fetched_pages``, ``bytes``, ``requests``, ``done``, ``seconds``,
        ``failure``."""
        statistics: dict[str, Any] = json.loads(self._core.statistics())
        return statistics
