"""Servers: a template, and a socket at which programs attach to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ._native import core
from .client import shim_path
from .template import Template


class Server:
    """Serves a template to every program that preloads the shim and attaches at ``socket``.

    The engine runs in threads of this process, written in Rust: they never need the GIL, so nothing
    that Python does delays a fault. When the server closes, or this process ends in any way, the
    programs that are attached end too, with a message on their stderr and status 69; their memory
    is never zeros where content belongs.

    Args:
        template: what to serve. It must stay open as long as the server.
        socket: path of the Unix socket to make, 107 bytes at most; only this user can connect,
            unless ``owner`` or ``mode`` say otherwise.
        backend: ``share``, ``copy``, ``plain``, or ``auto``, which takes the best that works here
            (see :attr:`backend` and :attr:`reason`).
        owner: user id, or (user id, group id), to give the socket to: the one that the programs run
            as, where that is another one.
        mode: permissions of the socket.

    Raises:
        AddressInUse: another server answers at ``socket``.
        PermissionDenied: a served backend was asked for, and userfaultfd is not to be had (the hint
            names the knob); or the socket may not be given to ``owner``.
        UsageError: no such backend.
    """

    def __init__(
        self,
        template: Template,
        socket: str | os.PathLike[str],
        *,
        backend: str = "auto",
        owner: int | tuple[int, int] | None = None,
        mode: int = 0o600,
    ) -> None:
        self.template = template
        self.socket = Path(socket)
        given_to = (owner, None) if isinstance(owner, int) else owner
        self._core = core().Server(template._core, self.socket, backend, given_to, mode)
        self.backend, self.reason = self._core.backend()
        """How programs get the memory (``share``, ``copy`` or ``plain``), and why."""

    def environment(self, stub: str | os.PathLike[str], *, backend: str = "auto") -> dict[str, str]:
        """The variables that make a program's private mapping of ``stub`` one of the template.

        ``stub`` is a file of at least the mapped size, of this program alone: its content does not
        matter, and what the program punches out of it concerns nobody else. The program ends when
        this process does.
        """
        return {
            "LD_PRELOAD": str(shim_path()),
            "PAGEKIT_FILE": str(Path(stub).resolve()),
            "PAGEKIT_SOCKET": str(self.socket.resolve()),
            "PAGEKIT_BACKEND": backend,
            "PAGEKIT_OWNER": str(os.getpid()),
        }

    def wait(self, timeout: float = 3600.0) -> bool:
        """Waits until no program is attached; false if ``timeout`` seconds pass first."""
        return bool(self._core.wait_idle(timeout))

    def statistics(self) -> dict[str, Any]:
        """Counters, now: ``demand_faults``, ``fetches``, ``bytes_read``, ``outcomes`` (count, p50
        and p99 in microseconds of each), ``targets``, ``reports`` of what went wrong, ``template``.
        """
        statistics: dict[str, Any] = json.loads(self._core.statistics())
        return statistics

    def close(self) -> None:
        """Ends the programs that are still attached, and the threads. Closing twice is fine."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.template!r}, {str(self.socket)!r}, backend={self.backend!r})"
