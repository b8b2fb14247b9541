"""Clients that come in as Firecracker does: tests/programs/firecracker.c, steered line by line."""

from __future__ import annotations

import json
import os
import select
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import support
from support import Memory, program, start, stopping


class Vmm:
    """One client, connected and waiting for orders; ended with the context."""

    def __init__(self, socket: Path, memory: Memory, *options: str, **more: Any) -> None:
        command = [program("firecracker"), socket, memory.path, *options]
        self.process = start(command, {}, **more)
        line = self.process.stdout.readline()
        if line != "ready\n":
            out, err = support.ended(self.process, None)
            raise AssertionError(f"status {self.process.returncode}: {line}{out}{err}")

    def tell(self, order: str) -> None:
        """Gives an order, without waiting for its answer."""
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest order that has none yet."""
        ready, _, _ = select.select([self.process.stdout], [], [], support.PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            out, err = support.ended(self.process, None)
            raise AssertionError(f"no answer; status {self.process.returncode}: {out}{err}")
        answer: dict[str, Any] = json.loads(line)
        return answer

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

    def waits_in(self, place: str) -> bool:
        """Whether a thread of it sleeps in this function of the kernel."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return any((task / "wchan").read_text() == place for task in tasks.iterdir())

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


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
