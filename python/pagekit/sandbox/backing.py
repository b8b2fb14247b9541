"""Backings: where the memory of a fork comes from.

============  ====================================================================================
:class:`Served`  page by page, on demand, from a pagekit server
:class:`Plain`   the kernel maps the snapshot's memory file privately: no server, no copies
:class:`Eager`   all of it is read into memory of the fork's own before the fork starts
============  ====================================================================================

QEMU opens its memory file for writing and punches holes into it when the guest gives pages back,
even where it maps it privately. So it never sees the snapshot: with the first two backings it opens
a *stub*, an empty file of the same size and the fork's own, whose mapping the preloaded library
replaces.
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
        environment = self.server.environment(stub, backend=self.name)
        return Prepared(str(stub), False, environment)


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
        return Prepared(
            f"/dev/fd/{content}", True, pagekit.owner_environment(), (content,), content
        )


@contextlib.contextmanager
def choose(snapshot: Snapshot, wanted: str, socket: Path) -> Iterator[tuple[Backing, str]]:
    """Yield the backing for forks of ``snapshot``, and in a few words why it is the one.

    Args:
        snapshot: what will be forked.
        wanted: ``auto``, ``share``, ``copy`` or ``plain``.
        socket: where a server may listen, if one is needed; it ends with the context.

    Raises:
        UsageError: ``wanted`` is none of them.
        pagekit.errors.KernelError: what is wanted is not possible here.
    """
    if wanted not in ("auto", "share", "copy", "plain"):
        raise UsageError(f"no backend is called {wanted}", hint="auto, share, copy or plain")
    with contextlib.ExitStack() as stack:
        try:
            template = stack.enter_context(pagekit.Template(f"file:{snapshot.memory}"))
            server = stack.enter_context(pagekit.Server(template, socket, backend=wanted))
        except KernelError as error:
            if wanted != "auto":
                raise
            choice: tuple[Backing, str] = (Plain(), f"pages cannot be served here: {error}")
        else:
            plain = server.backend == "plain"
            choice = (Plain() if plain else Served(server), str(server.reason))
        yield choice


def _stub(snapshot: Snapshot, run: Path) -> Path:
    stub = run / "memory"
    with stub.open("xb") as file:
        file.truncate(snapshot.memory_bytes)
    return stub
