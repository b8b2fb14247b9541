"""Child processes: started lean, waited for without polling, ended by descriptor, gone with us."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import warden

_TAIL = 4000


class Child:
    """A process of ours. When this process ends, however it does, its child is killed.

    Args:
        arguments: program and arguments.
        environment: what to add to our environment.
        fds: descriptors it inherits, under their numbers here.
        log: file that takes what it writes to standard output and standard error.

    Raises:
        OSError: the program could not be started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        fds: Sequence[int],
        log: Path,
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                arguments,
                env={**os.environ, **environment},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=warden.group(),
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """Wait up to ``timeout`` seconds for the end; return as :attr:`status` does."""
        if self._process.poll() is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            deadline = time.monotonic() + timeout
            while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
                poll.poll(left * 1000)
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End it, at once, and see it gone. May be called twice."""
        self.send(signal.SIGKILL)
        self._process.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def log(self) -> str:
        """The end of what it wrote."""
        try:
            text = self._log.read_bytes()[-_TAIL:]
        except OSError:
            return ""
        return text.decode(errors="replace").strip()
