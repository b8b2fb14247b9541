"""What the comparisons have in common: where they take place, how forks are served and asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pagekit

from ...errors import IntegrityError
from ..backing import Served, mount_in
from ..fleet import Fleet
from ..guest import Guest
from ..qemu import Qemu
from ..snapshot import Snapshot
from .requests import Request, Requests

Told = Callable[[str, int, int], None]
"""Takes what is being done now, and how many steps of how many are done."""

_BUFFER = 4 << 20


@dataclass
class Setting:
    """Attributes:
    guest: what to boot.
    accelerator: ``kvm`` or ``tcg``.
    run: a directory for all that is made.
    forks: how many "many" are.
    backend: how pagekit brings pages into forks.
    told: called as it goes on.
    requests: what guests are asked.
    """

    guest: Guest
    accelerator: str
    run: Path
    forks: int
    backend: str
    told: Told
    requests: Requests = field(default_factory=Requests)
    _places: int = 0

    @contextlib.contextmanager
    def serving(
        self,
        snapshot: Snapshot,
        *,
        layers: Sequence[str] = (),
        first: Callable[[pagekit.Template], object] = lambda _: None,
        backend: str | None = None,
        mount: bool = False,
    ) -> Iterator[pagekit.Server]:
        """An empty template of the snapshot's memory, and its server.

        Args:
            layers: around the memory file.
            first: done with the template before there is a server.
            backend: instead of the one that is compared.
            mount: whether the memory is mounted as a file, instead of served at a socket.
        """
        self._places += 1
        place = self.run / f"server-{self._places}"
        with pagekit.Template(f"file:{snapshot.memory}", layers=layers) as template:
            first(template)
            if mount:
                place.mkdir()
                server = pagekit.Server(template, mount=mount_in(place))
            else:
                server = pagekit.Server(template, place, backend=backend or self.backend)
            with server:
                yield server

    def ask(self, fleet: Fleet, requests: Sequence[Request]) -> list[Qemu]:
        """Give each request to a new fork of its own, check the answers, and return the forks.

        Raises:
            PagekitError: a fork gave none, or a wrong one.
        """
        forks = []
        outcomes = fleet.run([request.code for request in requests])
        for outcome, request in zip(outcomes, requests, strict=True):
            if outcome.error or outcome.fork is None or outcome.answer is None:
                raise outcome.error or IntegrityError("a fork gave no answer")
            self.requests.check(request, outcome.answer.result)
            forks.append(outcome.fork)
        return forks

    def record(
        self, snapshot: Snapshot, requests: Sequence[Request]
    ) -> tuple[pagekit.WorkingSet, int]:
        """Have forks answer, each page fetched only when it is demanded.

        Returns:
            The pages that they demanded, and the bytes that this moved: while demands are recorded,
            no page comes along with another, so these were needed, and no others.
        """
        with self.serving(snapshot) as server, Fleet(snapshot, Served(server)) as fleet:
            recording = server.template.record()
            self.ask(fleet, requests)
            recording.ready()
            needed = int(server.template.statistics()["bytes_read"])
            return recording.finish(), needed


def check_template(snapshot: Snapshot, template: pagekit.Template, digest: str) -> None:
    """See that neither the snapshot's file nor what a template holds of it is any different now.

    Raises:
        IntegrityError: one is.
    """
    template.audit()
    check_snapshot(snapshot, digest)
    with snapshot.memory.open("rb") as file:
        for offset in range(0, snapshot.memory_bytes, _BUFFER):
            held = template.read(offset, min(_BUFFER, snapshot.memory_bytes - offset))
            if held != file.read(len(held)):
                raise IntegrityError(f"the template differs from its source near byte {offset}")


def check_snapshot(snapshot: Snapshot, digest: str) -> None:
    """See that the snapshot's memory is what it was.

    Raises:
        IntegrityError: it is not.
    """
    found = snapshot.digest()
    if found != digest:
        raise IntegrityError(f"the snapshot's memory has changed: {found} instead of {digest}")
