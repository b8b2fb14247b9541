"""What is true of pages: of this process, or of another one that this user may trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from .._native import core
from ..errors import Gone, PermissionDenied
from .memory import PAGE_SIZE, Range, Where, bits, locate, refused

_CATEGORIES = {
    "WPALLOWED": 0,
    "WRITTEN": 1,
    "FILE": 2,
    "PRESENT": 3,
    "SWAPPED": 4,
    "PFNZERO": 5,
    "HUGE": 6,
    "SOFT_DIRTY": 7,
    "GUARD": 8,
    "ACCESSED": 9,
}


class Entry(int):
    """What ``/proc/PID/pagemap`` says of a page, as the number that stands there."""

    @property
    def present(self) -> bool:
        """It is in memory."""
        return bool(self >> 63 & 1)

    @property
    def swapped(self) -> bool:
        """It is swapped out."""
        return bool(self >> 62 & 1)

    @property
    def file(self) -> bool:
        """It belongs to a file, or to shared memory."""
        return bool(self >> 61 & 1)

    @property
    def guard(self) -> bool:
        """It is a guard page (Linux 6.15)."""
        return bool(self >> 58 & 1)

    @property
    def write_protected(self) -> bool:
        """It is write-protected by a userfaultfd."""
        return bool(self >> 57 & 1)

    @property
    def exclusive(self) -> bool:
        """It is mapped by this process alone."""
        return bool(self >> 56 & 1)

    @property
    def soft_dirty(self) -> bool:
        """It was written to since ``clear_refs``, on kernels that keep track."""
        return bool(self >> 55 & 1)

    @property
    def frame(self) -> int:
        """The number of its page frame; 0 without CAP_SYS_ADMIN, and where there is none."""
        return int(self) & (1 << 55) - 1 if self.present else 0


@dataclasses.dataclass(frozen=True)
class Run:
    """Pages from ``start`` to ``end`` of which the same is true."""

    start: int
    end: int
    categories: frozenset[str]


def pagemap(where: Where, *, pid: int | None = None) -> list[Entry]:
    """One entry for each whole page of a buffer, or of a range. Gives up the GIL.

    Raises:
        UsageError: no memory, or a range of no whole pages.
        PermissionDenied, Gone: another process, which may not be traced, or is no more.
    """
    range = _located(where)
    pages = range.length // PAGE_SIZE
    try:
        return [Entry(entry) for entry in core().pagemap_entries(range.start, pages, pid)]
    except OSError as error:
        raise _refused("read the pagemap of", error, range.start, range.length, pid) from error


def scan(
    where: Where,
    *,
    having: Iterable[str] = (),
    lacking: Iterable[str] = (),
    any_of: Iterable[str] = (),
    protect: bool = False,
    only_tracked: bool = False,
    most: int = 0,
    pid: int | None = None,
) -> list[Run]:
    """The pages of a buffer or a range of which this is true, as runs that rise (Linux 6.7). Gives
    up the GIL.

    Categories are WPALLOWED (registered with ``wp`` and WP_ASYNC), WRITTEN (not write-protected),
    FILE, PRESENT, SWAPPED, PFNZERO (the zero page), HUGE, SOFT_DIRTY, GUARD, ACCESSED (7.3). With
    ``having=["WRITTEN"], protect=True`` each call finds what was written since the last one.

    Args:
        having: what a page must be, all of it.
        lacking: what it must not be.
        any_of: of which it must be one at least.
        protect: whether the pages found are write-protected, in the same pass. Memory that is not
            WPALLOWED is passed over.
        only_tracked: whether such memory is an error instead.
        most: how many pages are found at most; 0: all.
        pid: another process.

    Raises:
        UsageError: no memory, a range of no whole pages, or an unknown category.
        Unsupported: this kernel cannot.
        Ioctl: EPERM (``only_tracked``), EINVAL (a category that this kernel does not know).
        PermissionDenied, Gone: another process, which may not be traced, or is no more.
    """
    inverted = bits("categories", lacking, _CATEGORIES)
    all_of = bits("categories", having, _CATEGORIES) | inverted
    any_of_these = bits("categories", any_of, _CATEGORIES)
    range = _located(where)
    wanted = {
        "all_of": all_of,
        "any_of": any_of_these,
        "inverted": inverted,
        # What every kernel with this call knows, and what was asked for.
        "reported": 0x7F | all_of | any_of_these,
        "protect": protect,
        "only_tracked": only_tracked,
        "most_pages": most,
    }
    try:
        runs = core().pagemap_scan(range.start, range.end, wanted, pid)
    except OSError as error:
        raise _refused("scan", error, range.start, range.length, pid) from error
    return [Run(start, end, _names(categories)) for start, end, categories in runs]


def _located(where: Where) -> Range:
    """Nothing is done to the memory, so nobody must hold it."""
    range, view = locate(where)
    if view is not None:
        view.release()
    return range


def _names(categories: int) -> frozenset[str]:
    return frozenset(name for name, bit in _CATEGORIES.items() if categories >> bit & 1)


def _refused(operation: str, error: OSError, start: int, length: int, pid: int | None) -> Exception:
    # The files of another process are there or not, and can be opened or not, before anything else.
    if pid is not None and not Path(f"/proc/{pid}").exists():
        return Gone(f"there is no process {pid}", errno=error.errno or 0)
    if pid is not None and isinstance(error, PermissionError):
        hint = "run as root, or as the user of that process"
        return PermissionDenied(f"process {pid} may not be looked into: {error}", hint=hint)
    return refused(operation, error.errno or 0, start, length)
