"""Backings: where the memory of a fork comes from.

================  ================================================================================
:class:`Served`   page by page, on demand, from a pagekit server
:class:`Mounted`  the same through the file that a server has mounted: QEMU runs as it is
:class:`Plain`    the kernel maps the snapshot's memory file privately: no server, no copies
:class:`Eager`    all of it is read into memory of the fork's own before the fork starts
================  ================================================================================

QEMU opens its memory file for writing and punches holes into it when the guest gives pages back,
even where it maps it privately. So it never sees the snapshot: as `Served` and `Plain` it opens a
*stub*, an empty file of the same size and the fork's own, whose mapping the preloaded library
replaces; and the mounted file takes no writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pagekit

from ..errors import KernelError, SandboxError, UsageError
from . import sparse
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .. import Mount, WorkingSet
    from ..server import Server


@dataclass
class Prepared:
    """What a fork's QEMU is started with.

    Attributes:
        path: the file that QEMU opens as its memory.
        share: whether it maps that shared.
        environment: what to add to its environment.
        fds: descriptors that it inherits; the fork closes them when it ends.
        content: the descriptor of memory that is this fork's alone, if there is such a file.
    """

    path: str
    share: bool
    environment: Mapping[str, str]
    fds: tuple[int, ...] = ()
    content: int | None = None


class Backing(Protocol):
    """A way to give a fork its memory."""

    @property
    def name(self) -> str:
        """What it is called in reports."""

    def prepare(self, snapshot: Snapshot, run: Path) -> Prepared:
        """Make what one fork of ``snapshot`` needs, in its run directory."""


@dataclass(frozen=True)
class Served:
    """Memory from a server whose template is the snapshot's memory."""

    server: Server

    @property
    def name(self) -> str:
        return str(self.server.backend)

    def prepare(self, snapshot: Snapshot, run: Path) -> Prepared:
        stub = _stub(snapshot, run)
        return Prepared(str(stub), False, self.server.environment(stub))


@dataclass(frozen=True)
class Mounted:
    """A private mapping of the file that a server has mounted. Nothing is preloaded.

    The server must mount it as :func:`mount_in` says.
    """

    server: Server
    name: str = field(default="mount", init=False)

    def prepare(self, snapshot: Snapshot, run: Path) -> Prepared:
        if self.server.mount_path is None:
            raise UsageError(
                "the server has mounted nothing", hint="start it with mount=mount_in(DIR)"
            )
        return Prepared(str(self.server.mount_path), False, {})


@dataclass(frozen=True)
class Plain:
    """A private mapping of the snapshot's memory file."""

    name: str = field(default="plain", init=False)

    def prepare(self, snapshot: Snapshot, run: Path) -> Prepared:
        stub = _stub(snapshot, run)
        return Prepared(str(stub), False, pagekit.plain_environment(stub, snapshot.memory))


@dataclass(frozen=True)
class Eager:
    """A copy of the snapshot's memory, holes left out, made before the fork starts."""

    name: str = field(default="eager", init=False)

    def prepare(self, snapshot: Snapshot, run: Path) -> Prepared:
        with snapshot.memory.open("rb") as memory:
            content = os.memfd_create("pagekit-eager", os.MFD_CLOEXEC)
            try:
                sparse.copy(memory.fileno(), content)
            except BaseException as error:
                os.close(content)
                if not isinstance(error, OSError):
                    raise
                raise SandboxError(
                    f"cannot load the memory of {snapshot.directory}: {error}",
                    hint="free some memory, or use a backing that needs less of it",
                ) from error
        return Prepared(f"/dev/fd/{content}", True, {}, (content,), content)


def mount_in(directory: str | os.PathLike[str]) -> Mount:
    """How a server mounts memory in ``directory`` for forks that are :class:`Mounted`.

    QEMU before 8.2 opens its memory file for writing, even where it maps it privately, so the mode
    must allow its user that. Nothing is ever written.
    """
    return pagekit.Mount(directory, mode=0o600)


_WANTED = ("auto", "share", "copy", "mount", "plain")


@contextlib.contextmanager
def choose(
    snapshot: Snapshot,
    wanted: str,
    run: Path,
    *,
    working_set: WorkingSet | None = None,
    recording: bool = False,
) -> Iterator[tuple[Backing, str]]:
    """Yield the backing for forks of ``snapshot``, and in a few words why it is the one.

    Args:
        snapshot: what will be forked.
        wanted: ``auto``, ``share``, ``copy``, ``mount`` or ``plain``.
        run: a directory for the socket, or the mount, of a server if one is needed; it ends with
            the context.
        working_set: fetched ahead of the forks.
        recording: whether the forks' demands will be recorded. With this or a working set, ``auto``
            is ``share``: of a plain mapping nobody sees which pages are demanded.

    Raises:
        UsageError: ``wanted`` is none of them, or ``plain`` where pages must be served.
        IntegrityError: the working set is of another snapshot.
        pagekit.errors.KernelError: what is wanted is not possible here.
    """
    if wanted not in _WANTED:
        raise UsageError(f"no backend is called {wanted}", hint=", ".join(_WANTED))
    served = recording or working_set is not None
    if served and wanted == "plain":
        raise UsageError(
            "in a plain mapping no pages are served: there is nothing to record, or to fetch ahead",
            hint="take the backend share, copy or mount",
        )
    backend = "share" if served and wanted == "auto" else wanted
    with contextlib.ExitStack() as stack:
        try:
            template = stack.enter_context(pagekit.Template(f"file:{snapshot.memory}"))
            if working_set is not None:
                template.replay(working_set)
            if wanted == "mount":
                directory = run / "mount"
                directory.mkdir(exist_ok=True)
                server = pagekit.Server(template, mount=mount_in(directory))
            else:
                server = pagekit.Server(template, run / "socket", backend=backend)
            stack.enter_context(server)
        except KernelError as error:
            if backend != "auto":
                raise
            choice: tuple[Backing, str] = (Plain(), f"pages cannot be served here: {error}")
        else:
            if wanted == "mount":
                choice = (Mounted(server), "asked for")
            elif server.backend == "plain":
                choice = (Plain(), str(server.reason))
            else:
                choice = (Served(server), str(server.reason))
        yield choice


def _stub(snapshot: Snapshot, run: Path) -> Path:
    stub = run / "memory"
    with stub.open("xb") as file:
        file.truncate(snapshot.memory_bytes)
    return stub
