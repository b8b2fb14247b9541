"""Clients that come in as Firecracker does: tests/programs/firecracker.c, steered line by line."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import support
from support import Memory, need, program, start, stopping

HUGE = 2 << 20
SPARE = 4


class Vmm:
    """One client, connected and waiting for orders; ended with the context."""

    def __init__(self, socket: Path, memory: Memory, *options: str, **more: Any) -> None:
        command = [program("firecracker"), socket, memory.path, *options]
        self.process = start(command, {}, **more)
        word, _, pages = self.line().partition(" ")
        assert word == "ready", word
        self.pages = int(pages)

    def tell(self, order: str) -> None:
        """Gives an order, without waiting for its answer."""
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest order that has none yet."""
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    def line(self) -> str:
        """The next line it prints. A client that prints none for long is killed."""
        impatience = threading.Timer(support.PATIENCE, self.process.kill)
        impatience.start()
        line: str = self.process.stdout.readline()
        impatience.cancel()
        if not line:
            out, err = support.ended(self.process, None)
            raise AssertionError(f"it ended with {self.process.returncode}: {out}{err}")
        return line

    def ask(self, order: str) -> dict[str, Any]:
        self.tell(order)
        return self.answer()

    def right(self, order: str) -> dict[str, Any]:
        """Gives an order; every byte that was looked at must have been right."""
        self.tell(order)
        return self.was_right()

    def was_right(self) -> dict[str, Any]:
        answer = self.answer()
        if any(answer[what] for what in ("wrong", "failed", "unverified")):
            self.process.kill()
            raise AssertionError(f"{answer}: {support.ended(self.process, None)[1]}")
        return answer

    def quit(self) -> None:
        """Ends it in peace."""
        self.process.stdin.close()
        self.process.stdin = None
        _, err = support.ended(self.process)
        assert err == ""

    def kill(self) -> None:
        """Ends it from one moment to the next."""
        self.process.kill()
        self.process.wait(support.PATIENCE)

    def waits_in(self, place: str) -> bool:
        """Whether a thread of it sleeps in this function of the kernel."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                if (task / "wchan").read_text() == place:
                    return True
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with stopping(self.process):
            if error is None and self.process.stdin is not None and self.process.poll() is None:
                self.quit()


def descriptors(pid: int) -> Counter[str]:
    """What a process has open: how many of each kind."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[re.sub(r"\d+", "", str(link.readlink()))] += 1
    return found


def given_back(pid: int, before: Counter[str]) -> None:
    """Waits until a server has nothing open that it had not before. (Threads that start have files
    open for a moment, so there may be less.)"""
    try:
        support.until(lambda: descriptors(pid) <= before, "giving back descriptors")
    except AssertionError as error:
        raise AssertionError(f"{before} became {descriptors(pid)}") from error


def free_huge_pages() -> int:
    found = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) if found else 0


@contextmanager
def huge_pages(count: int, *, or_none: bool = False) -> Iterator[bool]:
    """So many pages of 2 MiB, and a few to spare: a page that is filled twice at once takes two for
    a moment. Without, the test is skipped; or this says so."""
    knob = Path("/proc/sys/vm/nr_hugepages")
    if not knob.exists() or os.geteuid() != 0:
        need("hugetlb", or_none, "no right to set vm.nr_hugepages, or no such pages in this kernel")
        yield False
        return
    count += SPARE
    with support.sysctl("vm.nr_hugepages", str(int(knob.read_text()) + count)):
        enough = free_huge_pages() >= count
        need("hugetlb", enough or or_none, f"{count} pages of 2 MiB are not to be had")
        yield enough
