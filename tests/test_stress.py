"""Many real processes at once, every byte checked; and the server killed in the middle of it."""

from __future__ import annotations

import hashlib
import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import UNAVAILABLE, Daemon, Memory, need_userfaultfd, program, start, stopping

import pagekit

TARGETS = 32
PAGES = 8192
HOLES = [(first, first + 96) for first in range(64, PAGES, 256)]


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory, PAGES, HOLES)


def toucher(memory: Memory, number: int, *arguments: object) -> tuple[list[object], Path]:
    stub = memory.stub(f"stub-{number}")
    return [program("toucher"), stub, memory.path, *arguments], stub


@pytest.mark.parametrize("backend", ["share", "copy"])
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_many_targets(memory: Memory, order: str, backend: str) -> None:
    """32 targets, two threads each, faulting from user mode and in the kernel, writing too."""
    with support.serving(memory, backend) as served:
        processes = []
        for number in range(TARGETS):
            command, stub = toucher(memory, number, 2, order, "both", "write", number + 1)
            processes.append(start(command, served.environment(stub)))
        with stopping(*processes):
            for process in processes:
                assert support.ended(process) == (f"pages {memory.pages} wrong 0\n", "")
        read = hashlib.sha256(served.template.read(0, memory.size)).hexdigest()
        assert read == memory.digest()
        statistics = served.server.statistics()
        assert statistics["targets_ever"] == TARGETS
        assert statistics["reports"] == []
        # Fetched once, whoever asked; and every fault ended in one outcome.
        data = memory.size - sum(end - first for first, end in HOLES) * support.PAGE
        assert statistics["bytes_read"] == data
        outcomes = statistics["outcomes"]
        assert not {"poisoned", "killed"} & {n for n, one in outcomes.items() if one["count"]}
        assert sum(one["count"] for one in outcomes.values()) == statistics["demand_faults"]


def test_later_targets_do_not_trap(memory: Memory) -> None:
    """In `share` a page that one target brought is there for all others, without a fault."""
    with support.serving(memory, "share") as served:
        faults = []
        for number in range(3):
            command, stub = toucher(memory, number)
            process = start(command, served.environment(stub))
            with stopping(process):
                support.ended(process)
            faults.append(served.server.statistics()["demand_faults"])
        assert faults[0] > 0
        assert faults[1:] == [faults[0]] * 2
        assert served.server.statistics()["fetches"] <= faults[0]


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_slow_and_failing_sources_are_only_slow(memory: Memory, backend: str) -> None:
    """A delay and passing failures: nobody notices but by the clock."""
    layers = ["stats", "delay=1ms", "fail=20"]
    with support.serving(memory, backend, layers=layers) as served:
        processes = []
        for number in range(8):
            command, stub = toucher(memory, number, 2, "random", "both", "write", number + 1)
            processes.append(start(command, served.environment(stub)))
        with stopping(*processes):
            for process in processes:
                assert support.ended(process) == (f"pages {memory.pages} wrong 0\n", "")
        statistics = served.template.statistics()
        assert statistics["failures"] == 20
        assert statistics["stack"]["fail.failed"] == 20
        assert statistics["stack"]["stats.errors"] == 20


GONE = re.compile("the pagekit server is gone|a child of a served process cannot be served: ")

ENDLESS = """
start = map_file()
def storm(seed):
    number = seed
    while True:
        number = (number * 1103515245 + 12345) % (1 << 31)
        first = number % PAGES
        check(start, [first])
        if number % 7 == 0:
            call(libc.madvise, start + first * PAGE, PAGE, DONTNEED)
in_child(lambda: storm(2))
say("storm")
storm(1)
"""


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_the_server_is_killed_in_a_storm(memory: Memory, backend: str) -> None:
    """Every target and every child ends by itself, in the same words; nobody reads a wrong byte (it
    would say so, with another status); a new server takes the same socket."""
    need_userfaultfd()
    socket = memory.path.with_name("socket")
    options = ["--backend", backend, "--layer", "delay=2ms"]
    processes = []
    with Daemon(memory.spec, socket, *options) as daemon:
        for number in range(8):
            stub = memory.stub(f"stub-{number}")
            command = support.target_command(ENDLESS, stub, memory)
            processes.append(start(command, daemon.environment(stub)))
        with stopping(*processes):
            for process in processes:
                assert process.stdout.readline() == "storm\n"
            daemon.process.kill()
            for process in processes:
                # Standard error is closed by the last of the process and its child.
                _, err = support.ended(process, UNAVAILABLE)
                assert "the pagekit server is gone" in err
                for line in err.splitlines():
                    # A child may be just born.
                    assert GONE.search(line), err
    assert socket.exists()
    with Daemon(memory.spec, socket, *options) as daemon:
        command, stub = toucher(memory, 0, 2)
        process = start(command, daemon.environment(stub))
        with stopping(process):
            assert support.ended(process) == (f"pages {memory.pages} wrong 0\n", "")
        statistics, _ = daemon.stop()
        assert statistics["targets_ever"] == 1
    assert not socket.exists()


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_the_server_ends_while_children_wait(memory: Memory, backend: str) -> None:
    """A child whose parent is gone, waiting for a page that will never come."""
    need_userfaultfd()
    code = """
start = map_file()
if os.fork():
    os._exit(0)
say(os.getpid())
check(start, range(PAGES))
say("in vain")
"""
    options = ["--backend", backend, "--layer", "delay=60s"]
    with Daemon(memory.spec, memory.path.with_name("socket"), *options) as daemon:
        stub = memory.stub()
        command = support.target_command(code, stub, memory)
        process = start(command, daemon.environment(stub))
        with stopping(process):
            child = os.pidfd_open(int(process.stdout.readline()))
            daemon.process.kill()
            out, err = support.ended(process)
            assert out == "" and "the pagekit server is gone" in err
            assert select.select([child], [], [], support.PATIENCE)[0], "it lives"
            os.close(child)


def test_a_server_that_closes_ends_its_targets(memory: Memory) -> None:
    need_userfaultfd()
    code = "map_file()\nlive_on()"
    stub = memory.stub()
    with pagekit.Template(memory.spec) as template:
        server = pagekit.Server(template, memory.path.with_name("socket"), backend="share")
        command = support.target_command(code, stub, memory)
        process = start(command, server.environment(stub))
        with stopping(process):
            assert process.stdout.readline() == "ready\n"
            server.close()
            _, err = support.ended(process, UNAVAILABLE)
            assert err.count("\n") == 1 and "the pagekit server is gone" in err
        server.close()
        with pytest.raises(ValueError):
            server.statistics()


# Pages that cannot be had


def test_a_page_that_cannot_be_had(memory: Memory) -> None:
    """Touching it raises SIGBUS; never zeros, never for ever. The server says which and why, and
    others do not notice."""
    path = memory.path.with_name("socket")
    need_userfaultfd()
    code = """
start = map_file()
check(start, [0, 1, 2])
say("ready")
check(start, [int(ARGUMENTS[0])])
"""
    options = ["--backend", "share", "--layer", "fail=page:1000", "--deadline", "200ms"]
    with Daemon(memory.spec, path, *options) as daemon:
        stub = memory.stub()
        process = start(support.target_command(code, stub, memory, 1000), daemon.environment(stub))
        good = start(support.target_command(code, stub, memory, 900), daemon.environment(stub))
        with stopping(process, good):
            support.ended(process, -7)
            support.ended(good)
        statistics, err = daemon.stop()
        assert statistics["outcomes"]["poisoned"]["count"] == 1
        [report] = statistics["reports"]
        assert f"pid {process.pid}" in report and "poisoned: touching it raises SIGBUS" in report
        assert "fail=page:1000" in report and report in err


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_a_source_that_never_comes_back(memory: Memory, backend: str) -> None:
    with support.serving(memory, backend, layers=["fail=always"], deadline=0.1) as served:
        process = served.start('start = map_file()\nsay("ready")\ncheck(start, [5])')
        with stopping(process):
            support.ended(process, -7)
        statistics = served.server.statistics()
        assert statistics["outcomes"]["poisoned"]["count"] == 1
        assert len(statistics["reports"]) == 1


def test_neighbours_of_a_bad_page_can_be_had(memory: Memory) -> None:
    """Pages are fetched in runs; one bad page must not take the rest of its run with it."""
    layers = ["fail=page:1000"]
    code = "check(map_file(), range(990, 1000))\ncheck(map_file(), range(1001, 1020))"
    with support.serving(memory, layers=layers) as served:
        served.run(code)
        assert served.template.read(999 * support.PAGE, support.PAGE) == support.page_content(999)
        with pytest.raises(pagekit.errors.IntegrityError, match="fail=page:1000"):
            served.template.read(1000 * support.PAGE, 1)


def test_a_file_that_shrinks(memory: Memory, tmp_path: Path) -> None:
    own = support.make_memory(tmp_path, 512, [])
    need_userfaultfd()
    code = """
start = map_file()
check(start, range(100))
say("half")
sys.stdin.readline()
check(start, range(100))          # what was fetched stays
say("there")
check(start, [500])
"""
    with Daemon(own.spec, own.path.with_name("socket"), "--backend", "share") as daemon:
        stub = own.stub()
        process = start(support.target_command(code, stub, own), daemon.environment(stub))
        with stopping(process):
            assert process.stdout.readline() == "half\n"
            with own.path.open("r+b") as file:
                file.truncate(256 * support.PAGE)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "there\n"
            support.ended(process, -7)
        statistics, err = daemon.stop()
        expected = (
            f"template file {own.path} was changed while it was served: "
            f"it has {256 * support.PAGE} bytes now"
        )
        assert expected in statistics["reports"][0] and expected in err
