"""The comparison over a snapshot in a local file.

=============  ===================================================================================
``cold``       booted from nothing
``eager``      forked, the whole memory read before the start
``map_private``  forked over a plain private mapping of the local memory file
``lazy``       forked, its memory served by pagekit, from a template that is empty at the start
``replay``     the same, while pages that an earlier fork has demanded are fetched ahead
``warm``       from a template that another fork has used: the 2nd to 20th fork
``mount``      the same, over the file that pagekit mounts, with a QEMU as it is
=============  ===================================================================================

All answer the same kind of request, which touches 40 MiB of the guest's memory. A plain mapping of
a local file is the yardstick: the kernel shares such pages by itself.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import pagekit

from ...errors import KernelError
from .. import memory
from ..backing import Backing, Eager, Mounted, Plain, Served
from ..fleet import Fleet
from ..guest_agent import DATA_PAGES, PAGE_SIZE
from ..qemu import Marks, Qemu
from ..snapshot import Snapshot
from .setting import Setting, check_template

ARMS = ("eager", "map_private", "lazy", "replay", "warm", "mount")
"""The arms that fork, in the order of the table."""

SERVED = ("lazy", "replay", "warm", "mount")
"""The arms whose memory comes from pagekit."""

TOUCHED_BYTES = DATA_PAGES * PAGE_SIZE
"""How much of the guest's memory the measured request touches."""


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
class Local:
    """The figures.

    Attributes:
        cold: cold boots.
        arms: by name, see :data:`ARMS`.
        memory_bytes: size of the guest's RAM; ``image_bytes`` of it are not zero.
        left_out: why an arm is not there, where it is impossible.
        digest: SHA-256 of the snapshot's memory, the same before and after.
        host_basis: how memory of the host was counted.
    """

    cold: list[Sample] = field(default_factory=list)
    arms: dict[str, Arm] = field(default_factory=lambda: {name: Arm() for name in ARMS})
    left_out: dict[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    image_bytes: int = 0
    digest: str = ""
    host_basis: str = ""


def measure(setting: Setting, samples: int, cold_boots: int) -> Local:
    """Make the comparison. Raises as :func:`pagekit.sandbox.comparison.compare` does."""
    return _Experiment(setting).run(samples, cold_boots)


class _Experiment:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._result = Local()

    def run(self, samples: int, cold_boots: int) -> Local:
        setting, result = self._setting, self._result
        setting.told("booting the guest that becomes the template", 0, 1)
        with self._booted() as guest:
            snapshot = guest.freeze(setting.run / "local")
        result.memory_bytes = snapshot.memory_bytes
        result.image_bytes = snapshot.memory.stat().st_blocks * 512
        result.digest = snapshot.digest()
        self._working_set, _ = setting.record(snapshot, [setting.requests.every_page()])

        with contextlib.ExitStack() as stack:
            warm = stack.enter_context(setting.serving(snapshot))
            mounted = self._mounted(stack, snapshot)
            self._sample(snapshot, Served(warm), None)  # brings the pages in
            if mounted:
                self._sample(snapshot, Mounted(mounted), None)
            order = ["cold"] * (cold_boots - 1) + list(result.arms) * samples
            random.shuffle(order)
            for step, arm in enumerate(order):
                setting.told(f"one start at a time: {arm}", step, len(order))
                self._take(arm, snapshot, warm, mounted)
            order = list(result.arms)
            random.shuffle(order)
            for step, arm in enumerate(order):
                setting.told(f"{setting.forks} forks at once: {arm}", step, len(order))
                self._many(arm, snapshot)
            setting.told("checking that the template is what it was", 0, 1)
            check_template(snapshot, warm.template, result.digest)
            if mounted:
                mounted.template.audit()
        return result

    def _mounted(self, stack: contextlib.ExitStack, snapshot: Snapshot) -> pagekit.Server | None:
        """A server with a mount; None where that is impossible, and then there is no such arm."""
        try:
            return stack.enter_context(self._setting.serving(snapshot, mount=True))
        except KernelError as error:
            self._result.left_out["mount"] = str(error)
            del self._result.arms["mount"]
            return None

    def _take(
        self, arm: str, snapshot: Snapshot, warm: pagekit.Server, mounted: pagekit.Server | None
    ) -> None:
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
        elif mounted and arm == "mount":
            samples.append(self._sample(snapshot, Mounted(mounted), mounted))
        else:
            started = time.perf_counter()
            with self._serving(arm, snapshot) as empty:
                samples.append(self._sample(snapshot, Served(empty), empty, started=started))

    @contextlib.contextmanager
    def _booted(self) -> Iterator[Qemu]:
        """Boot a guest cold, take that for a sample, and yield it."""
        files = (self._setting.guest.kernel, self._setting.guest.initrd)
        with Qemu.boot(*files, accelerator=self._setting.accelerator) as guest:
            request = self._setting.requests.every_page()
            self._setting.requests.check(request, guest.exec(request.code).result)
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
        request = self._setting.requests.every_page()
        with Qemu.fork(snapshot, backing) as fork:
            self._setting.requests.check(request, fork.exec(request.code).result)
            after = server.statistics() if server else {}
            names = ("demand_faults", "fetches", "bytes_read")
            counted = {name: int(after[name] - before[name]) for name in names if server}
            counted.setdefault("bytes_read", bytes_read)
            return _sampled(fork, fork.marks.started if started is None else started, **counted)

    def _many(self, name: str, snapshot: Snapshot) -> None:
        """Start many forks at once, each with a request of its own, and count their memory."""
        setting, result = self._setting, self._result
        arm = result.arms[name]
        if name == "eager":
            needed = setting.forks * (result.image_bytes // 1024 + 64 * 1024)
            if (available := memory.available_kib()) < needed:
                arm.skipped = f"{needed >> 10} MiB are needed and {available >> 10} MiB available"
                return
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(memory.memory_group())
            backing: Backing = Eager() if name == "eager" else Plain()
            mounted = None
            if name in SERVED:
                server = stack.enter_context(self._serving(name, snapshot))
                mounted = server.mount_path
                backing = Mounted(server) if mounted else Served(server)
            fleet = stack.enter_context(Fleet(snapshot, backing))
            requests = [setting.requests.every_page(number) for number in range(setting.forks)]
            if name in ("warm", "mount"):
                setting.ask(fleet, requests[:1])
                requests = requests[1:]
            counted = [fork.memory() for fork in setting.ask(fleet, requests)]
            arm.guest_kib_many = median(used.guest_kib for used in counted)
            arm.vmm_kib_many = median(used.vmm_kib for used in counted)
            cached = memory.cached_kib(snapshot.memory)
            if mounted:
                cached += memory.cached_kib(mounted)
            arm.host_kib_many = self._host_kib(group, fleet, cached)

    def _host_kib(self, group: memory.MemoryGroup | None, fleet: Fleet, cached: int) -> int:
        """What all forks, their server and its template, and cached pages of files take."""
        if group is not None:
            self._result.host_basis = f"memory control group, version {group.version}"
            return group.used_kib() + cached
        self._result.host_basis = "sum of proportional set sizes; no control group could be made"
        # These have their share of the files' pages in them already, where they map them.
        return memory.proportional_kib(fork.pid for fork in fleet.forks) + cached

    def _serving(
        self, arm: str, snapshot: Snapshot
    ) -> contextlib.AbstractContextManager[pagekit.Server]:
        """The server of an arm, its template empty."""
        if arm == "replay":
            return self._setting.serving(
                snapshot, first=lambda template: template.replay(self._working_set)
            )
        return self._setting.serving(snapshot, mount=arm == "mount")


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
