"""Second handlers: a Python program answers for a part of the memory, hears of everything in order,
and may die at any moment; no target ever reads bytes that neither template nor handler has."""

from __future__ import annotations

import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import support
from support import NOBODY, PAGE, Daemon, Memory, Nobody, need_userfaultfd, program, until
from vmm import HUGE, Vmm, huge_pages

import pagekit
from pagekit.errors import RelayError, UsageError
from pagekit.relay import Fault, Fork, Joined, Left, Region, Relay, Remap, Remove, Unmap

PAGES = 512
CLAIMED = range(100, 200)
CLAIM = [(CLAIMED.start * PAGE, CLAIMED.stop * PAGE)]


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    need_userfaultfd()
    support.need_root()
    with support.reachable_directory() as directory:
        memory = support.make_memory(directory, PAGES, [(300, 400)])
        before = memory.digest()
        yield memory
        assert memory.digest() == before


@contextmanager
def served(memory: Memory, *options: object) -> Iterator[Daemon]:
    """The server program, with a socket for targets and one for second handlers."""
    path = memory.path.with_name("firecracker")
    relay = memory.path.with_name("relay")
    with Daemon(memory.spec, None, "--firecracker", path, "--relay", relay, *options) as daemon:
        assert daemon.ready["relay"] == str(relay)
        yield daemon


def relay_of(daemon: Daemon, **options: Any) -> Relay:
    return Relay(daemon.ready["relay"], **options)


def own(page: int) -> int:
    """The word of a page that a handler has."""
    return page + 1 << 32 | 0xABCDEF


def content(page: int) -> bytes:
    return struct.pack("<Q", own(page)) * (PAGE // 8)


def template(page: int) -> int:
    """The word of a page of the template."""
    word: int = struct.unpack_from("<Q", support.page_content(page))[0]
    return 0 if 300 <= page < 400 else word


def expected(start: int, stop: int) -> list[int]:
    return [own(page) if page in CLAIMED else template(page) for page in range(start, stop)]


class Target(Vmm):
    """tests/programs/relayed.c, connected and waiting for orders."""

    def __init__(self, daemon: Daemon, memory: Memory) -> None:
        command = [program("relayed"), daemon.ready["firecracker"][0], memory.path]
        self.process = support.start(command, {})
        word, _, start = self.line().partition(" ")
        assert word == "ready", word
        self.start = int(start)

    def at(self, page: int) -> int:
        return self.start + page * PAGE


class Server:
    """A handler in this process: answers every fault in a thread, and keeps what it heard."""

    def __init__(self, relay: Relay, answer: Callable[[Fault], object] | None = None) -> None:
        self.relay = relay
        self.answer = answer or (lambda fault: fault.fill(content(fault.offset // PAGE)))
        self.heard: list[Any] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            for event in self.relay:
                self.heard.append(event)
                if isinstance(event, Fault):
                    self.answer(event)
        except BaseException as error:
            self.error = error

    def faults(self) -> list[int]:
        return [event.offset // PAGE for event in self.heard if isinstance(event, Fault)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.close()
        self.thread.join(support.PATIENCE)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


def event(relay: Relay) -> Any:
    found = relay.wait(support.PATIENCE)
    assert found is not None, "nothing happened"
    return found


# What is whose


def test_a_part_by_a_second_handler_and_the_rest_by_the_template(memory: Memory) -> None:
    with (
        served(memory) as daemon,
        Server(relay_of(daemon, claim=CLAIM)) as handler,
        Target(daemon, memory) as target,
    ):
        assert target.ask(f"read 0 {PAGES} 2") == expected(0, PAGES)
        assert sorted(handler.faults()) == list(CLAIMED), "each once"
        target.quit()
        joined, left = handler.heard[0], Left(handler.heard[0].target)
        until(lambda: handler.heard[-1] == left, "the target leaves")
        whole = Region(target.start, memory.size, 0)
        assert isinstance(joined, Joined) and joined.regions == (whole,)
        assert joined.pid == target.process.pid and joined.claims and joined.parent is None
        assert {"EVENT_FORK", "EVENT_REMOVE"} <= set(joined.features)
        assert joined.page_size == PAGE and handler.relay.size == memory.size
        statistics, _ = daemon.stop()
        assert statistics["outcomes"]["relayed"]["count"] == len(CLAIMED)
        assert statistics["relay"]["deputies"] == 1 and statistics["reports"] == []
        outcomes = [one["count"] for one in statistics["outcomes"].values()]
        assert sum(outcomes) == statistics["demand_faults"]


def test_in_this_process_and_beside_the_shim(memory: Memory, tmp_path: Path) -> None:
    """`share` has the template's bytes everywhere, `copy` the handler's; also where the template is
    zero."""
    relay = tmp_path / "relay"
    claim = [*CLAIM, (320 * PAGE, 330 * PAGE)]
    code = "start = map_file()\nsay(*(start_word(start, page) for page in (50, 150, 325, 350)))"
    prelude = "def start_word(start, page):\n    import struct\n"
    prelude += "    return struct.unpack('<Q', ctypes.string_at(start + page * 4096, 8))[0]\n"
    for backend, words in (
        ("copy", [template(50), own(150), own(325), 0]),
        ("share", [template(50), template(150), 0, 0]),
    ):
        with (
            pagekit.Template(memory.spec) as opened,
            pagekit.Server(opened, tmp_path / "s", backend=backend, relay=relay) as server,
            Server(Relay(relay, claim=claim)) as handler,
        ):
            stub = memory.stub(backend)
            command = support.target_command(prelude + code, stub, memory)
            process = support.start(command, server.environment(stub, backend=backend))
            with support.stopping(process):
                assert support.ended(process)[0].split() == [str(word) for word in words]
            assert handler.heard[0].claims == (backend == "copy")


def test_what_the_template_cannot_give(memory: Memory) -> None:
    options = ["--layer", "fail=page:7", "--layer", "fail=page:8", "--deadline", "200ms"]

    def answer(fault: Fault) -> None:
        assert fault.why == "declined"
        if fault.offset == 7 * PAGE:
            fault.fill(memoryview(content(7)))
        else:
            fault.decline()

    with (
        served(memory, *options) as daemon,
        Server(relay_of(daemon, declined=True), answer) as handler,
        Target(daemon, memory) as target,
    ):
        assert target.ask("read 5 5") == [template(5), template(6), own(7), None, template(9)]
        assert sorted(handler.faults()) == [7, 8]
        target.quit()
        statistics, _ = daemon.stop()
        assert statistics["outcomes"]["relayed"]["count"] == 1
        assert statistics["outcomes"]["poisoned"]["count"] == 1


def test_every_answer(memory: Memory) -> None:
    with (
        served(memory) as daemon,
        Target(daemon, memory) as target,
        relay_of(daemon, claim=CLAIM) as relay,
    ):
        number = event(relay).target

        def by_descriptor(fault: Fault) -> None:
            import ctypes
            import fcntl

            page = ctypes.create_string_buffer(content(102), PAGE)
            copy = struct.pack("=QQQQq", fault.address, ctypes.addressof(page), PAGE, 0, 0)
            fcntl.ioctl(relay.userfaultfd(number), 0xC028AA03, copy)
            fault.done()

        answers: list[tuple[Callable[[Fault], None], int | None]] = [
            (Fault.zero, 0),
            (Fault.decline, template(101)),
            (by_descriptor, own(102)),
            (Fault.poison, None),
            (lambda fault: fault.fill(content(104)), own(104)),
        ]
        for page, (answer, word) in enumerate(answers, CLAIMED.start):
            target.tell(f"read {page} 1")
            fault = event(relay)
            assert (fault.target, fault.address, fault.offset, fault.why, fault.page_size) == (
                *(number, target.at(page), page * PAGE, "claimed", PAGE),
            )
            with pytest.raises(UsageError, match="100 bytes are no page"):
                fault.fill(bytes(100))
            answer(fault)
            assert target.answer() == [word]
        assert relay.wait(0) is None
        relay.release()
        assert target.ask("read 105 1") == [template(105)]
        with pytest.raises(UsageError, match="has left"):
            relay.userfaultfd(99)


def test_huge_pages(tmp_path: Path) -> None:
    """Claims are rounded to whole pages, which the handler fills by the descriptor."""
    memory = support.make_memory(tmp_path, 4 * HUGE // PAGE, [])
    page = support.page_content(777)
    with huge_pages(4), served(memory) as daemon:
        source = memory.path.read_bytes()

        def answer(fault: Fault) -> None:
            assert (fault.page_size, fault.offset) == (HUGE, HUGE)
            # The very bytes that the client expects.
            fault.fill(source[fault.offset : fault.offset + HUGE])

        claim = [(HUGE + 5 * PAGE, HUGE + 6 * PAGE)]
        with (
            Server(relay_of(daemon, claim=claim), answer) as handler,
            Vmm(Path(daemon.ready["firecracker"][0]), memory, f"page={HUGE}") as vmm,
        ):
            vmm.right("read 0 4")
            assert handler.faults() == [HUGE // PAGE] and page in source
            vmm.right("remove 1 1")
            vmm.right("read 0 4")


# Events


def test_every_event_in_order(memory: Memory) -> None:
    with (
        served(memory) as daemon,
        Target(daemon, memory) as target,
        relay_of(daemon, claim=CLAIM) as relay,
    ):
        number = event(relay).target
        start, stop = target.ask("remove 10 5")
        assert event(relay) == Remove(number, start, stop)
        assert target.ask("read 10 1") == [0]

        old, new = target.ask("move 100 10")
        found = [event(relay)]
        while not isinstance(found[-1], Remap):
            found.append(event(relay))  # the old place is unmapped, too
        assert found[-1] == Remap(number, old, new, 10 * PAGE)
        target.tell("read 103 1")
        fault = event(relay)
        while isinstance(fault, Unmap):
            fault = event(relay)
        assert (fault.address, fault.offset) == (new + 3 * PAGE, 103 * PAGE)
        fault.fill(content(103))
        assert target.answer() == [own(103)]

        start, stop = target.ask("unmap 500 3")
        assert event(relay) == Unmap(number, start, stop)

        # A page that the parent has not touched: the child asks for it, and gets it.
        target.tell("fork 103 2")
        fork, child = event(relay), event(relay)
        assert fork == Fork(number, child.target) and child.parent == number
        regions = {region.start: region for region in child.regions}
        assert regions[new] == Region(new, 10 * PAGE, 100 * PAGE), "as the parent stood"
        assert regions[target.at(10)].offset is None
        fault = event(relay)
        assert (fault.target, fault.offset) == (child.target, 104 * PAGE)
        fault.fill(content(104))
        assert target.answer() == [own(103), own(104)]
        assert event(relay) == Left(child.target)

        # The parent's is still its own.
        target.tell("read 104 1")
        fault = event(relay)
        assert fault.target == number
        start, stop = target.at(300), target.at(301)
        fault.zero()
        assert target.answer() == [0]
        assert target.ask("remove 300 1") == [start, stop]
        assert event(relay) == Remove(number, start, stop)
        target.quit()
        assert event(relay) == Left(number)
        statistics, _ = daemon.stop()
        assert statistics["reports"] == []
        assert statistics["outcomes"]["relayed"]["count"] == 3


def test_a_page_given_back_before_the_answer_stays_zero(memory: Memory) -> None:
    with (
        served(memory) as daemon,
        Target(daemon, memory) as target,
        relay_of(daemon, claim=CLAIM) as relay,
    ):
        event(relay)
        target.tell("write 150 1")
        assert target.answer() == []
        fault = event(relay)
        target.ask("remove 150 1")
        assert isinstance(event(relay), Remove)
        fault.fill(content(150))
        target.ask("join")
        assert target.ask("read 150 1") == [-1], "zeros, but for the byte that was written"


def test_who_comes_late_finds_it_as_it_is(memory: Memory) -> None:
    with served(memory) as daemon, Target(daemon, memory) as target:
        target.ask("remove 0 50")
        target.ask("unmap 60 10")
        assert target.ask("read 100 1") == [template(100)], "nobody claimed it yet"
        with Server(relay_of(daemon, claim=CLAIM, pid=target.process.pid)) as handler:
            until(lambda: handler.heard, "the target joins")
            regions = [
                Region(target.at(0), 50 * PAGE, None),
                Region(target.at(50), 10 * PAGE, 50 * PAGE),
                Region(target.at(70), (PAGES - 70) * PAGE, 70 * PAGE),
            ]
            assert list(handler.heard[0].regions) == regions
            with Target(daemon, memory) as another:
                assert another.ask("read 120 1") == [template(120)], "another process"
            assert target.ask("read 120 1") == [own(120)]
            assert target.ask("fork 130 1") == [own(130)], "and what it forks"


def test_writes_to_what_is_protected(memory: Memory) -> None:
    """By the descriptor a handler can protect what it claimed; then it hears of writes."""
    import fcntl

    with (
        served(memory) as daemon,
        Target(daemon, memory) as target,
        relay_of(daemon, claim=CLAIM) as relay,
    ):
        uffd = relay.userfaultfd(event(relay).target)
        missing_and_wp = struct.pack("=QQQQ", target.at(100), 100 * PAGE, 3, 0)
        fcntl.ioctl(uffd, 0xC020AA00, missing_and_wp)
        target.tell("read 150 1")
        event(relay).fill(content(150))
        assert target.answer() == [own(150)]
        for last in (False, True):
            fcntl.ioctl(uffd, 0xC018AA06, struct.pack("=QQQ", target.at(150), PAGE, 1))
            target.ask("write 150 1")
            fault = event(relay)
            assert (fault.why, fault.offset) == ("protected", 150 * PAGE)
            with pytest.raises(UsageError, match="has its content"):
                fault.fill(content(150))
            if last:
                fault.decline()
            else:
                fcntl.ioctl(uffd, 0xC018AA06, struct.pack("=QQQ", target.at(150), PAGE, 0))
                fault.done()
            target.ask("join")


# Death

HANDLER = """
import struct, sys
from pagekit.relay import Fault, Relay
PAGE = 4096
with Relay(sys.argv[1], claim=[(100 * PAGE, 200 * PAGE)]) as relay:
    print("ready", flush=True)
    for event in relay:
        if isinstance(event, Fault):
            event.fill(struct.pack("<Q", (event.offset // PAGE) + 1 << 32 | 0xABCDEF) * 512)
"""


def handler_process(daemon: Daemon) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", HANDLER, daemon.ready["relay"]], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_killed_at_any_instant(memory: Memory) -> None:
    """Thirty handlers, one after the other, each killed somewhere in the middle: each target reads
    every byte of its memory meanwhile, and every one is right."""
    dice = random.Random(1)
    kills = 0
    with served(memory, "--deadline", "60s") as daemon:
        handler = handler_process(daemon)
        while kills < 30:
            with Target(daemon, memory) as target:
                target.tell(f"read 0 {PAGES} 2")
                impatience = threading.Event()
                impatience.wait(dice.random() * 0.02)
                handler.send_signal(signal.SIGKILL)
                handler.wait()
                kills += 1
                handler.stdout.close()
                handler = handler_process(daemon)
                assert target.answer() == expected(0, PAGES), f"after {kills} kills"
        handler.send_signal(signal.SIGKILL)
        handler.wait()
        handler.stdout.close()
        statistics, _ = daemon.stop()
        # A target may end with faults of which nobody waits for the answer any more.
        known = {"copied", "zeroed", "woken", "relayed", "abandoned"}
        assert statistics["outcomes"].keys() <= known, statistics["outcomes"]
        assert statistics["relay"]["deputies_ever"] == 31
        assert statistics["relay"]["cut_off"] == 0


def test_without_a_successor_it_fails_and_says_so(memory: Memory) -> None:
    with served(memory, "--deadline", "300ms") as daemon, Target(daemon, memory) as target:
        with relay_of(daemon, claim=CLAIM) as relay:
            event(relay)
            target.tell("read 98 4")
            assert isinstance(event(relay), Fault)
        # It dies with the fault open: nobody comes.
        assert target.answer() == [template(98), template(99), None, None]
        with Server(relay_of(daemon, claim=CLAIM)):
            assert target.ask("read 102 2") == [own(102), own(103)]
            assert target.ask("read 100 1") == [None], "what has failed stays so"
        target.quit()
        statistics, err = daemon.stop()
        assert statistics["outcomes"]["poisoned"]["count"] == 2
        assert any("1 wait for a successor" in report for report in statistics["reports"])
        assert "page 100 is a second handler's: it did not come within 300ms" in err


def test_who_is_too_slow_is_cut_off(memory: Memory) -> None:
    with (
        served(memory, "--deadline", "300ms") as daemon,
        Target(daemon, memory) as target,
        relay_of(daemon, claim=CLAIM) as relay,
    ):
        assert relay.deadline == pytest.approx(0.3)
        event(relay)
        assert target.ask("read 150 1") == [None]
        late = event(relay)
        with pytest.raises(RelayError, match="did not answer a fault within 300ms"):
            event(relay)
        with pytest.raises(EOFError):
            relay.wait()
        assert list(relay) == []
        with pytest.raises(RelayError, match="is over"):
            late.zero()


HOSTILE = {
    "nonsense": ("does not speak", lambda _: [b"GET / HTTP/1.1"]),
    "another version": ("speaks version 7", lambda _: [b"pkrl\x07\x01"]),
    "empty": ("does not speak", lambda _: [b"pkrl"]),
    "an unknown kind": ("kind 99 is malformed", lambda _: [b"pkrl\1\x63"]),
    "half a page": (
        "kind 13 is malformed",
        lambda fault: [b"pkrl\1\x0d" + struct.pack("=Q", fault) + bytes(2048)],
    ),
    "twice": ("which it has not", lambda fault: [b"pkrl\1\x0e" + struct.pack("=Q", fault)] * 2),
    "another's fault": ("which it has not", lambda _: [b"pkrl\1\x0c" + struct.pack("=Q", 1 << 60)]),
    "the server's words": (
        "message of the server's",
        lambda _: [b"pkrl\1\x0b" + struct.pack("=Q", 1)],
    ),
    "too much": ("did not fit", lambda _: [bytes(100_000)]),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_handlers(memory: Memory, how: str) -> None:
    """Whatever one sends, it is cut off with a word on why, and its faults wait for another."""
    reason, make = HOSTILE[how]
    with served(memory) as daemon, Target(daemon, memory) as target:
        with relay_of(daemon, claim=CLAIM) as relay:
            event(relay)
            target.tell("read 150 1")
            fault = event(relay)
            raw = socket.socket(fileno=relay.fileno())
            for message in make(fault._number):
                raw.send(message)
            raw.detach()
            with pytest.raises(RelayError, match=re.escape(reason)):
                event(relay)
        with Server(relay_of(daemon, claim=CLAIM)):
            assert target.answer() == [0 if how == "twice" else own(150)]
            assert target.ask(f"read 151 {PAGES - 151}") == expected(151, PAGES)
        target.quit()
        statistics, _ = daemon.stop()
        assert statistics["relay"]["cut_off"] == 1
        assert reason in statistics["reports"][0]


def test_visitors_that_say_nothing_and_strangers(memory: Memory) -> None:
    nobody = Nobody(memory.path.parent)
    code = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
print(s.recv(100))
"""
    with served(memory, "--mode", "666", "--allow", "0") as daemon:
        visitors = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(70)]
        for visitor in visitors[:60]:
            visitor.connect(daemon.ready["relay"])
        with Server(relay_of(daemon, claim=CLAIM)), Target(daemon, memory) as target:
            assert target.ask("read 150 1") == [own(150)]
        command = [nobody.python, "-c", code, daemon.ready["relay"]]
        process = support.start(command, {}, **nobody.who)
        with support.stopping(process):
            assert support.ended(process)[0] == "b''\n"
        for visitor in visitors:
            visitor.close()
        statistics, _ = daemon.stop()
        assert f"user {NOBODY} " in statistics["reports"][0]


def test_errors(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(RelayError, match="no relay can be reached") as raised:
        Relay(tmp_path / "nobody")
    assert raised.value.hint and "--relay" in raised.value.hint
    for bad in [(0, 0), (1, PAGE), (0, PAGE + 1), (PAGE, 0), (-PAGE, PAGE)]:
        with pytest.raises(UsageError, match="no range of pages"):
            Relay(tmp_path / "nobody", claim=[bad])
    with pytest.raises(UsageError, match="no process"):
        Relay(tmp_path / "nobody", pid=-1)
    with served(memory) as daemon:
        with pytest.raises(RelayError, match="refuses: the template has 512 pages"):
            relay_of(daemon, claim=[(0, memory.size + PAGE)])
        claim = [(0, PAGE), (PAGE, 3 * PAGE), (2 * PAGE, 5 * PAGE), (9 * PAGE, 10 * PAGE)]
        with relay_of(daemon, claim=claim, declined=True) as first:
            for other in ({"claim": [(4 * PAGE, 5 * PAGE)]}, {"declined": True}):
                with pytest.raises(RelayError, match="by a second handler"):
                    relay_of(daemon, **other)
            with relay_of(daemon, claim=[(5 * PAGE, 9 * PAGE)]):
                pass
            assert "deadline=5.0" in repr(first)
        assert "closed" in repr(first)
        with pytest.raises(EOFError):
            first.wait()
        first.close()
        with relay_of(daemon) as last:
            daemon.stop()
            assert list(last) == []


def test_waiting_lets_other_threads_run(memory: Memory) -> None:
    """The GIL is given up: this thread goes on while that one waits; closing ends its waiting."""
    with (
        served(memory) as daemon,
        Server(relay_of(daemon)) as handler,
        Target(daemon, memory) as target,
    ):
        until(lambda: handler.heard, "it hears while this thread waits")
        assert target.ask("read 0 1") == [template(0)]
