"""Run directories: what a sandbox needs on disk while it runs, gone when it is.

A run directory is private (mode 0700) and locked by the process that made it, with flock(2) on the
directory itself, so that the lock goes when the process does, however it ends. A process
that makes its first one sweeps away those of processes that are gone, and what these had mounted
there: a mount outlives the server that answered for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

from ..errors import SandboxError

_MNT_DETACH = 2  # linux/fs.h; Python has no name for it
_PREFIX = "pagekit-run-"
_MARKER = ".pagekit-run"
"""Made once the directory is locked: with it and without a lock, a directory is abandoned."""


class RunDirectory:
    """A private directory, removed by :meth:`close`, at the latest when the interpreter ends.

    Raises:
        SandboxError: no directory can be made in the place for temporary files.
    """

    def __init__(self) -> None:
        try:
            place = Path(tempfile.gettempdir())
            _sweep_once(place)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / _MARKER).touch()
        except OSError as error:
            raise SandboxError(
                f"cannot make a run directory: {error}",
                hint="TMPDIR names another place for it",
            ) from error
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the directory and what is in it. May be called twice."""
        self._remove()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _sweep_once(place: Path) -> None:
    sweep(place)


def sweep(place: Path) -> list[Path]:
    """Remove the run directories in ``place`` whose processes are gone, and return them."""
    removed = []
    for directory in place.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # another's, or just being removed
            marker = (directory / _MARKER).lstat()
            if marker.st_uid != os.getuid():
                continue
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unmount_below(directory)
                shutil.rmtree(directory)
                removed.append(directory)
            finally:
                os.close(lock)
    return removed


def _unmount_below(directory: Path) -> None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # 52 27 0:45 / /tmp/run/mount rw,nosuid …; spaces and the like are octal
        point = os.fsdecode(
            re.sub(
                rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(line.split()[4])
            )
        )
        if not point.startswith(f"{directory.resolve()}/"):
            continue
        if ctypes.CDLL(None).umount2(os.fsencode(point), _MNT_DETACH):
            # Whoever may not unmount may have their own mounts taken away by this program.
            with contextlib.suppress(subprocess.SubprocessError):
                helper = ["fusermount3", "-u", "-z", "--", point]
                subprocess.run(helper, capture_output=True, timeout=10)


def _remove(directory: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child does not tidy up for its parent
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)
