"""Many forks at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from ..errors import ForkDied, PagekitError
from .agent import Answer
from .backing import Backing
from .qemu import Qemu
from .snapshot import Snapshot

_LOOK_UP = 0.5


@dataclass(frozen=True)
class Outcome:
    """What became of one fork of a fleet: the answer it gave, or what went wrong."""

    fork: Qemu | None
    answer: Answer | None
    error: PagekitError | None


class Fleet:
    """Forks of one snapshot, started a few at a time and kept until the end.

    It is a context manager; at its end no fork is left, also when it ends by an exception such as
    KeyboardInterrupt. For one thread at a time.

    Args:
        snapshot: what to fork.
        backing: where their memory comes from.
        at_once: how many to start at the same time; as many as there are processors if None.
    """

    def __init__(self, snapshot: Snapshot, backing: Backing, *, at_once: int | None = None) -> None:
        self.forks: list[Qemu] = []
        self._snapshot = snapshot
        self._backing = backing
        self._at_once = at_once or len(os.sched_getaffinity(0))
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self,
        codes: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        timeout: float = 60,
        told: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Start one fork more for each code, and run it there.

        Args:
            codes: what to run.
            names: what to call the forks; something unique if None.
            timeout: seconds that each fork has to start, and each code to be done.
            told: called after each, from another thread.
        """

        def one(code: str, name: str | None) -> Outcome:
            fork = None
            try:
                fork = Qemu.fork(self._snapshot, self._backing, fork_id=name, timeout=timeout)
                self._add(fork)
                return Outcome(fork, fork.exec(code, timeout=timeout), None)
            except PagekitError as error:
                return Outcome(fork, None, error)
            finally:
                told()

        # Not as a context manager: that would see all codes through after Ctrl-C.
        workers = ThreadPoolExecutor(self._at_once, thread_name_prefix="pagekit-fork")
        try:
            called: Sequence[str | None] = names or [None] * len(codes)
            futures = [
                workers.submit(one, code, name) for code, name in zip(codes, called, strict=True)
            ]
            # A signal that comes just before Python begins to wait does not end its waiting.
            while wait(futures, timeout=_LOOK_UP).not_done:
                pass
            return [future.result() for future in futures]
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            self._end()  # wakes the workers that wait for an answer
            raise
        finally:
            workers.shutdown()

    def close(self) -> None:
        """End all forks. May be called twice."""
        self._end()
        for fork in self.forks:
            fork.close()
        self.forks.clear()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            for fork in self.forks:
                fork.end()

    def _add(self, fork: Qemu) -> None:
        with self._lock:
            if not self._closed:
                self.forks.append(fork)
                return
        fork.close()
        raise ForkDied(f"{fork.fork_id} was not wanted any more")
