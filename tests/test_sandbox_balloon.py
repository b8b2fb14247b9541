"""A guest that gives pages back: it gets zeros for them, the template keeps its content."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from test_sandbox_fork import BACKINGS, RIGHT, SUM, backing

from pagekit.sandbox import Qemu, Snapshot

# Fills the better part of the guest's free memory with a pattern, gives it back, and takes as much
# again: what the kernel hands out must be zeros, never what the template has there.
CHURN = """
import ctypes, mmap
size = 128 << 20
for _ in range(2):
    with mmap.mmap(-1, size) as taken:
        assert not any(taken[::4096]), "memory fresh from the kernel is not zero"
        assert taken[:4 << 20].count(0) == 4 << 20
        for page in range(0, size, 4096):
            taken[page] = 0xA5
result = "zeros"
"""


@pytest.mark.parametrize("name", BACKINGS)
def test_pages_given_back(name: str, balloon_snapshot: Snapshot, run: Path) -> None:
    before = balloon_snapshot.digest()
    with backing(name, balloon_snapshot, run) as chosen:
        with Qemu.fork(balloon_snapshot, chosen) as fork, Qemu.fork(balloon_snapshot) as other:
            assert fork.exec(CHURN).result == "zeros"
            # Free page reporting gives free pages back after two seconds of quiet.
            reported = fork.exec("time.sleep(4); result = open('/proc/vmstat').read()").result
            assert reported
            fork.monitor("balloon", value=200 << 20)
            support.until(
                lambda: fork.monitor("query-balloon")["actual"] <= 210 << 20, "the balloon is full"
            )
            assert fork.exec(SUM).result == RIGHT
            fork.monitor("balloon", value=512 << 20)
            support.until(
                lambda: fork.monitor("query-balloon")["actual"] == 512 << 20, "the balloon is empty"
            )
            assert fork.exec(CHURN).result == "zeros"
            assert fork.exec(SUM).result == RIGHT
            assert other.exec(SUM).result == RIGHT
        with Qemu.fork(balloon_snapshot, chosen) as later:
            assert later.exec(SUM).result == RIGHT
            assert later.exec(CHURN).result == "zeros"
    assert balloon_snapshot.digest() == before
