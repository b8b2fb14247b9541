"""The comparison over a store far away.

==========  ======================================================================================
``eager``   the whole memory is fetched, in requests of the best size, then forks map it
``lazy``    forks are served from an empty template: each page is fetched when it is demanded
``replay``  the same, while the pages that earlier forks demanded are fetched ahead
==========  ======================================================================================

The store is a model, the same for every arm: the layer ``delay`` over the snapshot's file. Time is
counted from before the template is opened.

The guest is larger than what a request needs of it, as sandboxes are that have loaded libraries, a
model, or caches: beside the data that requests touch it holds :data:`CACHES_BYTES` that none does.
How long ``eager`` takes is proportional to that size, and nothing else here is.

The request that is measured is none of those that were recorded: other pages, in another order,
another offset in each page, another computation. What it *needs* is found by recording it too, with
each page fetched only when it is demanded; whatever else is moved was moved in vain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pagekit

from ..backing import Served
from ..fleet import Fleet
from ..guest import COMMAND_LINE
from ..guest_agent import PAGE_SIZE
from ..qemu import Qemu
from ..snapshot import Snapshot
from .requests import SOME_PAGES, Request
from .setting import Setting, check_snapshot

ARMS = ("eager", "lazy", "replay")
"""In the order of the table."""

TOUCHED_BYTES = SOME_PAGES * PAGE_SIZE
"""How much of the guest's memory the measured request touches."""

MEMORY_BYTES = 1 << 30
"""The guest's RAM."""

CACHES_BYTES = 640 << 20
"""How much it holds that no request touches."""

EAGER_REQUESTS = (128 << 10, 512 << 10, 1 << 20, 2 << 20)
"""Sizes of a request that are tried for ``eager``, in bytes."""

RECORDED, MEASURED = (1, 2), 0
"""Seeds of the requests: those whose demands are united in the working set, and the measured one.
Many forks are asked with seeds behind :data:`_MANY`.
"""

_MANY = 100


@dataclass(frozen=True)
class Store:
    """A store far away, as the layer ``delay`` models it.

    Attributes:
        latency_ms: from a request to its first byte.
        bytes_per_s: of all requests together; whole gigabytes.
        in_flight: requests at once.
    """

    latency_ms: int = 2
    bytes_per_s: int = 10**9
    in_flight: int = 16

    @property
    def layer(self) -> str:
        """Its spec."""
        return f"delay={self.latency_ms}ms,{self.bytes_per_s // 10**9}GB/s,{self.in_flight}"


STORE = Store()
"""The one of every arm."""

# Pages that are all different and none of them zero, made in a second or two where instructions are
# emulated: some random ones again and again, each with its number at its start.
_FILL = f"""
import array, mmap
block = os.urandom(2 << 20)
caches = mmap.mmap(-1, {CACHES_BYTES}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for start in range(0, len(caches), len(block)):
    caches[start:start + len(block)] = block
numbers = array.array('I', range(len(caches) // {PAGE_SIZE})).tobytes()
for byte in range(4):
    caches[byte::{PAGE_SIZE}] = numbers[byte::4]
del block, numbers
"""

# An emulated processor moves strings byte by byte, and clearing that many pages so takes seconds.
_COMMAND_LINE = f"{COMMAND_LINE} clearcpuid=erms"


@dataclass(frozen=True)
class Sample:
    """Forks that were started together from a template of their own, up to their first answers.

    Attributes:
        ready_s: seconds from before the template was opened to the answer, of each fork, rising.
        resume_to_answer_s: as in :class:`pagekit.sandbox.Marks`, of each fork, rising.
        requests, moved_bytes: what the store was asked, and gave.
        demand_faults: faults that the server resolved; 0 where it maps.
        prefetched_bytes: of what was moved, what the replay fetched.
        wasted_bytes: of what was moved, what was not needed.
    """

    ready_s: tuple[float, ...]
    resume_to_answer_s: tuple[float, ...]
    requests: int
    moved_bytes: int
    demand_faults: int
    prefetched_bytes: int
    wasted_bytes: int


@dataclass
class Arm:
    """What was measured of one way to start a guest: alone, and many at once."""

    one: list[Sample] = field(default_factory=list)
    many: list[Sample] = field(default_factory=list)


@dataclass
class Remote:
    """The figures.

    Attributes:
        arms: by name, see :data:`ARMS`.
        needed_bytes, needed_bytes_many: what the measured requests need, of one and of many forks.
        working_set_bytes: what was recorded before, of other requests.
        memory_bytes: size of the guest's RAM; ``content_bytes`` of it are not zero.
        caches_s: how long the guest took to fill its caches.
        eager_tried: seconds to fetch everything, by the size of a request in bytes.
        digest: SHA-256 of the snapshot's memory, the same before and after.
    """

    arms: dict[str, Arm] = field(default_factory=lambda: {name: Arm() for name in ARMS})
    needed_bytes: int = 0
    needed_bytes_many: int = 0
    working_set_bytes: int = 0
    memory_bytes: int = 0
    content_bytes: int = 0
    caches_s: float = 0
    eager_tried: dict[int, float] = field(default_factory=dict)
    digest: str = ""

    @property
    def eager_request(self) -> int:
        """The best size of a request for ``eager``, in bytes."""
        return min(self.eager_tried, key=self.eager_tried.__getitem__)


def measure(setting: Setting, samples: int) -> Remote:
    """Make the comparison. Raises as :func:`pagekit.sandbox.comparison.compare` does.

    Args:
        setting: where.
        samples: how many there are where starts are quick: two thirds of that, of one fork, and a
            third, of many forks at once.
    """
    return _Experiment(setting).run(one=-(-samples * 2 // 3), many=-(-samples // 3))


class _Experiment:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._result = Remote()
        self._working_set = setting.run / "working-set"
        some_pages = setting.requests.some_pages
        self._one = [some_pages(MEASURED)]
        self._many = [some_pages(_MANY + number) for number in range(setting.forks)]

    def run(self, one: int, many: int) -> Remote:
        setting, result = self._setting, self._result
        snapshot = self._snapshot()
        self._record(snapshot)
        for size in EAGER_REQUESTS:
            setting.told(f"trying sizes of an eager request: {size >> 10} KiB", 0, 1)
            result.eager_tried[size] = self._load(snapshot, size)

        order = [arm for arm in ARMS for _ in range(one)]
        random.shuffle(order)
        for step, arm in enumerate(order):
            setting.told(f"one start at a time, from afar: {arm}", step, len(order))
            sample = self._sample(arm, snapshot, self._one, result.needed_bytes)
            result.arms[arm].one.append(sample)
        order = [arm for arm in ARMS for _ in range(many)]
        random.shuffle(order)
        for step, arm in enumerate(order):
            setting.told(f"{setting.forks} forks at once, from afar: {arm}", step, len(order))
            sample = self._sample(arm, snapshot, self._many, result.needed_bytes_many)
            result.arms[arm].many.append(sample)
        setting.told("checking that the template is what it was", 0, 1)
        check_snapshot(snapshot, result.digest)
        return result

    def _snapshot(self) -> Snapshot:
        """Boot the guest, have it fill its caches, and freeze it."""
        setting, result = self._setting, self._result
        setting.told("booting a larger guest, for the store far away", 0, 1)
        with Qemu.boot(
            setting.guest.kernel,
            setting.guest.initrd,
            memory_bytes=MEMORY_BYTES,
            accelerator=setting.accelerator,
            command_line=_COMMAND_LINE,
        ) as guest:
            result.caches_s = guest.exec(_FILL, timeout=120).seconds
            snapshot = guest.freeze(setting.run / "remote")
        result.memory_bytes = snapshot.memory_bytes
        result.content_bytes = snapshot.memory.stat().st_blocks * 512
        result.digest = snapshot.digest()
        return snapshot

    def _record(self, snapshot: Snapshot) -> None:
        """Find out what is demanded: by earlier requests, and by the measured ones."""
        setting, result = self._setting, self._result
        setting.told("recording what is demanded", 0, 1)
        first, *others = (
            setting.record(snapshot, [setting.requests.some_pages(seed)])[0] for seed in RECORDED
        )
        united = first
        for other in others:
            united |= other
        united.save(self._working_set)
        result.working_set_bytes = united.bytes
        _, result.needed_bytes = setting.record(snapshot, self._one)
        _, result.needed_bytes_many = setting.record(snapshot, self._many)

    def _load(self, snapshot: Snapshot, size: int) -> float:
        """Return how long it takes to fetch everything, in requests of ``size`` bytes."""
        started = time.perf_counter()
        with pagekit.Template(f"file:{snapshot.memory}", layers=[STORE.layer]) as template:
            template.load(request=size, parallel=STORE.in_flight)
            return time.perf_counter() - started

    def _sample(self, arm: str, snapshot: Snapshot, requests: list[Request], needed: int) -> Sample:
        """Start forks from a template of their own, and ask each of them once."""
        replays: list[pagekit.Replay] = []

        def load(template: pagekit.Template) -> None:
            template.load(request=self._result.eager_request, parallel=STORE.in_flight)

        def replay(template: pagekit.Template) -> None:
            working_set = pagekit.WorkingSet.load(self._working_set)
            replays.append(template.replay(working_set))

        first: dict[str, Callable[[pagekit.Template], None]] = {"eager": load, "replay": replay}
        started = time.perf_counter()
        with (
            self._setting.serving(
                snapshot,
                layers=[STORE.layer],
                first=first.get(arm, lambda _: None),
                backend="plain" if arm == "eager" else None,
            ) as server,
            Fleet(snapshot, Served(server)) as fleet,
        ):
            marks = [fork.marks for fork in self._setting.ask(fleet, requests)]
            for ahead in replays:
                ahead.wait(60)  # what comes too late is moved all the same
            statistics = server.statistics()
            server.template.audit()
        stack = dict(statistics["template"]["stack"])
        moved = int(stack["delay.bytes"])
        return Sample(
            ready_s=tuple(sorted(mark.answered - started for mark in marks if mark.answered)),
            resume_to_answer_s=tuple(sorted(mark.resume_to_answer_s or 0 for mark in marks)),
            requests=int(stack["delay.requests"]),
            moved_bytes=moved,
            demand_faults=int(statistics["demand_faults"]),
            prefetched_bytes=sum(int(ahead.statistics()["bytes"]) for ahead in replays),
            wasted_bytes=max(0, moved - needed),
        )
