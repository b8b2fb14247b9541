"""Servers: a template, and a socket at which programs attach to it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._closing import Closing
from ._native import core
from .client import shim_path
from .errors import UsageError
from .template import Template


@dataclass(frozen=True)
class Mount:
    """How to mount a template's memory as a file, for any program that maps it privately.

    Attributes:
        directory: an empty directory, on which the file system is mounted.
        name: of the file in it.
        mode: of the file. Who may write can *open* it for writing, which QEMU before 8.2 does even
            for a private mapping. No write ever succeeds, but a shared mapping can spoil pages for
            all others; this is noticed, and ends the mount. Without write bits it is impossible.
        passthrough: ``auto``, ``never`` or ``always``: whether the kernel serves the file by itself
            where the source is a local file, or all of the template is loaded already. Needs Linux
            6.9, CAP_SYS_ADMIN, and a mode without write bits.
        readahead: bytes that the kernel reads around a page that was touched. Requests beside the
            working set are refused while one is recorded, and while one is replayed.
    """

    directory: str | os.PathLike[str]
    name: str = "memory"
    mode: int = 0o400
    passthrough: str = "auto"
    readahead: int = 128 << 10


class Server(Closing):
    """Serves a template to every program that comes in by one of the ways that are given.

    ``socket`` is for programs that preload the shim, ``firecracker`` for VMMs that hand over a
    userfaultfd of their own, ``mount`` for everything that can map a file. The engine runs in
    threads of this process, written in Rust: they never need the GIL, so nothing that Python does
    delays a fault.

    When the server closes, or this process ends in any way, programs with the shim end too, with a
    message on their stderr and status 69; who has the mounted file mapped gets SIGBUS for every
    page that the kernel has not cached. VMMs are killed when the server closes; if this process
    dies, what they have is served no more, and they wait. Memory is never zeros where content
    belongs.

    Args:
        template: what to serve. It must stay open as long as the server.
        socket: path of the Unix socket to make, 107 bytes at most; only this user can connect,
            unless ``owner`` or ``mode`` say otherwise.
        firecracker: path of a socket for any number of Firecrackers (``backend_path`` of
            ``PUT /snapshot/load``), or several: one for each, if they must not meet. Memory is
            copied into each of them: a page that twenty have read exists twenty times.
        mount: directory in which the memory is to be a file (see :attr:`mount_path`), or a
            :class:`Mount` that says more. It is shared by all who map it, as with ``share``, and
            they need not trust each other.
        relay: path of a socket at which second handlers connect (:class:`pagekit.Relay`), which
            answer for parts of the memory. Not a way in by itself.
        backend: how programs with the shim get the memory: ``share``, ``copy``, ``plain``, or
            ``auto``, which takes the best that works here (see :attr:`backend`, :attr:`reason`).
        broadcast: what is put into all that have copies (``copy``, Firecrackers) as soon as one of
            them demands it: nothing (``off``), pages of the working set that is replayed, or
            ``all``. Saves the others the faults, and costs them the memory if they never come.
        owner: user id, or (user id, group id), to give sockets and file to: the one that the
            programs run as, where that is another one.
        mode: permissions of the sockets.
        allow: user ids; of those who can connect, nobody else is let in. Everybody if empty.

    Raises:
        AddressInUse: another server answers at a socket.
        PermissionDenied: a served backend was asked for, and userfaultfd is not to be had (the hint
            names the knob); or a socket may not be given to ``owner``.
        UsageError: no such backend, or no way in; no empty directory to mount on.
        Unsupported: there is no FUSE here, or no passthrough where it was demanded.
    """

    def __init__(
        self,
        template: Template,
        socket: str | os.PathLike[str] | None = None,
        *,
        firecracker: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        mount: str | os.PathLike[str] | Mount | None = None,
        relay: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        broadcast: Literal["off", "working-set", "all"] = "off",
        owner: int | tuple[int, int] | None = None,
        mode: int = 0o600,
        allow: Sequence[int] = (),
    ) -> None:
        if isinstance(firecracker, str | os.PathLike):
            firecracker = [firecracker]
        if isinstance(mount, str | os.PathLike):
            mount = Mount(mount)
        self.template = template
        self.socket = None if socket is None else Path(socket)
        self.firecracker = [Path(path) for path in firecracker]
        self.relay = None if relay is None else Path(relay)
        ways = {
            "socket": self.socket,
            "firecracker": self.firecracker,
            "backend": backend,
            "owner": (owner, None) if isinstance(owner, int) else owner,
            "mode": mode,
            "allow": list(allow),
            "relay": self.relay,
            "broadcast": broadcast,
            "mount": mount and {**vars(mount), "directory": Path(mount.directory)},
        }
        self._core = core().Server(template._core, ways)
        self.backend: str | None
        self.reason: str | None
        self.backend, self.reason = self._core.backend() or (None, None)
        """How programs with the shim get the memory (``share``, ``copy`` or ``plain``), and why;
        None without a socket for them."""
        self.mount_path: Path | None
        self.mount_plan: str | None
        self.mount_path, self.mount_plan = self._core.mount() or (None, None)
        """The mounted file, and whether its pages are ``cached`` by the kernel, which asks for them
        once, or come by ``passthrough``; None without a mount."""

    def environment(self, stub: str | os.PathLike[str], *, backend: str = "auto") -> dict[str, str]:
        """The variables that make a program's private mapping of ``stub`` one of the template.

        ``stub`` is a file of at least the mapped size, of this program alone: its content does not
        matter, and what the program punches out of it concerns nobody else. The program ends when
        this process does.

        Raises:
            UsageError: the server has no socket for programs with the shim.
        """
        if self.socket is None:
            raise UsageError(
                "this server has no socket for programs with the shim",
                hint="give Server(template, socket)",
            )
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

    def regions(self, target: int) -> list[tuple[int, int, int | None]] | None:
        """What belongs where in a living target, by its ``id`` in the statistics: address, bytes,
        and the first page of the template, or None for zeros; None if there is no such target. It
        is what the target's events told so far, for looking into what went wrong."""
        regions: list[tuple[int, int, int | None]] | None = self._core.regions(target)
        return regions

    def close(self) -> None:
        """Ends the programs that are still attached, and the threads. Closing twice is fine."""
        self._core.close()

    def __repr__(self) -> str:
        ways = {
            "socket": self.socket,
            "firecracker": self.firecracker,
            "mount": self.mount_path,
        }
        given = ", ".join(f"{name}={way}" for name, way in ways.items() if way)
        return f"Server({self.template!r}, {given}, backend={self.backend!r})"
