"""Drives tests/programs/events.c, and compares what it knows of its memory with what the server
knows and what others see of it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import support
from support import Memory, make_memory, program
from vmm import Vmm, huge_pages

import pagekit

HUGE = 2 << 20
ALL = "fork,remap,remove,unmap"
Pieces = list[tuple[int, int, int | None]]


@dataclass(frozen=True)
class Plan:
    """What a kind of targets is, and what it goes through."""

    name: str
    options: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    page: int = support.PAGE
    pages: int = 1024
    operations: int = 1200
    threads: int = 4
    replay: bool = False
    """Whether the template's pages are fetched ahead meanwhile, and put into the targets."""

    @property
    def forks(self) -> bool:
        return not self.shared and "no-fork" not in self.options and self.has("fork")

    @property
    def shared(self) -> bool:
        return "memory=shared" in self.options

    def has(self, event: str) -> bool:
        given = [option for option in self.options if option.startswith("events=")]
        return not given or event in given[0]


PLANS = [
    Plan("private"),
    Plan("slow", layers=("delay=300us",), operations=400),
    Plan("replay", replay=True),
    Plan("shared", options=("memory=shared",)),
    Plan("thread-and-exact", options=(f"events={ALL},thread,exact",)),
    Plan("no-fork", options=("events=remap,remove,unmap",)),
    Plan("no-remove", options=("events=fork,remap,unmap",)),
    Plan("no-unmap", options=("events=remap,remove",)),
    Plan("no-remap", options=("events=fork,remove,unmap",)),
    Plan("huge", page=HUGE, pages=9, operations=100),
]


class Target(Vmm):
    """One target, and its children. All of them are ended with it."""

    def __init__(self, socket: Path, memory: Memory, plan: Plan) -> None:
        command = [program("events"), socket, memory.path, f"page={plan.page}", *plan.options]
        if plan.page == HUGE:
            command.append("regions=3")
        self.process = support.start(command, {}, start_new_session=True)
        assert self.line().startswith("ready ")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(support.PATIENCE)

    def was_right(self) -> dict[str, Any]:
        answer = self.answer()
        if answer["wrong"] or answer["failed"]:
            self.kill()
            raise AssertionError(f"{answer}: {support.ended(self.process, None)[1]}")
        return answer

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.kill()


def run(plan: Plan, place: Path, seed: int, targets: int = 3) -> Counter[str]:
    """Several targets at once, each of which goes through one storm and is looked at: what was
    done.

    Raises:
        AssertionError: something was not as it must be, with the command that repeats it.
    """
    program("events")  # compiled before threads want it
    done: Counter[str] = Counter()
    memory = make_memory(place, plan.pages * plan.page // support.PAGE)
    before = memory.digest()
    errors: list[BaseException] = []
    with ExitStack() as stack:
        if plan.page == HUGE:
            stack.enter_context(huge_pages(plan.pages * targets * 4))
        working_set = recorded(plan, place, memory) if plan.replay else None
        template = pagekit.Template(memory.spec, layers=plan.layers)
        stack.enter_context(template)
        server = stack.enter_context(pagekit.Server(template, firecracker=place / "socket"))

        def one(number: int) -> None:
            try:
                done.update(one_target(plan, server, memory, f"{seed} {number}"))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(targets)]
        for thread in threads:
            thread.start()
        if working_set:
            assert template.replay(working_set, rate=8 << 20).wait(support.PATIENCE)
        for thread in threads:
            thread.join()
        if errors:
            raise AssertionError(f"{errors[0]}\nagain: {again(plan, seed)}") from errors[0]
        assert server.wait(support.PATIENCE), server.statistics()["targets"]
        statistics = server.statistics()
        ended = sum(outcome["count"] for outcome in statistics["outcomes"].values())
        assert ended == statistics["demand_faults"], statistics["outcomes"]
        reports = [report for report in statistics["reports"] if "does not announce" not in report]
        assert reports == []
        template.audit()
    assert memory.digest() == before
    return done


def again(plan: Plan, seed: int) -> str:
    """The command that repeats a run (its draws, that is: not how its threads meet)."""
    return (
        f"PAGEKIT_SEED={seed} .venv/bin/pytest 'tests/test_events.py::test_at_random[{plan.name}]'"
    )


def soak(seconds: float, seed: int) -> dict[str, dict[str, int]]:
    """Runs all plans, one after the other, again and again: what was done, by plan."""
    draw = random.Random(seed)
    done: dict[str, Counter[str]] = {plan.name: Counter() for plan in PLANS}
    end = time.monotonic() + seconds
    plans: list[Plan] = []
    while time.monotonic() < end:
        plans = plans or list(PLANS)
        plan = plans.pop(0)
        if plan.page == HUGE and os.geteuid() != 0:
            continue
        with tempfile.TemporaryDirectory(prefix="pk-events-") as place:
            done[plan.name].update(run(plan, Path(place), draw.randrange(1 << 30)))
        done[plan.name]["runs"] += 1
    return {name: dict(counted) for name, counted in done.items()}


def recorded(plan: Plan, place: Path, memory: Memory) -> pagekit.WorkingSet:
    """What one target demands."""
    with pagekit.Template(memory.spec) as template:
        recording = template.record()
        with pagekit.Server(template, firecracker=place / "socket") as server:
            one_target(plan, server, memory, "recorded")
        return recording.finish()


def one_target(plan: Plan, server: pagekit.Server, memory: Memory, seed: str) -> dict[str, int]:
    draw = random.Random(seed)
    [socket] = server.firecracker
    with Target(socket, memory, plan) as target:
        target.right(f"storm {plan.operations} {plan.threads} {draw.randrange(1 << 30)}")
        done = target.right("check")
        family = Family(target, server, memory, plan)
        family.look()
        if plan.forks:
            family.fork(draw.randrange(1 << 30))
            family.look()
            done = target.right("release")
        return done


class Family:
    """A target and its children while all of them are quiet: what each knows of its memory."""

    def __init__(self, target: Target, server: pagekit.Server, memory: Memory, plan: Plan) -> None:
        self.target, self.server, self.plan = target, server, plan
        self.content = memory.path.read_bytes()
        self.path = memory.path.with_name(f"model-{target.process.pid}")
        self.paths = [self.path]

    def fork(self, seed: int) -> None:
        child = self.path.with_name(f"{self.path.name}-child")
        self.target.ask(f"fork {seed} 150 {child}")
        self.paths += [child, Path(f"{child}.1")]

    def look(self) -> None:
        self.target.ask(f"model {self.path}")
        models = [json.loads(path.read_text()) for path in self.paths]
        # The target first; then its children, some of which have ended and are not forgotten yet.
        known = [self.known(number) for number in self.ids()]
        for model in models:
            self.from_outside(model)
        told = [self.told(model) for model in models]
        if not self.plan.has("unmap"):
            # What is unmapped stays known.
            known = [only(one, told[0]) for one in known]
        assert known[0] == told[0], difference(known[0], told[0])
        # Which of the children is which process nobody says.
        for one in told[1:]:
            assert one in known[1:], [difference(other, one) for other in known[1:]]
        for model, one in zip(models, told, strict=True):
            registered = merged(registered_ranges(model["pid"]))
            assert merged((start, end) for start, end, _ in one) == registered

    def known(self, number: int) -> Pieces:
        pieces = self.server.regions(number) or []
        return normal([(start, start + length, page) for start, length, page in pieces])

    def ids(self) -> list[int]:
        targets = self.server.statistics()["targets"]
        family = [one["id"] for one in targets if one["pid"] == self.target.process.pid]
        for one in targets:
            if one["parent"] in family:
                family.append(one["id"])
        return family

    def told(self, model: dict[str, Any]) -> Pieces:
        """What its events told, as the engine has it."""
        pieces: Pieces = []
        size, factor = self.plan.page, self.plan.page // support.PAGE
        for chunk in model["chunks"]:
            for index, (_, told, *_) in enumerate(chunk["pages"]):
                start = chunk["at"] + index * size
                pieces.append((start, start + size, None if told < 0 else told * factor))
        return normal(pieces)

    def from_outside(self, model: dict[str, Any]) -> None:
        """Reads all its memory from this process, where the faults are the kernel's."""
        size = self.plan.page
        for chunk in model["chunks"]:
            length = len(chunk["pages"]) * size
            got = read_process(model["pid"], chunk["at"], length)
            for index, (base, _, slot, word, loose) in enumerate(chunk["pages"]):
                read = got[index * size : (index + 1) * size]
                expected = bytes(size)
                if base >= 0:
                    expected = self.content[base * size : (base + 1) * size]
                if word:
                    own = word.to_bytes(8, "little")
                    expected = expected[: slot * 8] + own + expected[slot * 8 + 8 :]
                right = base == -2 or read == expected or (loose and read == bytes(size))
                assert right, f"page at {chunk['at'] + index * size:#x} is wrong from outside"


def normal(pieces: Sequence[tuple[int, int, int | None]]) -> Pieces:
    """Rising, and as few as can be."""
    done: Pieces = []
    for start, end, page in sorted(pieces):
        if done and done[-1][1] == start:
            first, _, before = done[-1]
            goes_on = None if before is None else before + (start - first) // support.PAGE
            if (before is None) == (page is None) and goes_on == page:
                done[-1] = (first, end, before)
                continue
        done.append((start, end, page))
    return done


def only(pieces: Pieces, there: Pieces) -> Pieces:
    """The parts of ``pieces`` that are where ``there`` has something."""
    parts = []
    for start, end, page in pieces:
        for first, last, _ in there:
            if start < last and first < end:
                at = max(start, first)
                moved = None if page is None else page + (at - start) // support.PAGE
                parts.append((at, min(end, last), moved))
    return normal(parts)


def difference(known: Pieces, told: Pieces) -> str:
    def shown(pieces: set[tuple[int, int, int | None]]) -> list[str]:
        return [f"{start:#x}-{end:#x}: {page}" for start, end, page in sorted(pieces)[:5]]

    return f"the server has {shown({*known} - {*told})}, the target {shown({*told} - {*known})}"


def merged(ranges: Any) -> list[tuple[int, int]]:
    done: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if done and done[-1][1] == start:
            done[-1] = (done[-1][0], end)
        else:
            done.append((start, end))
    return done


def registered_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """What the kernel says is registered for missing pages."""
    where = (0, 0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            where = int(found[1], 16), int(found[2], 16)
        elif line.startswith("VmFlags:") and " um" in line:
            yield where


class Part(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_process(pid: int, start: int, length: int) -> bytes:
    """process_vm_readv(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(length)
    local = Part(ctypes.cast(buffer, ctypes.c_void_p), length)
    remote = Part(start, length)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    got = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    why = os.strerror(ctypes.get_errno())
    assert got == length, f"{got} of {length} bytes at {start:#x}: {why}"
    return buffer.raw
