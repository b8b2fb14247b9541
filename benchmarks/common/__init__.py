"""What the benchmarks share: programs compiled for them, handlers started and ended."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "programs"
PATIENCE = 60.0


def compiled(source: Path, place: Path) -> Path:
    """The program, in the directory ``place``."""
    binary = place / source.stem
    subprocess.run(["cc", "-O2", "-pthread", "-o", binary, source], check=True)
    return binary


def listens(socket: Path) -> bool:
    """Whether somebody listens there; connecting would use up a handler that takes one client."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    accepting = "00010000"
    return any(row[-1] == str(socket) and row[3] == accepting for row in rows)


@contextmanager
def handler(command: Sequence[object], socket: Path, pinned: bool = False) -> Iterator[None]:
    """A handler that listens, until the context ends; pinned: to the first processor we may use."""
    allowed = os.sched_getaffinity(0)
    if pinned:
        os.sched_setaffinity(0, {min(allowed)})
    try:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    finally:
        os.sched_setaffinity(0, allowed)
    deadline = time.monotonic() + PATIENCE
    try:
        while not listens(socket):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not listen at {socket}")
            time.sleep(0.001)
        yield
    finally:
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)
