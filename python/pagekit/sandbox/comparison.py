"""The comparison that ``pagekit demo`` makes: the same guest, started in five ways.

=============  ===================================================================================
``cold``       booted from nothing
``eager``      forked, the whole memory read before the start
``map_private``  forked over a plain private mapping of the local memory file
``lazy``       forked, its memory served by pagekit, from a template that is empty at the start
``warm``       the same from a template that another fork has used: the 2nd to 20th fork
=============  ===================================================================================

All run on the same machine, with the same accelerator, and answer the same kind of request, which
touches 40 MiB of the guest's memory. Every answer is checked against a value worked out here. The
samples of all arms are taken in one random order, each alone; then, arm by arm, many forks at once
are counted for memory.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pagekit

from ..errors import IntegrityError
from . import memory
from .backing import Backing, Eager, Plain, Served
from .fleet import Fleet
from .guest import Guest
from .guest_agent import DATA_PAGES, PAGE_SIZE, data_page
from .program import Accelerator, find_qemu, pick_accelerator
from .qemu import Marks, Qemu
from .rundir import RunDirectory
from .snapshot import Snapshot

ARMS = ("eager", "map_private", "lazy", "warm")
"""The arms that fork, in the order of the table."""

TOUCHED_BYTES = DATA_PAGES * PAGE_SIZE
"""How much of the guest's memory the measured request touches."""

_OFFSETS = 32  # data_page() repeats itself after that many bytes
_BUFFER = 4 << 20


@dataclass(frozen=True)
class Sample:
    """One start of a guest, up to its first answer.

    Attributes:
        ready_s, resume_to_answer_s: as in :class:`pagekit.sandbox.Marks`, the template and its
            server included where they are started for this sample.
        guest_kib, vmm_kib: private memory afterwards: of the guest's RAM, and the VMM's own.
        demand_faults, fetches, bytes_read: what the server counted for it.
        translated_blocks: basic blocks of the guest's code that QEMU had to translate; 0 where
            the processor runs them.
    """

    ready_s: float
    resume_to_answer_s: float
    guest_kib: int
    vmm_kib: int
    demand_faults: int = 0
    fetches: int = 0
    bytes_read: int = 0
    translated_blocks: int = 0


@dataclass
class Arm:
    """What was measured of one way to start a guest.

    Attributes:
        samples: starts that were made alone.
        guest_kib_many, vmm_kib_many: private memory per fork, the median of many at once.
        host_kib_many: what these many took of the host, all together.
        skipped: why they were not started.
    """

    samples: list[Sample] = field(default_factory=list)
    guest_kib_many: float | None = None
    vmm_kib_many: float | None = None
    host_kib_many: int | None = None
    skipped: str = ""


@dataclass
class Comparison:
    """The figures, and under which circumstances they came about.

    Attributes:
        accelerator: what ran the guest's instructions.
        backend: how pagekit brought pages into the forks.
        forks: how many "many" are.
        cold: cold boots.
        arms: by name, see :data:`ARMS`.
        answers: how many answers were checked; a wrong one ends the comparison.
        memory_bytes: size of the guest's RAM; ``image_bytes`` of it are not zero.
        digest: SHA-256 of the snapshot's memory, the same before and after.
        host_basis: how memory of the host was counted.
    """

    accelerator: Accelerator
    backend: str
    forks: int
    cold: list[Sample] = field(default_factory=list)
    arms: dict[str, Arm] = field(default_factory=lambda: {name: Arm() for name in ARMS})
    answers: int = 0
    memory_bytes: int = 0
    image_bytes: int = 0
    digest: str = ""
    host_basis: str = ""


Told = Callable[[str, int, int], None]
"""Takes what is being done now, and how many steps of how many are done."""


def compare(
    guest: Guest,
    *,
    samples: int = 7,
    cold_boots: int = 5,
    forks: int = 20,
    accelerator: str = "auto",
    backend: str = "share",
    told: Told = lambda *_: None,
) -> Comparison:
    """Make the comparison. Takes some minutes, most of them for cold boots.

    Args:
        guest: what to boot.
        samples: how many starts of each arm that forks.
        cold_boots: how many cold boots, one at least.
        forks: how many forks at once are counted for memory.
        accelerator: ``auto``, ``kvm`` or ``tcg``.
        backend: how pagekit brings pages into forks: ``share`` or ``copy``.
        told: called as it goes on.

    Raises:
        IntegrityError: a guest gave a wrong answer, or the template is not what it was.
        PagekitError: what is needed is not there.
    """
    with RunDirectory() as run:
        return _Experiment(guest, run.path, forks, accelerator, backend, told).run(
            samples, cold_boots
        )


class _Experiment:
    def __init__(
        self, guest: Guest, run: Path, forks: int, accelerator: str, backend: str, told: Told
    ) -> None:
        self._told = told
        told("looking for an accelerator that works", 0, 1)
        chosen = pick_accelerator(find_qemu(), guest.kernel, wanted=accelerator)
        self._result = Comparison(chosen, backend, forks)
        self._guest = guest
        self._path = run
        self._servers = 0
        columns = zip(*(data_page(page)[:_OFFSETS] for page in range(DATA_PAGES)), strict=True)
        self._sums = [sum(column) for column in columns]

    def run(self, samples: int, cold_boots: int) -> Comparison:
        result = self._result
        self._told("booting the guest that becomes the template", 0, 1)
        with self._booted() as guest:
            snapshot = guest.freeze(self._path / "snapshot")
        result.memory_bytes = snapshot.memory_bytes
        result.image_bytes = snapshot.memory.stat().st_blocks * 512
        result.digest = snapshot.digest()

        with self._serving(snapshot) as warm:
            self._sample(snapshot, Served(warm), None)  # brings the pages in
            order = ["cold"] * (cold_boots - 1) + list(ARMS) * samples
            random.shuffle(order)
            for step, arm in enumerate(order):
                self._told(f"one start at a time: {arm}", step, len(order))
                self._take(arm, snapshot, warm)
            order = list(ARMS)
            random.shuffle(order)
            for step, arm in enumerate(order):
                self._told(f"{result.forks} forks at once: {arm}", step, len(order))
                self._many(arm, snapshot)
            self._told("checking that the template is what it was", 0, 1)
            _check_template(snapshot, warm.template, result.digest)
        return result

    def _take(self, arm: str, snapshot: Snapshot, warm: pagekit.Server) -> None:
        """Take one sample of an arm."""
        if arm == "cold":
            with self._booted():
                return
        samples = self._result.arms[arm].samples
        if arm == "eager":
            read = {"bytes_read": self._result.image_bytes}
            samples.append(self._sample(snapshot, Eager(), None, **read))
        elif arm == "map_private":
            samples.append(self._sample(snapshot, Plain(), None))
        elif arm == "warm":
            samples.append(self._sample(snapshot, Served(warm), warm))
        else:
            started = time.perf_counter()
            with self._serving(snapshot) as empty:
                samples.append(self._sample(snapshot, Served(empty), empty, started=started))

    @contextlib.contextmanager
    def _booted(self) -> Iterator[Qemu]:
        """Boot a guest cold, take that for a sample, and yield it."""
        accelerator = self._result.accelerator.name
        files = (self._guest.kernel, self._guest.initrd)
        with Qemu.boot(*files, accelerator=accelerator) as guest:
            code, expected = self._request()
            self._check(guest.exec(code).result, expected)
            self._result.cold.append(_sampled(guest, guest.marks.started))
            yield guest

    def _sample(
        self,
        snapshot: Snapshot,
        backing: Backing,
        server: pagekit.Server | None,
        *,
        started: float | None = None,
        bytes_read: int = 0,
    ) -> Sample:
        """Start one fork, ask it once, and end it."""
        before = server.statistics() if server else {}
        code, expected = self._request()
        with Qemu.fork(snapshot, backing) as fork:
            self._check(fork.exec(code).result, expected)
            after = server.statistics() if server else {}
            names = ("demand_faults", "fetches", "bytes_read")
            counted = {name: int(after[name] - before[name]) for name in names if server}
            counted.setdefault("bytes_read", bytes_read)
            return _sampled(fork, fork.marks.started if started is None else started, **counted)

    def _many(self, name: str, snapshot: Snapshot) -> None:
        """Start many forks at once, each with a request of its own, and count their memory."""
        result, arm = self._result, self._result.arms[name]
        if name == "eager":
            needed = result.forks * (result.image_bytes // 1024 + 64 * 1024)
            if (available := memory.available_kib()) < needed:
                arm.skipped = f"{needed >> 10} MiB are needed and {available >> 10} MiB available"
                return
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(memory.memory_group())
            backing: Backing = Eager() if name == "eager" else Plain()
            if name in ("lazy", "warm"):
                backing = Served(stack.enter_context(self._serving(snapshot)))
            fleet = stack.enter_context(Fleet(snapshot, backing))
            requests = [self._request(number) for number in range(result.forks)]
            if name == "warm":
                self._ask(fleet, requests[:1])
                requests = requests[1:]
            counted = self._ask(fleet, requests)
            arm.guest_kib_many = median(used.guest_kib for used in counted)
            arm.vmm_kib_many = median(used.vmm_kib for used in counted)
            arm.host_kib_many = self._host_kib(group, fleet, snapshot)

    def _ask(self, fleet: Fleet, requests: list[tuple[str, str]]) -> list[memory.ProcessMemory]:
        """Give each request to a fork of its own, check the answers, and count what it takes."""
        counted = []
        outcomes = fleet.run([code for code, _ in requests])
        for outcome, (_, expected) in zip(outcomes, requests, strict=True):
            if outcome.error or outcome.fork is None or outcome.answer is None:
                raise outcome.error or IntegrityError("a fork gave no answer")
            self._check(outcome.answer.result, expected)
            counted.append(outcome.fork.memory())
        return counted

    def _host_kib(self, group: memory.MemoryGroup | None, fleet: Fleet, snapshot: Snapshot) -> int:
        """What all forks, their server and its template, and the source's cached pages take."""
        source = memory.cached_kib(snapshot.memory)
        if group is not None:
            self._result.host_basis = f"memory control group, version {group.version}"
            return group.used_kib() + source
        self._result.host_basis = "sum of proportional set sizes; no control group could be made"
        # These have their share of the source's pages in them already, where they map it.
        return memory.proportional_kib(fork.pid for fork in fleet.forks) + source

    @contextlib.contextmanager
    def _serving(self, snapshot: Snapshot) -> Iterator[pagekit.Server]:
        """An empty template of the snapshot's memory, and its server."""
        self._servers += 1
        socket = self._path / f"socket-{self._servers}"
        with (
            pagekit.Template(f"file:{snapshot.memory}") as template,
            pagekit.Server(template, socket, backend=self._result.backend) as server,
        ):
            yield server

    def _request(self, number: int | None = None) -> tuple[str, str]:
        """A request that touches every page of the guest's ``data``, and the right answer."""
        offset = random.randrange(_OFFSETS) if number is None else number % _OFFSETS
        factor = 1 if number is None else number + 1
        code = f"result = {factor} * sum(data[{offset}::{PAGE_SIZE}])"
        return code, str(factor * self._sums[offset])

    def _check(self, result: str | None, expected: str) -> None:
        if result != expected:
            raise IntegrityError(f"a guest answered {result} where {expected} is right")
        self._result.answers += 1


def _sampled(guest: Qemu, started: float, **counted: int) -> Sample:
    marks: Marks = guest.marks
    assert marks.answered is not None and marks.resumed is not None
    used = guest.memory()
    return Sample(
        ready_s=marks.answered - started,
        resume_to_answer_s=marks.answered - marks.resumed,
        guest_kib=used.guest_kib,
        vmm_kib=used.vmm_kib,
        translated_blocks=guest.translated_blocks(),
        **counted,
    )


def _check_template(snapshot: Snapshot, template: pagekit.Template, digest: str) -> None:
    """See that neither the file nor what the server holds of it is any different now."""
    template.audit()
    found = snapshot.digest()
    if found != digest:
        raise IntegrityError(f"the snapshot's memory has changed: {found} instead of {digest}")
    with snapshot.memory.open("rb") as file:
        for offset in range(0, snapshot.memory_bytes, _BUFFER):
            held = template.read(offset, min(_BUFFER, snapshot.memory_bytes - offset))
            if held != file.read(len(held)):
                raise IntegrityError(f"the template differs from its source near byte {offset}")
