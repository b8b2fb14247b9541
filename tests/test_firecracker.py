"""Clients that come in as Firecracker does, with a userfaultfd of their own: every byte is the
template's, or what they wrote, or zero where they gave memory back; whatever a client does wrong,
it ends clearly, and nobody else notices."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import soak
import support
from support import (
    NOBODY,
    PAGE,
    PROGRAMS,
    Daemon,
    Memory,
    Nobody,
    need_userfaultfd,
    start,
    stopping,
    until,
)
from vmm import HUGE, Vmm, descriptors, free_huge_pages, given_back, huge_pages

import pagekit

PAGES = 2048
HOLES = [(64, 128), (500, 501), (1024, 1400)]


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    need_userfaultfd()
    with support.reachable_directory() as directory:
        memory = support.make_memory(directory, PAGES, HOLES)
        before = memory.digest()
        yield memory
        assert memory.digest() == before


def serve(memory: Memory, *options: object, **more: Any) -> Daemon:
    """The server program, with a socket for Firecracker's clients alone."""
    path = memory.path.with_name("firecracker")
    return Daemon(memory.spec, None, "--firecracker", path, *options, **more)


def door(daemon: Daemon, number: int = 0) -> Path:
    return Path(daemon.ready["firecracker"][number])


@contextmanager
def served(memory: Memory, *options: object) -> Iterator[Daemon]:
    """A server that must have nothing to complain of, and gives back what its clients cost."""
    with serve(memory, *options) as daemon:
        before = descriptors(daemon.process.pid)
        yield daemon
        given_back(daemon.process.pid, before)
        statistics, err = daemon.stop()
        assert statistics["reports"] == [] and statistics["targets"] == []
        assert "error" not in err
        outcomes = {name: one["count"] for name, one in statistics["outcomes"].items()}
        # A client may end with faults of which nobody waits for the answer any more.
        assert outcomes.keys() <= {"copied", "zeroed", "woken", "abandoned"}, outcomes
        assert sum(outcomes.values()) == statistics["demand_faults"]


def exercise(vmm: Vmm) -> None:
    """Everything a guest does to its memory, one after the other."""
    pages = vmm.pages
    vmm.right(f"read 0 {pages // 2} random 2 both")
    vmm.right(f"write {pages // 4} {pages // 2} both")
    vmm.right(f"remove {pages // 3} {pages // 3}")
    vmm.right(f"read 0 {pages} random 2 both")
    vmm.right(f"write 0 {pages} both")
    vmm.right(f"read 0 {pages} sequential 1 kernel")


# Handshakes


@pytest.mark.parametrize(
    "options",
    [
        ["size=page_size"],
        ["size=page_size_kib"],
        ["size=both", "unknown=1"],
        ["regions=0+700,700+1,701+1347"],
        ["regions=1400+648,3+60,0+3,700+700"],
        ["regions=1400+648,3+60,0+3,700+700", "place=adjacent"],
        ["split=64", "place=7"],
        ["split=2048", "place=8"],
        ["split=4", "send=first"],
        ["split=4", "send=last"],
        ["split=4", "send=after"],
        ["split=4", "memory=shared"],
    ],
    ids=" ".join,
)
def test_handshakes(memory: Memory, options: list[str]) -> None:
    """Both spellings, unknown fields, regions in any order and of any size, with holes between them
    or none, in one message or in pieces."""
    with served(memory) as daemon, Vmm(door(daemon), memory, *options) as vmm:
        exercise(vmm)


@pytest.mark.parametrize("spelling", ["page_size", "page_size_kib"])
def test_huge_pages(tmp_path: Path, spelling: str) -> None:
    memory = support.make_memory(tmp_path, 8 * HUGE // PAGE, [(600, 2100), (3000, 3001)])
    regions = ["regions=5+2,0+4,7+1", "place=5", f"page={HUGE}", f"size={spelling}"]
    with huge_pages(8), served(memory) as daemon, Vmm(door(daemon), memory, *regions) as vmm:
        exercise(vmm)


def test_fifty_thousand_regions(tmp_path: Path) -> None:
    """As many as a process can have mappings; side by side they are one for the kernel."""
    count = 50_000
    with support.reachable_directory() as directory:
        memory = support.make_memory(directory, count, [(1000, count - 1000)])
        options = [f"split={count}", "place=adjacent"]
        with served(memory) as daemon, Vmm(door(daemon), memory, *options) as vmm:
            vmm.right("read 0 2000 random 2 both")
            vmm.right("remove 100 500")
            vmm.right(f"read 0 {count} sequential")


# Many


def test_many_vmms_at_one_socket(memory: Memory) -> None:
    """Twenty at once, two threads each, all doing all they can."""
    with served(memory) as daemon, ExitStack() as stack:
        vmms = [
            stack.enter_context(Vmm(door(daemon), memory, f"split={1 + i % 5}", f"place={i + 1}"))
            for i in range(20)
        ]
        for number, vmm in enumerate(vmms):
            vmm.tell(f"storm 1000 2 {number}")
            vmm.tell(f"read 0 {vmm.pages}")
        for vmm in vmms:
            assert vmm.was_right()["removed"] > 0
            vmm.was_right()


def test_a_socket_for_each_fork(memory: Memory) -> None:
    """Each with clients of its own, one template for all: what one brought is there for others."""
    paths = [memory.path.with_name(f"fork-{number}") for number in range(3)]
    options = [part for path in paths for part in ("--firecracker", path)]
    with Daemon(memory.spec, None, *options) as daemon:
        assert daemon.ready["firecracker"] == [str(path) for path in paths]
        with ExitStack() as stack:
            for path in [*paths, paths[1]]:
                vmm = stack.enter_context(Vmm(path, memory))
                vmm.right(f"read 0 {vmm.pages} random 2 both")
        statistics, _ = daemon.stop()
        assert statistics["targets_ever"] == 4 and statistics["reports"] == []
        assert statistics["bytes_read"] <= memory.size
    assert not any(path.exists() for path in paths)


def test_beside_the_shim(memory: Memory) -> None:
    """One server, both kinds of clients."""
    path = memory.path.with_name("both")
    with Daemon(
        memory.spec, path.with_name("shim"), "--firecracker", path, "--backend", "share"
    ) as daemon:
        stub = memory.stub()
        command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
        process = start(command, daemon.environment(stub))
        with stopping(process), Vmm(path, memory) as vmm:
            exercise(vmm)
            support.ended(process)
        statistics, _ = daemon.stop()
        assert statistics["targets_ever"] == 2 and statistics["reports"] == []


# Who may


def test_owner_and_mode(memory: Memory) -> None:
    nobody = Nobody(memory.path.parent)
    with (
        support.sysctl("vm.unprivileged_userfaultfd", "1"),
        serve(memory, "--owner", f"{NOBODY}:{NOBODY}", "--mode", "600") as daemon,
    ):
        status = door(daemon).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (NOBODY, NOBODY, 0o600)
        with Vmm(door(daemon), memory, **nobody.who) as vmm:
            exercise(vmm)
    with serve(memory) as daemon:
        assert door(daemon).stat().st_mode & 0o777 == 0o600
        with (
            support.sysctl("vm.unprivileged_userfaultfd", "1"),
            pytest.raises(AssertionError, match="Permission denied"),
        ):
            Vmm(door(daemon), memory, **nobody.who)


def test_only_listed_users(memory: Memory) -> None:
    """Who may open the socket but is not on the list finds the connection closed, and is left
    alone; the others do not notice."""
    nobody = Nobody(memory.path.parent)
    code = "client = connect()\nsend(client, [])\nuntil_closed(client)"
    with (
        support.sysctl("vm.unprivileged_userfaultfd", "1"),
        serve(memory, "--mode", "666", "--allow", NOBODY) as daemon,
        Vmm(door(daemon), memory, **nobody.who) as vmm,
    ):
        vmm.right(f"read 0 {PAGES // 2}")
        before = descriptors(daemon.process.pid)
        for _ in range(3):
            assert hostile(daemon, memory, code) == (0, "closed\n")
        given_back(daemon.process.pid, before)
        vmm.right(f"read 0 {vmm.pages}")
        vmm.quit()
        statistics, _ = daemon.stop()
        assert statistics["targets_ever"] == 1 and len(statistics["reports"]) == 3
        for report in statistics["reports"]:
            assert "user 0 " in report and "not allowed" in report


# Memory given back


@pytest.mark.parametrize(
    "options",
    [
        ["regions=100+64"],
        ["regions=100+64", "memory=shared"],
        ["split=16", "place=3"],
        ["split=16", "place=adjacent"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("delay", [None, "200us"])
def test_removals_race_with_everything(
    memory: Memory, options: list[str], delay: str | None, tmp_path: Path
) -> None:
    """Threads read, write and give pages back, in user mode and in the kernel, while the source
    answers at once or later: content becomes zero only while madvise runs, and never comes back."""
    layers = ["--layer", f"delay={delay}"] if delay else []
    scratch = f"scratch={tmp_path / 'scratch'}"
    with served(memory, *layers) as daemon:
        for seed in range(3):
            with Vmm(door(daemon), memory, *options, scratch) as vmm:
                done = vmm.right(f"storm 3000 4 {seed}")
                assert done["removed"] and done["kernel_reads"] and done["writes"]
                vmm.right("read 0 64 random 1 kernel")


def test_removals_race_with_everything_on_huge_pages(tmp_path: Path) -> None:
    memory = support.make_memory(tmp_path, 16 * HUGE // PAGE, [(1000, 3000)])
    options = [f"page={HUGE}", "split=4", "place=2"]
    with huge_pages(16), served(memory) as daemon, Vmm(door(daemon), memory, *options) as vmm:
        assert vmm.right("storm 300 4 1")["removed"]
        vmm.right("read 0 16 random 1 kernel")


def test_soak_in_short() -> None:
    """`make soak`, for a moment."""
    for name, done in soak.soak(3.0, seed=1, clients=2).items():
        assert done["clients"] > 0 and done["removed"] > 0, name


def test_a_page_given_back_before_it_was_read(memory: Memory) -> None:
    """Neighbours are filled along with the page that is wanted: not these."""
    with served(memory) as daemon, Vmm(door(daemon), memory) as vmm:
        for first in range(600, 1000, 7):
            vmm.right(f"remove {first} 3")
        vmm.right(f"read 0 {vmm.pages} sequential")


# The end of a page, of a client


@pytest.mark.parametrize("way", ["user", "kernel"])
def test_a_page_that_cannot_be_had(memory: Memory, way: str) -> None:
    """Touching it fails loudly, in user mode and in the kernel; its neighbours are right."""
    options = ["--layer", "fail=page:777", "--deadline", "200ms"]
    with serve(memory, *options) as daemon, Vmm(door(daemon), memory, "split=2") as vmm:
        answer = vmm.ask(f"read 760 40 random 2 {way}")
        assert answer["failed_pages"] == [777] and answer["wrong"] == 0 and answer["reads"] == 39
        vmm.right("read 0 700")
        vmm.quit()
        statistics, err = daemon.stop()
        assert statistics["outcomes"]["poisoned"]["count"] == 1
        [report] = statistics["reports"]
        assert f"pid {vmm.process.pid}" in report and "fail=page:777" in report and report in err


def test_a_huge_page_that_cannot_be_had(tmp_path: Path) -> None:
    memory = support.make_memory(tmp_path, 4 * HUGE // PAGE, [])
    options = ["--layer", "fail=page:777", "--deadline", "200ms"]
    with (
        huge_pages(4),
        serve(memory, *options) as daemon,
        Vmm(door(daemon), memory, f"page={HUGE}") as vmm,
    ):
        answer = vmm.ask("read 0 4 random 2 both")
        assert answer["failed_pages"] == [1] and answer["wrong"] == 0 and answer["reads"] == 3


def test_too_few_huge_pages(tmp_path: Path) -> None:
    """The host promised more than it has: the touch fails, in words, and what was there stays."""
    with ExitStack() as stack:
        stack.enter_context(huge_pages(0))
        pages = (free_huge_pages() + 1) * HUGE // PAGE
        memory = support.make_memory(tmp_path, pages, [(0, pages - 3)])
        daemon = stack.enter_context(serve(memory, "--deadline", "200ms"))
        vmm = stack.enter_context(Vmm(door(daemon), memory, f"page={HUGE}"))
        answer = vmm.ask(f"read 0 {vmm.pages} sequential")
        assert answer["failed_pages"] == [vmm.pages - 1] and answer["wrong"] == 0
        vmm.quit()
        statistics, _ = daemon.stop()
        assert any("Cannot allocate memory" in report for report in statistics["reports"])


def test_a_target_comes_and_goes(memory: Memory) -> None:
    path = memory.path.with_name("comes-and-goes")
    with (
        pagekit.Template(memory.spec) as template,
        pagekit.Server(template, firecracker=path) as server,
    ):
        for kill in (False, True):
            with Vmm(path, memory) as vmm:
                vmm.right("read 0 10")
                [target] = server.statistics()["targets"]
                assert target["pid"] == vmm.process.pid and target["backend"] == "copy"
                if kill:
                    vmm.kill()
                else:
                    vmm.quit()
                until(lambda: server.statistics()["targets"] == [], "noticing the end")
        assert server.wait(0)
        assert server.statistics()["reports"] == []
    assert not path.exists()


def test_clients_end_with_the_server(memory: Memory) -> None:
    """The pages that they miss would never come."""
    with serve(memory) as daemon, Vmm(door(daemon), memory) as vmm:
        vmm.right("read 0 10")
        _, err = daemon.stop()
        support.ended(vmm.process, -signal.SIGKILL)
        assert "the server ends, and pages that it misses would never come" in err


# Bad input


def hostile(daemon: Daemon, memory: Memory, code: str, *arguments: object) -> tuple[int, str]:
    """Runs a client that does something wrong to its end: its status, and what it said."""
    prelude = (PROGRAMS / "hostile.py").read_text()
    command = ["python3", "-I", "-S", "-c", f"{prelude}\n{code}"]
    process = start([*command, door(daemon), memory.size, *arguments], {})
    with stopping(process):
        out, err = support.ended(process, None)
        assert not err, err
        return process.returncode, out


@contextmanager
def undisturbed(memory: Memory, *options: object) -> Iterator[tuple[Daemon, dict[str, Any]]]:
    """A server with a target that was there before, and must not notice what happens; new ones are
    served as well, and nothing stays behind. Gives the server, and a place for its statistics."""
    found: dict[str, Any] = {}
    with serve(memory, *options) as daemon, Vmm(door(daemon), memory, "split=3") as witness:
        witness.right("read 0 1000 random")
        before = descriptors(daemon.process.pid)
        yield daemon, found
        given_back(daemon.process.pid, before)
        with Vmm(door(daemon), memory, "split=2") as newcomer:
            exercise(newcomer)
        exercise(witness)
        witness.quit()
        statistics, err = daemon.stop()
        assert "panic" not in err and "bug" not in err
        found.update(statistics)


BEFORE = "uffd = userfaultfd()\nstart = register(uffd, room())\nclient = connect()\n"

BAD_MESSAGES = {
    "text": ("b'hello'", "does not begin with an array"),
    "an object": ("b'{}'", "does not begin with an array"),
    "null": ("b'null'", "does not begin with an array"),
    "no UTF-8": ("b'[\"\\xff\\xfe\"]'", "no array of regions"),
    "cut": ("b'[{\"size\":4096,'", "hung up in the middle"),
    "empty": ("b'[]'", "there are no regions"),
    "nothing said": ("b'[{}]'", "missing field `base_host_virt_addr`"),
    "deep": ("b'[' * 100_000", "nested deeper than 16"),
    "deep inside": ("b'[{\"a\":' * 50_000", "nested deeper than 16"),
    "long": ("b'[' + b' ' * (64 << 20) + b']'", "longer than 8388608 bytes"),
    "too many": ("b'[' + b'0,' * 70_000 + b'0]'", "no array of regions"),
    "negative": ("[region(start, -1)]", "invalid value"),
    "float": ("[region(start, 4096.5)]", "invalid type"),
    "huge float": ("[region(start, 1e300)]", "invalid type"),
    "string": ("[region(start, '4096')]", "invalid type"),
    "no number": ("[region(start, None)]", "invalid type"),
    "no u64": ("[region(start, 1 << 64)]", "invalid"),
    "largest size": ("[region(start, (1 << 64) - PAGE)]", "beyond the last address"),
    "largest start": ("[region((1 << 64) - PAGE, 2 * PAGE)]", "beyond the last address"),
    "size 0": ("[region(start, 0)]", "it is empty"),
    "unaligned size": ("[region(start, 100)]", "size 100 is no multiple of the page size"),
    "unaligned start": ("[region(start + 1, PAGE)]", "is no multiple of the page size"),
    "unaligned offset": ("[region(start, PAGE, 1)]", "offset 1 is no multiple"),
    "behind the template": ("[region(start, PAGE, SIZE)]", "no part of the template's"),
    "half behind it": ("[region(start, SIZE, PAGE)]", "no part of the template's"),
    "largest offset": ("[region(start, PAGE, (1 << 64) - PAGE)]", "no part of the template's"),
    "overlap": ("[region(start, 2 * PAGE), region(start + PAGE, PAGE)]", "overlap"),
    "twice": ("[region(start, PAGE), region(start, PAGE, PAGE)]", "overlap"),
    "no page size": ("[region(start, other=1)]", "there is no page_size"),
    "page size 0": ("[region(start, page_size=0)]", "page_size 0 is neither"),
    "page size 4": ("[region(start, page_size_kib=4)]", "page_size 4 is neither"),
    "page size 8192": ("[region(start, page_size=8192)]", "page_size 8192 is neither"),
    "two page sizes": ("[region(start, page_size=PAGE, page_size_kib=HUGE)]", "contradicts"),
    "mixed page sizes": (
        "[region(start, HUGE), region(start & -HUGE, HUGE, page_size=HUGE)]",
        "page_size 2097152, where the first region has 4096",
    ),
    "not that page size": ("[region(start & -HUGE, HUGE, page_size=HUGE)]", "not huge pages"),
    "elsewhere": ("[region(room(), PAGE)]", "is not registered with its userfaultfd"),
    "behind it": ("[region(start + SIZE - PAGE, 2 * PAGE)]", "is not registered"),
    "one elsewhere": ("[region(start, PAGE), region(PAGE, PAGE)]", "is not registered"),
}


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_bad_messages(memory: Memory, kind: str) -> None:
    """With a userfaultfd that nobody will ever serve: the client would hang at its first fault, so
    the server ends it, and says why."""
    message, words = BAD_MESSAGES[kind]
    code = f"{BEFORE}send(client, {message}, [uffd])\nclient.shutdown(socket.SHUT_WR)\nlive_on()"
    with undisturbed(memory) as (daemon, found):
        assert hostile(daemon, memory, code) == (-signal.SIGKILL, "")
    [report] = found["reports"]
    assert words in report and "it was killed, for it would wait" in report
    assert found["firecracker"]["refused"] == found["firecracker"]["killed"] == 1


@pytest.mark.parametrize(
    "make, words",
    [
        ("[uffd, userfaultfd()]", "it sent 2 descriptors instead of one"),
        ("[uffd, os.open('/dev/null', os.O_RDONLY)]", "it sent 2 descriptors instead of one"),
        ("[userfaultfd(None)]", "was not negotiated (UFFDIO_API)"),
        ("[userfaultfd(1 << 7)]", "negotiated with SIGBUS"),
        # Nobody knows what the others were.
        ("os.pipe() * 100", "not all descriptors that it sent could be received"),
    ],
    ids=["two", "and another", "no API", "SIGBUS", "many"],
)
def test_bad_userfaultfds(memory: Memory, make: str, words: str) -> None:
    code = f"{BEFORE}send(client, [region(start)], {make})\nlive_on()"
    with undisturbed(memory) as (daemon, found):
        assert hostile(daemon, memory, code) == (-signal.SIGKILL, "")
    [report] = found["reports"]
    assert words in report and "it was killed, for it would wait" in report
    assert found["firecracker"]["killed"] == 1


@pytest.mark.parametrize(
    "make, words",
    [
        ("[]", "it sent no userfaultfd"),
        ("[os.open('/dev/null', os.O_RDONLY)]", "the descriptor is no userfaultfd"),
        ("[os.open('/proc/self/exe', os.O_RDONLY)]", "the descriptor is no userfaultfd"),
        ("[os.pipe()[0]]", "the descriptor is no userfaultfd"),
        ("[client.fileno()]", "the descriptor is no userfaultfd"),
        ("os.pipe()", "it sent 2 descriptors instead of one"),
    ],
    ids=["none", "device", "file", "pipe", "socket", "two"],
)
def test_no_userfaultfd(memory: Memory, make: str, words: str) -> None:
    """Nobody hangs for that; the connection is closed."""
    code = f"""
client = connect()
send(client, [region(room())], {make})
client.shutdown(socket.SHUT_WR)
until_closed(client)
"""
    with undisturbed(memory) as (daemon, found):
        assert hostile(daemon, memory, code) == (0, "closed\n")
    [report] = found["reports"]
    assert words in report and "it was disconnected" in report
    assert found["firecracker"]["refused"] == 1 and found["firecracker"]["killed"] == 0


def test_silence(memory: Memory) -> None:
    """Who does not say everything within a while has no more time."""
    says = ["b''", "b'[{'", "[region(start)]"]
    codes = [f"{BEFORE}send(client, {said})\nuntil_closed(client)" for said in says]
    codes.append(f"{BEFORE}send(client, b'[{{', [uffd])\nlive_on()")
    with undisturbed(memory) as (daemon, found), ThreadPoolExecutor() as pool:
        *dropped, killed = pool.map(lambda code: hostile(daemon, memory, code), codes)
    assert dropped == [(0, "closed\n")] * 3 and killed == (-signal.SIGKILL, "")
    reports = sorted(found["reports"])
    assert len(reports) == 4 and all("within 10 s" in report for report in reports)
    assert found["firecracker"]["refused"] == 4 and found["firecracker"]["killed"] == 1


def test_a_userfaultfd_that_blocks(memory: Memory) -> None:
    """Reading it would stop the loop for everybody: it blocks no more."""
    code = f"""{BEFORE}
os.set_blocking(uffd, True)
send(client, [region(start)], [uffd])
assert ctypes.string_at(start, PAGE) != bytes(PAGE)
assert not os.get_blocking(uffd)
"""
    with undisturbed(memory) as (daemon, found):
        assert hostile(daemon, memory, code) == (0, "")
    assert found["reports"] == []


# Death


def after_connect(daemon: Daemon, memory: Memory) -> None:
    code = "client = connect()\nos.kill(os.getpid(), 9)"
    assert hostile(daemon, memory, code) == (-9, "")


def after_half_a_message(daemon: Daemon, memory: Memory) -> None:
    for uffd in ("[]", "[uffd]"):
        code = f"{BEFORE}send(client, b'[{{', {uffd})\nos.kill(os.getpid(), 9)"
        assert hostile(daemon, memory, code) == (-9, "")


def after_the_handshake(daemon: Daemon, memory: Memory) -> None:
    for _ in range(10):
        with Vmm(door(daemon), memory, "split=5") as vmm:
            vmm.kill()


def in_a_fault(daemon: Daemon, memory: Memory) -> None:
    with Vmm(door(daemon), memory) as vmm:
        vmm.tell("read 1500 400 random 4 both")
        until(lambda: vmm.waits_in("handle_userfault"), "waiting for a page")
        vmm.kill()


def stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


def in_a_removal(daemon: Daemon, memory: Memory) -> None:
    """The event is not read while the server is stopped."""
    with Vmm(door(daemon), memory) as vmm:
        vmm.right("read 0 100")
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            # Until then a thread that polls would read the event.
            until(lambda: stopped(daemon.process.pid), "every thread of the server is stopped")
            vmm.tell("remove 0 100")
            until(lambda: vmm.waits_in("userfaultfd_event_wait_completion"), "waiting in madvise")
            vmm.kill()
        finally:
            daemon.process.send_signal(signal.SIGCONT)


def in_a_storm(daemon: Daemon, memory: Memory) -> None:
    with ExitStack() as stack:
        vmms = [stack.enter_context(Vmm(door(daemon), memory, f"place={i}")) for i in range(1, 6)]
        for vmm in vmms:
            vmm.tell("storm 1000000 2 1")
        for vmm in vmms:
            until(lambda vmm=vmm: vmm.waits_in("handle_userfault"), "waiting for a page")
            vmm.kill()


@pytest.mark.parametrize(
    "die",
    [
        after_connect,
        after_half_a_message,
        after_the_handshake,
        in_a_fault,
        in_a_removal,
        in_a_storm,
    ],
)
def test_a_client_dies(memory: Memory, die: Callable[[Daemon, Memory], None]) -> None:
    layers = ["--layer", "delay=20ms"] if die is in_a_fault else []
    with undisturbed(memory, *layers) as (daemon, found):
        die(daemon, memory)
    # There is nothing to say of the end of a client that was served.
    if die not in (after_half_a_message, after_the_handshake):
        assert found["reports"] == []
    assert all(re.search("has ended|hung up", report) for report in found["reports"])
