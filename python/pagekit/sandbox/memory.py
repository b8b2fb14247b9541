"""What sandboxes cost in memory, as the kernel counts it.

Two questions, two bases. What one fork holds for itself comes from ``/proc/PID/smaps``: pages
that are anonymous, that is, written or copied, inside the range that is the guest's RAM; and the
VMM's own apart. What all of it takes of the host comes from a memory control group of its own,
version 1 or 2: everything that was allocated in it, by whomever, the server's template included. To
that comes the part of the snapshot's memory file, and of one that a server has mounted, that is in
the page cache, whoever brought it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ProcessMemory:
    """A VMM's private memory, in KiB.

    Attributes:
        guest_kib: of that, the guest's RAM: pages that this fork shares with nobody.
        vmm_kib: the rest: the VMM's heap, stacks, and translated code.
    """

    guest_kib: int
    vmm_kib: int


def process_memory(pid: int, base: int, size: int) -> ProcessMemory:
    """Count the private pages of a process inside and outside of one range of addresses.

    A mapping that reaches beyond the range, because the kernel has joined it to its neighbour, is
    counted where the greater part of it lies.

    Raises:
        OSError: the process is gone, or not ours to look at.
    """
    inside = outside = 0
    within = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(header[1], 16), int(header[2], 16)
            within = 2 * (min(end, base + size) - max(start, base)) >= end - start
        elif line.startswith("Anonymous:"):
            kib = int(line.split()[1])
            if within:
                inside += kib
            else:
                outside += kib
    return ProcessMemory(inside, outside)


def proportional_kib(pids: Iterable[int]) -> int:
    """Return the sum of the processes' proportional set sizes: shared pages are divided among all
    that map them, those of the snapshot's file and of a server's template too.

    Raises:
        OSError: one is gone, or not ours to look at.
    """
    total = 0
    for pid in pids:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        total += int(found[1]) if found else 0
    return total


def cached_kib(file: Path) -> int:
    """Return how much of a file is in the page cache. No page of it is touched: the server of a
    mounted file may ask too.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if not size:
            return 0
        # Python hands out the address of writable memory only. Nothing is written.
        with mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
            resident = (ctypes.c_ubyte * pages)()
            view = ctypes.c_char.from_buffer(mapped)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                address = ctypes.c_void_p(ctypes.addressof(view))
                if libc.mincore(address, ctypes.c_size_t(size), resident):
                    raise OSError(ctypes.get_errno(), "mincore")
            finally:
                del view
    return sum(page & 1 for page in resident) * mmap.PAGESIZE // 1024


class MemoryGroup:
    """A memory control group with this process, and all that it starts from now on, in it."""

    def __init__(self, path: Path, version: int) -> None:
        self._path = path
        self.version = version

    def used_kib(self) -> int:
        """Return what was allocated in the group and is in use: anonymous memory, shared memory,
        and the kernel's own, but no cached files.
        """
        stat = dict(line.split() for line in (self._path / "memory.stat").read_text().splitlines())
        if self.version == 2:
            total = sum(int(stat[name]) for name in ("anon", "shmem", "kernel") if name in stat)
        else:
            total = int(stat["rss"]) + int(stat["shmem"])
            with contextlib.suppress(OSError):  # not counted by every kernel
                total += int((self._path / "memory.kmem.usage_in_bytes").read_text())
        return total // 1024


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup | None]:
    """Move this process into a memory control group of its own, and back again afterwards.

    Processes that it started meanwhile must have ended by then. Yields None where no group can be
    made: no control groups, no permission, or nothing delegated.
    """
    for version, home, parent in _places():
        for left in parent.glob("pagekit-*"):  # by a process that was killed; busy ones refuse
            with contextlib.suppress(OSError):
                left.rmdir()
        path = parent / f"pagekit-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            (path / "memory.stat").stat()
            (path / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            path.rmdir()
            continue
        try:
            yield MemoryGroup(path, version)
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):
                path.rmdir()
        return
    yield None


def _places() -> Iterator[tuple[int, Path, Path]]:
    """Yield version, our group, and the group to make one in, the best first."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        # 4:memory:/path is version 1, 0::/path version 2
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            home = _mounted(_ROOT / "memory", path)
            yield 1, home, home
        elif not controllers:
            home = _mounted(_ROOT, path)
            # In version 2 a group with processes in it has no groups below it: make a sibling.
            yield 2, home, home.parent
            yield 2, home, home


def _mounted(root: Path, path: str) -> Path:
    """The directory of a group; in a container, its own group is often what is mounted as root."""
    directory = root / path.lstrip("/")
    return directory if directory.is_dir() else root


def available_kib() -> int:
    """Return how much memory the host could still give, by its own estimate."""
    found = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) if found else 0
