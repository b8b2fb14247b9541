"""What a userfaultfd tells."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .descriptor import Userfaultfd


class Cause(enum.StrEnum):
    """Why a thread waits for a page."""

    MISSING = "missing"
    """There is no page."""
    WRITE_PROTECTED = "write-protected"
    """The page is write-protected, and was written to."""
    MINOR = "minor"
    """The page is in the page cache, and not mapped."""
    PROTECTED = "protected"
    """The page is protected against any access."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A thread waits for the page at ``address``, which is that of the page unless EXACT_ADDRESS
    was negotiated. ``write``: it wants to write. ``thread`` is its number, or None without
    THREAD_ID."""

    address: int
    cause: Cause
    write: bool
    thread: int | None


@dataclasses.dataclass(frozen=True)
class Fork:
    """The target forked. ``child`` is the userfaultfd of the child's memory, registered and
    negotiated as the parent's is. Whoever drops it lets that memory read as zeros."""

    child: Userfaultfd


@dataclasses.dataclass(frozen=True)
class Remap:
    """``mremap`` moved ``length`` bytes from ``source`` to ``destination``, registered as
    before."""

    source: int
    destination: int
    length: int


@dataclasses.dataclass(frozen=True)
class Remove:
    """``madvise`` is about to drop the pages from ``start`` to ``end``. They are missing then."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Unmap:
    """From ``start`` to ``end`` nothing is mapped any more."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An event of a newer kernel, by its number."""

    code: int


Event = Fault | Fork | Remap | Remove | Unmap | Unknown
"""Everything that can be told."""
