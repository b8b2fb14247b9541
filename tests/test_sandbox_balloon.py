"""A guest that gives pages back: they are zeros for it and cost the host nothing, and the template
keeps its content."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from test_sandbox_fork import RIGHT, SUM, backing

from pagekit.sandbox import Qemu, Snapshot

TAKEN = 64 << 20

# Takes memory, fills it with a pattern, and gives it back.
CHURN = f"""
import mmap
with mmap.mmap(-1, {TAKEN}) as taken:
    assert not any(taken[::4096]), "memory fresh from the kernel is not zero"
    taken.write(b"x" * {TAKEN})
"""


def not_zero(fork: Qemu, run: Path) -> int:
    """How many bytes of the guest's RAM are in pages that are not all zero."""
    image = run / "ram"
    size = fork.snapshot.memory_bytes
    fork.monitor("pmemsave", val=0, size=size, filename=str(image))
    zeros = bytes(4096)
    with image.open("rb") as file:
        count = sum(file.read(4096) != zeros for _ in range(size // 4096))
    image.unlink()
    return count * 4096


@pytest.mark.parametrize("name", ["plain", "share", "copy"])
def test_pages_given_back(name: str, balloon_snapshot: Snapshot, run: Path) -> None:
    before = balloon_snapshot.digest()
    with backing(name, balloon_snapshot, run) as chosen:
        with Qemu.fork(balloon_snapshot, chosen) as fork, Qemu.fork(balloon_snapshot) as other:
            # Reported: what the guest frees comes back to the host by itself, after a while.
            fork.exec(CHURN)
            used = fork.memory().guest_kib
            assert used > TAKEN >> 10
            support.until(
                lambda: fork.memory().guest_kib < used - (TAKEN >> 11), "free pages are reported"
            )
            assert fork.exec(SUM).result == RIGHT

            # Taken by the balloon: in the template most of these pages have some content. Here they
            # must have none.
            fork.monitor("balloon", value=200 << 20)
            support.until(
                lambda: fork.monitor("query-balloon")["actual"] <= 200 << 20, "the balloon is full"
            )
            assert not_zero(fork, run) <= 200 << 20
            assert fork.exec(SUM).result == RIGHT

            fork.monitor("balloon", value=512 << 20)
            support.until(
                lambda: fork.monitor("query-balloon")["actual"] == 512 << 20, "the balloon is empty"
            )
            fork.exec(CHURN)
            assert fork.exec(SUM).result == RIGHT
            assert other.exec(SUM).result == RIGHT
        with Qemu.fork(balloon_snapshot, chosen) as later:
            assert later.exec(SUM).result == RIGHT
            later.exec(CHURN)
    assert balloon_snapshot.digest() == before
