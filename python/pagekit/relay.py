"""Second handlers: a program that answers for a part of the memory that a server serves, and hears
of everything that happens to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._closing import Closing
from ._native import core
from .errors import RelayError, UsageError

PAGE = 4096


@dataclass(frozen=True)
class Region:
    """What belongs at a range of a target's addresses.

    Attributes:
        start: the first address.
        length: bytes.
        offset: where in the template its bytes begin; None where the target gave its memory back,
            and reads zeros.
    """

    start: int
    length: int
    offset: int | None


@dataclass(frozen=True)
class Joined:
    """A target is served from now on.

    Attributes:
        target: its number, which all that concerns it has.
        parent: the target that it was forked from, if it was.
        pid: its process, where known.
        page_size: bytes of its pages: 4096, or 2 MiB.
        features: what its userfaultfd was negotiated with, by name: which events it announces.
        claims: whether what is claimed counts there. It does not where the target maps the
            template's file itself (``share``).
        regions: where its memory stood at this moment.
    """

    target: int
    parent: int | None
    pid: int | None
    page_size: int
    features: tuple[str, ...]
    claims: bool
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Fork:
    """A target forked. The child's :class:`Joined` follows (or its :class:`Left` alone)."""

    target: int
    child: int


@dataclass(frozen=True)
class Remap:
    """A target moved ``length`` bytes from the address ``start`` to ``to``."""

    target: int
    start: int
    to: int
    length: int


@dataclass(frozen=True)
class Remove:
    """A target gave back what is from ``start`` to ``stop``, which reads zero from now on."""

    target: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unmap:
    """A target unmapped what is from ``start`` to ``stop``."""

    target: int
    start: int
    stop: int


@dataclass(frozen=True)
class Left:
    """A target is served no more; its userfaultfd is closed here."""

    target: int


@dataclass(frozen=True)
class Fault:
    """A thread of a target waits for a page, and for one answer: any thread may give it, once.

    Attributes:
        target: whose it is.
        address: where, rounded down to the target's page size.
        offset: which bytes of the template belong there.
        why: ``claimed``, ``declined`` (the template's source failed), or ``protected``: a write to
            a page that you write-protected by :meth:`Relay.userfaultfd`.
        page_size: bytes of the page.
    """

    target: int
    address: int
    offset: int
    why: str
    page_size: int
    _number: int = field(repr=False)
    _relay: Relay = field(repr=False, compare=False)

    def fill(self, content: bytes | bytearray | memoryview) -> None:
        """These bytes belong there, ``page_size`` of them.

        Where the target has given the page back meanwhile, it gets zeros all the same. (Not if its
        pages are larger than 4096 bytes: those are put there by this process, which cannot know.)

        Raises:
            UsageError: another number of bytes, or ``protected``: the page has its content.
            RelayError: the relay is over.
        """
        if self.why == "protected":
            raise UsageError("a page that is write-protected has its content", hint="call done()")
        if len(content) != self.page_size:
            raise UsageError(f"{len(content)} bytes are no page of {self.page_size}")
        self._relay._call("fill", self._number, self.target, self.address, bytes(content))

    def zero(self) -> None:
        """Zeros belong there. Raises as :meth:`fill`."""
        self._answer("zero")

    def poison(self) -> None:
        """Nobody has it: touching it raises SIGBUS, or, where the kernel cannot do that, the target
        is killed. Raises as :meth:`fill`."""
        self._answer("poison")

    def decline(self) -> None:
        """As without this handler: the template's page; or, where that has failed, the failure; or
        the protection is taken back.

        Raises:
            RelayError: the relay is over.
        """
        self._relay._call("answer", self._number, "decline")

    def done(self) -> None:
        """It is resolved, by :meth:`Relay.userfaultfd`: the page is there, or unprotected.

        Raises:
            RelayError: the relay is over.
        """
        self._relay._call("answer", self._number, "done")

    def _answer(self, answer: str) -> None:
        if self.why == "protected":
            raise UsageError("a page that is write-protected has its content", hint="call done()")
        self._relay._call("answer", self._number, answer)


Event = Joined | Fault | Fork | Remap | Remove | Unmap | Left
_SIMPLE: dict[str, type[Fork | Remap | Remove | Unmap | Left]] = {
    "fork": Fork,
    "remap": Remap,
    "remove": Remove,
    "unmap": Unmap,
    "left": Left,
}


class Relay(Closing):
    """Connects to ``pagekit serve --relay SOCKET`` as a second handler; iterates over events::

        with pagekit.Relay("/run/pk-relay.sock", claim=[(0, 1 << 20)]) as relay:
            for event in relay:
                if isinstance(event, pagekit.relay.Fault):
                    event.fill(content_of(event.offset))

    What is claimed is yours: faults there come to you, and from now on no target gets bytes of the
    template there. (Pages that a target has already stay as they are.) Each target's faults and
    events come in the order in which the server read them. Iteration ends when the server does, or
    with :meth:`close`.

    Every fault must be answered within :attr:`deadline`. Who does not, or does not read on (65 536
    messages), or answers a fault twice, is cut off. When this process ends, in any way, or closes
    its relay, faults that it has not answered wait so long for another one that claims the same;
    then they fail, loudly, and so do those that come later: the claim stays. Pages that it got
    because the template had failed do at once.

    Waiting gives up the GIL, and so does answering. Any thread may answer; one at a time iterates.
    Objects of this class are not to be used after a fork of this process.

    Args:
        path: the relay's socket.
        claim: ranges of the template, as (start, stop) in bytes: multiples of 4096, and (for
            targets with pages of 2 MiB) rounded outwards to whole pages.
        declined: also take the faults whose pages the template's source failed to give.
        pid: only those of this process and of what it forks; of all targets if None.

    Raises:
        UsageError: no such range.
        RelayError: nobody listens there, or one may not connect, or somebody has claimed that.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        claim: Sequence[tuple[int, int]] = (),
        declined: bool = False,
        pid: int | None = None,
    ) -> None:
        self.path = Path(path)
        runs = _runs(claim)
        if pid is not None and not 0 < pid < 1 << 31:
            raise UsageError(f"{pid} is no process")
        try:
            connected = core().Relay.connect(self.path, runs, declined, pid or 0)
        except OSError as error:
            raise RelayError(
                f"no relay can be reached at {self.path}: {error.strerror or error}",
                hint="start the server with --relay, or Server(relay=...); see --owner and --allow",
            ) from error
        if isinstance(connected, tuple):
            raise RelayError(f"{self.path}: the server refuses: {connected[1]}")
        self._core = connected
        self._page_sizes: dict[int, int] = {}
        self._closed = False
        self.size: int
        self.deadline: float
        self.size, self.deadline = connected.told()
        """Bytes of the template; seconds that an answer may take."""

    def wait(self, timeout: float | None = None) -> Event | None:
        """The next thing that happens; None when ``timeout`` seconds pass first.

        Raises:
            EOFError: the server has ended, or this relay was closed.
            RelayError: the server cut this handler off; the message says why.
        """
        found = self._call("next", timeout)
        kind = found[0]
        if kind == "nothing":
            return None
        if kind == "end":
            raise EOFError(f"{self.path}: the relay is over")
        if kind == "refused":
            raise RelayError(f"{self.path}: the server hung up: {found[1]}")
        if kind == "joined":
            (target, parent, pid, page_size), features, claims, regions = found[1:]
            self._page_sizes[target] = page_size
            places = tuple(Region(*region) for region in regions)
            return Joined(target, parent, pid, page_size, tuple(features), claims, places)
        if kind == "fault":
            number, target, address, offset, why = found[1:]
            size = self._page_sizes[target]
            return Fault(target, address, offset, why, size, number, self)
        if kind == "left":
            self._page_sizes.pop(found[1], None)
        return _SIMPLE[kind](*found[1:])

    def __iter__(self) -> Iterator[Event]:
        while True:
            try:
                event = self.wait()
            except EOFError:
                return
            if event is not None:
                yield event

    def userfaultfd(self, target: int) -> int:
        """The descriptor of a target's userfaultfd, to resolve, register and protect by. It is this
        relay's, and closed when the target leaves. Never read events from it: they would be lost.

        Fills by it are refused (EAGAIN) only until the *server* has read of a removal, so they can
        bring back what the target has just given back; :meth:`Fault.fill` cannot.

        Raises:
            UsageError: no such target, or it has left.
        """
        try:
            return int(self._core.userfaultfd(target))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def release(self) -> None:
        """Gives back what was claimed: from now on it is the template's. Events come as before.

        Raises:
            RelayError: the relay is over.
        """
        self._call("release")

    def fileno(self) -> int:
        """The connection, to wait for in an event loop until it is readable."""
        return int(self._core.fileno())

    def close(self) -> None:
        """Ends the connection, also for a thread that iterates. Closing twice is fine."""
        self._closed = True
        self._core.close()

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._core, name)(*arguments)
        except OSError as error:
            raise RelayError(f"{self.path}: the relay is over: {error}") from error

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"deadline={self.deadline}"
        return f"Relay({str(self.path)!r}, {state})"


def _runs(claim: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of bytes as runs of pages, rising, with gaps between them."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(claim):
        if start < 0 or stop <= start or start % PAGE or stop % PAGE or stop >= 1 << 63:
            raise UsageError(
                f"({start}, {stop}) is no range of pages",
                hint=f"give (start, stop) in bytes, multiples of {PAGE}",
            )
        first, end = start // PAGE, stop // PAGE
        if runs and sum(runs[-1]) >= first:
            before, pages = runs.pop()
            first, end = before, max(end, before + pages)
        runs.append((first, end - first))
    return runs
