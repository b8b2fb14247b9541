"""What userfaultfd can do, what of it this machine has, and what mends the rest.

The table itself is in ``crates/uffd/src/features.rs``; ``pagekit doctor`` prints it for this
machine, and ``docs/userfaultfd.md`` has it for all (:mod:`pagekit.uffd.__main__` writes it there).
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from .._native import core

State = Literal["yes", "not permitted", "no"]

_FILTER = "allow userfaultfd in the seccomp filter (docker run --security-opt seccomp=FILE)"
_DEVICE = "sudo setfacl -m u:$USER:rw /dev/userfaultfd"
_SYSCTL = "sudo sysctl vm.unprivileged_userfaultfd=1"
_CAPABILITY = "run as root, or: sudo setcap cap_sys_ptrace+ep PROGRAM"
_POOL = "sudo sysctl vm.nr_hugepages=64, before memory of huge pages is served"
_HAND_IN = "hand /dev/userfaultfd to the container (docker run --device /dev/userfaultfd)"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One row: a feature of the kernel's userfaultfd, and whether this process can use it.

    ``bit`` is its number in the handshake (None: found out by trying), ``since`` the first release
    of Linux that has it, ``commit`` and ``title`` the change that brought it (an empty commit: none
    yet that stays). ``gives`` and ``without`` say what one has with it and loses without it,
    ``needs`` what it takes beside the kernel. ``remedy`` is the command that mends what is wrong;
    empty: nothing is.
    """

    name: str
    bit: int | None
    since: str
    commit: str
    title: str
    gives: str
    needs: str
    without: str
    state: State
    remedy: str


@dataclasses.dataclass(frozen=True)
class Support:
    """What this machine has, for this process, now: the table, and the names (``bit 40``) of
    features that the kernel reports and this release of pagekit does not know."""

    features: tuple[Feature, ...]
    unknown: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether the feature of that name can be used. A name that is not in the table cannot."""
        return any(row.name == name and row.state == "yes" for row in self.features)


def support() -> Support:
    """Looks, by trying everything on memory of its own. Takes milliseconds, changes nothing, and
    needs no privilege; what it finds depends on who runs it.

    Raises:
        Unsupported: this is not Linux.
    """
    table = core().uffd_table()
    states, unknown = core().uffd_kernel()
    found: dict[str, State] = {row[0]: state for row, state in zip(table, states, strict=True)}
    rows = (Feature(*fields) for fields in ((*row, found[row[0]], "") for row in table))
    return Support(
        tuple(dataclasses.replace(row, remedy=_remedy(row, found)) for row in rows),
        tuple(unknown),
    )


def features() -> tuple[Feature, ...]:
    """The rows of :func:`support`."""
    return support().features


def _remedy(row: Feature, found: dict[str, State]) -> str:
    if row.state == "yes":
        return _POOL if "HUGETLBFS" in row.name and row.needs and not _huge_pages() else ""
    if row.state == "no":
        newer = _release(row.since) > _release(platform.release())
        if row.name == "DEVICE" and not newer:
            return _HAND_IN
        if newer:
            return f"use Linux {row.since} or newer"
        return f"use a kernel that is built with it (Linux can have it since {row.since})"
    if row.name == "DEVICE":
        return _DEVICE
    if row.name == "EVENT_FORK" and found["THREAD_ID"] == "yes":
        return _CAPABILITY
    # Everybody may have this one, so it is no rule of the kernel's own by which it is refused.
    if found["USER_MODE_ONLY"] == "not permitted":
        return f"{_FILTER}, or {_DEVICE}"
    return f"{_DEVICE}, or {_SYSCTL}, or run with CAP_SYS_PTRACE"


def _huge_pages() -> bool:
    try:
        return int(Path("/proc/sys/vm/nr_hugepages").read_text()) > 0
    except OSError:
        return False


def _release(text: str) -> tuple[int, ...]:
    """``6.18.2-cloud`` as (6, 18)."""
    digits = text.split("-")[0].split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in digits)


def lacking(rows: Iterable[Feature]) -> dict[str, list[str]]:
    """Remedies, and the names of the features that each one mends."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.remedy:
            found.setdefault(row.remedy, []).append(row.name)
    return found
