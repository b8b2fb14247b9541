"""Which memory is meant: a buffer, or a range of addresses."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from .._native import core
from ..errors import (
    Exists,
    Gone,
    Ioctl,
    LayoutChanged,
    NotCovered,
    PagekitError,
    Unsupported,
    UsageError,
)
from .table import features

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE_SIZE = mmap.PAGESIZE
"""Bytes in an ordinary page."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Addresses from ``start`` on, ``length`` bytes; ``base`` is where the buffer begins that they
    are in, which may be before ``start``."""

    start: int
    length: int
    base: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.length

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end

    def offset(self, address: int) -> int:
        """Where an address lies in the buffer."""
        return address - self.base


Where: TypeAlias = "Buffer | Range | tuple[int, int]"
"""What the functions here take as memory: an object with a buffer (an ``mmap``, a NumPy array), of
which the whole pages are meant, or addresses, as a :class:`Range` or as (address, bytes)."""


def locate(where: Where) -> tuple[Range, memoryview | None]:
    """The whole pages of a buffer, and a view that keeps it where it is; or a range, checked.

    Raises:
        UsageError: no buffer, none that is contiguous, none with a whole page in it; a range that
            is empty, not aligned to pages, or not within the address space.
    """
    if isinstance(where, Range):
        where = (where.start, where.length)
    if isinstance(where, tuple):
        start, length = whole_pages(*where)
        return Range(start, length, start), None
    address, length, view = held(where, "memory to work on")
    start = -(-address // PAGE_SIZE) * PAGE_SIZE
    end = (address + length) // PAGE_SIZE * PAGE_SIZE
    if start >= end:
        view.release()
        raise UsageError(
            f"there is no whole page in a buffer of {length} bytes at {address:#x}",
            hint=f"use an mmap, or an array of {2 * PAGE_SIZE} bytes or more",
        )
    return Range(start, end - start, address), view


def held(buffer: Buffer, purpose: str) -> tuple[int, int, memoryview]:
    """Address and bytes of a contiguous buffer, and a view that keeps it where it is.

    Raises:
        UsageError: it is none.
    """
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"no {purpose}: {error}") from error
    try:
        address, length, _ = core().address_of(view)
    except BufferError as error:
        view.release()
        raise UsageError(f"no {purpose}: {error}") from error
    return address, length, view


def whole_pages(start: int, length: int) -> tuple[int, int]:
    """The two, if they are whole pages of an address space.

    Raises:
        UsageError: they are not.
    """
    if start % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
        raise UsageError(
            f"{length} bytes at {start:#x} are no whole pages",
            hint=f"address and length must be multiples of {PAGE_SIZE}, and not 0",
        )
    if start < 0 or start + length >= 1 << 64:
        raise UsageError(f"{length} bytes at {start:#x} are in no address space")
    return start, length


def bits(kind: str, names: Iterable[str], known: Mapping[str, int]) -> int:
    """Names as the set of bits that stands for them.

    Raises:
        UsageError: a name that is not known, or one name instead of several.
    """
    if isinstance(names, str):
        raise UsageError(f"{kind} must be a list of names, not {names!r}")
    found = 0
    for name in names:
        if name not in known:
            raise UsageError(
                f"{name!r} is not one of the {kind}", hint=f"one of {', '.join(sorted(known))}"
            )
        found |= 1 << known[name]
    return found


# What an operation needs that not every kernel with userfaultfd has.
_NEEDS = {
    "poison": "POISON",
    "move": "MOVE",
    "scan": "PAGEMAP_SCAN",
    "protect_against_access": "RWP",
    "allow_access": "RWP",
    "set_mode": "RWP",
}

_HINTS = {
    ("register", errno.EBUSY): "another userfaultfd has registered it: unregister it there first",
    ("register", errno.EINVAL): (
        "it must be mapped, and of a kind that has this mode: anonymous memory, shmem, hugetlbfs;"
        " minor: shared shmem or hugetlbfs only"
    ),
    ("register", errno.EPERM): "a shared mapping must be of a file that may be written",
    ("move", errno.EBUSY): "a page is shared with a forked child, or pinned",
    ("move", errno.EINVAL): "only anonymous memory of this very process can be moved",
    ("continue_", errno.EFAULT): "there is no page in the page cache: write it there first",
    ("continue_", errno.EINVAL): "only for shared memory registered with minor=True",
    ("copy", errno.EFAULT): "the source cannot be read, or the target's file is shorter than that",
    ("scan", errno.EPERM): "part of it is not registered with wp=True and WP_ASYNC",
}


def refused(operation: str, code: int, start: int, length: int, done: int = 0) -> PagekitError:
    """The exception that says what the kernel answered."""
    said = f"cannot {operation.rstrip('_').replace('_', ' ')}"
    if length:
        said = f"{said} {length} bytes at {start:#x}"
    if done:
        said = f"{said}, after {done}"
    about: dict[str, Any] = {"errno": code, "range": (start, length), "done": done}
    match code:
        case errno.ESRCH:
            return Gone(f"{said}: the target has ended, or runs another program", **about)
        case errno.EAGAIN:
            about["hint"] = "read the events that are pending, then try again"
            return LayoutChanged(f"{said}: the target's memory is changing", **about)
        case errno.ENOENT:
            about["hint"] = "register it first; a range must lie in one mapping"
            return NotCovered(f"{said}: not all of it is registered for that", **about)
        case errno.EEXIST:
            about["hint"] = "threads that wait there were not woken: call wake()"
            return Exists(f"{said}: there is a page already", **about)
    if code in (errno.EINVAL, errno.ENOTTY) and operation in _NEEDS:
        row = next(row for row in features() if row.name == _NEEDS[operation])
        if row.state == "no":
            return Unsupported(f"{said}: this kernel has no {row.name}", hint=row.remedy)
    about["hint"] = _HINTS.get((operation, code))
    return Ioctl(f"{said}: {os.strerror(code)}", **about)
