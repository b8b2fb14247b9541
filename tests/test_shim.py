"""The shim in real programs: whatever they do to their memory, it is what a private mapping of the
memory file would be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import (
    NOBODY,
    UNAVAILABLE,
    Daemon,
    Memory,
    Nobody,
    Served,
    need,
    program,
    start,
    stopping,
)

import pagekit


@pytest.fixture
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


@pytest.fixture(params=["share", "copy"])
def served(memory: Memory, request: pytest.FixtureRequest) -> Iterator[Served]:
    with support.serving(memory, request.param) as served:
        yield served


def right(served: Served, code: str, **more: object) -> str:
    """Runs a target that ends by saying that all was right."""
    out, err = served.run(f'{code}\nsay("right")', **more)
    assert out.endswith("right\n") and not err, out + err
    return out


def test_every_page_is_the_templates(served: Served) -> None:
    right(served, "check(map_file(), range(PAGES))")
    statistics = served.server.statistics()
    data = served.memory.size - sum(end - first for first, end in served.memory.holes) * 4096
    assert statistics["bytes_read"] == data
    assert statistics["demand_faults"] > 0
    assert statistics["reports"] == []


def test_writes_are_private(served: Served) -> None:
    code = """
start = map_file()
for number in range(0, PAGES, 3):
    put(start, number, b"mine")
for number in range(PAGES):
    mine = b"mine" if number % 3 == 0 else b""
    assert page(start, number) == mine + expected(number)[len(mine):]
"""
    right(served, code)
    right(served, "check(map_file(), range(PAGES))")


# Mappings of all kinds


def test_part_of_the_file(served: Served) -> None:
    code = """
start = map_file(pages=37, offset=50)      # from data into a hole
check(start, range(37), offset=50)
start = map_file(pages=10, offset=PAGES - 10, protection=READ)
check(start, range(10), offset=PAGES - 10)
"""
    right(served, code)


def test_two_mappings_are_two_memories(served: Served) -> None:
    code = """
first, second = map_file(), map_file(offset=100)
put(first, 110, b"only in the first")
check(second, range(PAGES - 100), offset=100)
assert page(first, 110).startswith(b"only in")
check(first, range(111, PAGES))
assert libc.munmap(first, PAGES * PAGE) == 0
check(second, range(PAGES - 100), offset=100)
"""
    right(served, code)


def test_fixed_address(served: Served) -> None:
    code = """
room = libc.mmap(None, PAGES * PAGE, 0, PRIVATE | ANONYMOUS, -1, 0)
assert map_file(flags=PRIVATE | FIXED, at=room) == room
check(room, range(PAGES))
"""
    right(served, code)


@pytest.mark.parametrize(
    "preparation, flags",
    [
        ("pass", "PRIVATE | POPULATE"),
        ("pass", "PRIVATE | LOCKED"),
        ("assert libc.mlockall(2) == 0", "PRIVATE"),
    ],
    ids=["populate", "locked", "mlockall-future"],
)
def test_population_reads_no_holes(served: Served, preparation: str, flags: str) -> None:
    right(served, f"{preparation}\ncheck(map_file(flags={flags}), range(PAGES))")
    served.template.audit()


def test_mlockall_brings_all_of_it(served: Served) -> None:
    code = """
start = map_file()
assert libc.mlockall(1) == 0
check(start, range(PAGES))
wait_for(in_child(lambda: check(start, range(PAGES))))
"""
    right(served, code)


def test_children_of_a_locked_process_are_served(served: Served) -> None:
    code = """
assert libc.mlockall(1 | 2) == 0
start = map_file()
wait_for(in_child(lambda: check(start, range(PAGES))))
"""
    right(served, code)


def test_shared_mappings_are_refused(served: Served) -> None:
    code = """
try:
    map_file(flags=SHARED)
except PermissionError:
    say("refused")
"""
    out, err = served.run(code)
    assert out == "refused\n"
    assert "only private mappings of it are served" in err


def test_more_than_the_template_is_refused(served: Served) -> None:
    code = """
for offset, pages in [(0, PAGES + 1), (PAGES, 1), (1 << 40, 1)]:
    try:
        map_file(pages=pages, offset=offset)
    except OSError:
        say("refused")
"""
    stub = served.memory.stub("large", served.memory.size * 2)
    process = served.start(code, stub=stub)
    with stopping(process):
        out, err = support.ended(process)
    assert out == "refused\n" * 3
    assert f"is no part of the template's {served.memory.size} bytes" in err


# What programs do to their memory


def test_unmap_and_reuse_of_the_addresses(served: Served) -> None:
    """Whatever the program maps there next is its own business."""
    code = """
start = map_file()
check(start, range(0, PAGES, 2))
punch(0, PAGES)
assert libc.munmap(start, PAGES * PAGE) == 0
other = libc.mmap(start, PAGES * PAGE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED, -1, 0)
put(other, 7, b"other")
call(libc.madvise, other, 7 * PAGE, DONTNEED)
assert page(other, 7).startswith(b"other")
call(libc.madvise, other, PAGES * PAGE, FREE)
call(libc.madvise, other, PAGES * PAGE, DONTNEED)
assert page(other, 7) == ZEROS
with open(REFERENCE, "rb") as file:
    fixed = libc.mmap(start, PAGES * PAGE, READ, SHARED | FIXED, file.fileno(), 0)
call(libc.madvise, fixed, PAGES * PAGE, DONTNEED)
check(fixed, range(PAGES))
"""
    right(served, code)


def test_a_hole_in_the_middle_of_a_region(served: Served) -> None:
    code = """
start = map_file()
assert libc.munmap(start + 10 * PAGE, 20 * PAGE) == 0
check(start, range(10))
check(start, range(30, PAGES))
again = map_file(pages=20, offset=10, flags=PRIVATE | FIXED, at=start + 10 * PAGE)
check(start, range(PAGES))
put(start, 15, b"mine")
call(libc.madvise, start, PAGES * PAGE, DONTNEED)
check(start, range(PAGES))
"""
    right(served, code)


def test_move(served: Served) -> None:
    """Content is right after a move, and giving back works at the new place."""
    code = """
start = map_file(pages=64)
check(start, range(0, 64, 5))
put(start, 5, b"mine")
room = libc.mmap(None, 64 * PAGE, 0, PRIVATE | ANONYMOUS, -1, 0)
moved = libc.mremap(start, 64 * PAGE, 64 * PAGE, 1 | 2, room)
assert moved == room, ctypes.get_errno()
assert page(moved, 5).startswith(b"mine")
check(moved, [number for number in range(64) if number != 5])
punch(20, 8)
call(libc.madvise, moved + 16 * PAGE, 16 * PAGE, DONTNEED)
assert all(page(moved, number) == ZEROS for number in range(20, 28))
check(moved, [16, 17, 18, 19, 28, 29, 30, 31])
half = libc.mremap(moved, 64 * PAGE, 32 * PAGE, 0, None)
assert half == moved
check(moved, [0, 1, 2, 31])
"""
    right(served, code)


def test_a_region_does_not_grow(served: Served) -> None:
    code = """
start = map_file(pages=16)
grown = libc.mremap(start, 16 * PAGE, 32 * PAGE, 1, None)
assert grown == FAILED
check(start, range(16))
"""
    out, err = served.run(f'{code}\nsay("right")')
    assert out == "right\n", out + err


def test_protection_in_pieces(served: Served) -> None:
    code = """
start = map_file()
for number in range(1, PAGES, 2):
    call(libc.mprotect, start + number * PAGE, PAGE, READ)
check(start, range(PAGES))
"""
    right(served, code)


def test_dropped_pages_are_read_again(served: Served) -> None:
    code = """
start = map_file()
for number in range(PAGES):
    put(start, number, b"mine")
call(libc.madvise, start, PAGES * PAGE, DONTNEED)
check(start, range(PAGES))
"""
    right(served, code)


def test_punched_pages_are_zero_for_good(served: Served) -> None:
    """Also in children, in theirs, and after another drop."""
    code = """
start = map_file()
punch(10, 100)
check(start, range(5))                         # a punch alone changes nothing that is mapped
call(libc.madvise, start, 150 * PAGE, DONTNEED)
zeros = range(10, 110)
rest = [number for number in range(PAGES) if number not in zeros]
def look(deeper):
    assert all(page(start, number) == ZEROS for number in zeros)
    call(libc.madvise, start, 150 * PAGE, DONTNEED)
    assert all(page(start, number) == ZEROS for number in zeros)
    check(start, rest)
    put(start, 11, b"mine")
    call(libc.madvise, start, 150 * PAGE, DONTNEED)
    assert page(start, 11) == ZEROS
    if deeper:
        wait_for(in_child(lambda: look(deeper - 1)))
wait_for(in_child(lambda: look(1)))
look(1)
"""
    right(served, code)


def test_punches_under_fire(served: Served) -> None:
    """Pages given back while other threads read them: old content, then zeros, nothing else."""
    code = """
import threading
start = map_file()
given_back = threading.Event()
def read(first):
    for number in range(first, 300, 2):
        late = given_back.is_set()
        seen = page(start, number)
        assert seen == ZEROS or (seen == expected(number) and not late), number
    done.append(first)
done = []
threads = [threading.Thread(target=read, args=(first,)) for first in (0, 1)]
for thread in threads:
    thread.start()
punch(0, 300)
for first in range(0, 300, 10):
    call(libc.madvise, start + first * PAGE, 10 * PAGE, DONTNEED)
given_back.set()
for thread in threads:
    thread.join()
assert sorted(done) == [0, 1]
assert all(page(start, number) == ZEROS for number in range(300))
check(start, range(300, PAGES))
"""
    right(served, code)


def test_other_advice(served: Served) -> None:
    code = """
import errno
start = map_file()
call(libc.madvise, start, PAGES * PAGE, HUGEPAGE)
for advice, answer in [(FREE, errno.EINVAL), (REMOVE, errno.EACCES)]:
    assert libc.madvise(start, PAGES * PAGE, advice) == -1 and ctypes.get_errno() == answer
check(start, range(PAGES))
"""
    right(served, code)


# Children


def test_fork(served: Served) -> None:
    code = """
start = map_file()
put(start, 3, b"before the fork")
def child(depth):
    assert page(start, 3).startswith(b"before the fork")
    check(start, [number for number in range(depth, PAGES, 3) if number != 3])
    if depth:
        wait_for(in_child(lambda: child(depth - 1)))
    check(start, [number for number in range(PAGES) if number != 3])
children = [in_child(lambda: child(2)) for _ in range(3)]
check(start, range(4, PAGES))
for one in children:
    wait_for(one)
"""
    right(served, code)


def test_children_and_parents_do_not_see_each_others_writes(served: Served) -> None:
    code = """
start = map_file()
ends = os.pipe()
def child():
    os.read(ends[0], 1)
    assert page(start, 1) == expected(1)
    put(start, 2, b"the child's")
one = in_child(child)
put(start, 1, b"the parent's")
os.write(ends[1], b"!")
wait_for(one)
assert page(start, 2) == expected(2)
"""
    right(served, code)


def test_the_parent_ends_first(served: Served) -> None:
    code = """
start = map_file()
ends, alive = os.pipe(), os.pipe()
if os.fork():
    check(start, range(0, PAGES, 5))
    os._exit(0)
os.close(ends[1])
assert os.read(ends[0], 1) == b""              # the parent is gone
check(start, range(PAGES))
"""
    right(served, code)


def test_multiprocessing(served: Served) -> None:
    code = """
import multiprocessing
start = map_file()
check(start, range(0, PAGES, 7))
def work(part):
    check(start, range(part, PAGES, 4))
    return part
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sorted(pool.map(work, range(8))) == list(range(8))
"""
    right(served, code)


def test_fork_in_a_program_with_threads(served: Served) -> None:
    code = """
import threading
start = map_file()
threads = [threading.Thread(target=check, args=(start, range(n, PAGES, 2))) for n in (0, 1)]
for thread in threads:
    thread.start()
children = [in_child(lambda: check(start, range(PAGES))) for _ in range(5)]
for thread in threads:
    thread.join()
for one in children:
    wait_for(one)
check(start, range(PAGES))
"""
    right(served, code)


def test_every_way_to_start_programs(served: Served) -> None:
    """vfork, posix_spawn, system; and exec, after which the program attaches anew."""
    stub = served.memory.stub()
    command = [program("spawner"), stub, served.memory.path]
    process = start(command, served.environment(stub))
    with stopping(process):
        assert support.ended(process) == ("right\nright\n", "")


def test_signals(served: Served) -> None:
    stub = served.memory.stub()
    command = [program("signals"), stub, served.memory.path]
    process = start(command, served.environment(stub))
    with stopping(process):
        assert support.ended(process) == ("wrong 0\n", "")


def test_programs_that_close_what_they_do_not_know(served: Served) -> None:
    stub = served.memory.stub()
    process = start([program("closer"), stub, served.memory.path], served.environment(stub))
    with stopping(process):
        assert support.ended(process) == ("wrong 0\n", "")


def test_giving_back_and_forking_without_descriptors(served: Served) -> None:
    """Another file may have the numbers by then."""
    code = """
start = map_file()
def daemon(depth):
    os.closerange(3, 100)
    others = [os.open(STUB, os.O_RDWR) for _ in range(20)]
    punch(10 + depth, 30)
    call(libc.madvise, start, 64 * PAGE, DONTNEED)
    zeros = range(10, 40 + depth)
    assert all(page(start, number) == ZEROS for number in zeros if number >= 10 + depth)
    check(start, range(50, PAGES, 3))
    def child():
        assert all(os.fstat(other).st_size == len(CONTENT) for other in others)
        if depth:
            daemon(depth - 1)
    wait_for(in_child(child))
    check(start, range(50, PAGES))
daemon(2)
"""
    right(served, code)


def test_a_server_that_dies_is_noticed_without_descriptors(memory: Memory) -> None:
    support.need_userfaultfd()
    code = """
start = map_file()
os.closerange(3, 100)
live_on()
"""
    stub = memory.stub()
    with Daemon(memory.spec, memory.path.with_name("socket"), "--backend", "share") as daemon:
        process = start(support.target_command(code, stub, memory), daemon.environment(stub))
        with stopping(process):
            assert process.stdout.readline() == "ready\n"
            daemon.process.kill()
            _, err = support.ended(process, UNAVAILABLE)
            assert "the pagekit server is gone" in err


def test_our_threads_take_no_signals(served: Served) -> None:
    code = """
import signal
map_file()
for thread in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{thread}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    if status["Name"].strip().startswith("pagekit-"):
        mask = int(status["SigBlk"], 16)
        every = (1 << 64) - 1
        uncatchable = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1
        internal = 1 << 32 - 1 | 1 << 33 - 1       # libc keeps two for itself
        assert mask | uncatchable | internal == every, hex(mask)
        say(status["Name"].strip())
"""
    out, _ = served.run(code)
    assert sorted(out.split()) == ["pagekit-owner", "pagekit-server"]


# Mappings that are not ours


def test_other_mappings_pass_through(served: Served) -> None:
    code = """
anonymous = libc.mmap(None, 64 * PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0)
other = map_file(path=ARGUMENTS[0])
shared = map_file(path=ARGUMENTS[0], flags=SHARED)
assert page(anonymous, 0) == page(other, 0) == ZEROS
put(shared, 0, b"seen")
assert page(other, 1) == ZEROS and page(other, 0).startswith(b"seen")
call(libc.madvise, anonymous, PAGE, DONTNEED)
call(libc.madvise, anonymous, PAGE, FREE)
assert libc.mmap(None, PAGE, READ, PRIVATE, 999, 0) == FAILED and ctypes.get_errno() == 9
call(libc.munmap, anonymous, 64 * PAGE)
"""
    other = served.memory.stub("other")
    out, err = served.run(f'{code}\nsay("right")', other)
    assert out == "right\n" and not err
    assert served.server.statistics()["targets_ever"] == 0


def test_other_mappings_cost_nothing(served: Served) -> None:
    """System calls of a program that maps nothing of ours: an fstat for each private file mapping,
    and not one more for anonymous ones."""
    strace = shutil.which("strace")
    need("strace", strace, "no strace to count system calls with")
    code = """
os.stat("/begin")
for _ in range(50):
    start = libc.mmap(None, PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0)
    call(libc.madvise, start, PAGE, DONTNEED)
    call(libc.munmap, start, PAGE)
os.stat("/middle")
descriptor = os.open(REFERENCE, os.O_RDONLY)
for _ in range(50):
    call(libc.munmap, libc.mmap(None, PAGE, READ, PRIVATE, descriptor, 0), PAGE)
os.stat("/end")
""".replace("os.stat", "os.path.exists")
    stub = served.memory.stub()
    log = served.memory.path.with_name("log")
    command = ["strace", "-o", log, *support.target_command(code, stub, served.memory)]
    environment = served.environment(stub)
    # Only the program is to be preloaded, not strace.
    inner = [f"-E{name}={value}" for name, value in environment.items()]
    process = start([command[0], *inner, *command[1:]], {})
    with stopping(process):
        support.ended(process)
    calls = re.findall(r'^(\w+)\(.*?("/begin"|"/middle"|"/end")?', log.read_text(), re.MULTILINE)
    text = log.read_text()
    anonymous = text[text.index('"/begin"') : text.index('"/middle"')]
    files = text[text.index('"/middle"') : text.index('"/end"')]
    assert calls
    assert anonymous.count("\n") <= 150 + 5, anonymous
    assert files.count("\n") <= 150 + 6, files


def test_our_own_cost_per_foreign_call(served: Served) -> None:
    """Loose, because machines are noisy: an anonymous mapping costs no more than half again."""
    code = """
import time
best = 1e9
for _ in range(5):
    began = time.perf_counter()
    for _ in range(2000):
        libc.munmap(libc.mmap(None, PAGE, READ, PRIVATE | ANONYMOUS, -1, 0), PAGE)
    best = min(best, time.perf_counter() - began)
say(best)
"""
    stub = served.memory.stub()
    command = support.target_command(code, stub, served.memory)
    times: dict[bool, list[float]] = {True: [], False: []}
    for preloaded in (True, False) * 3:
        process = start(command, served.environment(stub) if preloaded else {})
        with stopping(process):
            times[preloaded].append(float(support.ended(process)[0]))
    assert min(times[True]) < 1.5 * min(times[False]), times


def test_a_program_that_maps_nothing_starts_no_thread(memory: Memory) -> None:
    with support.serving(memory) as served:
        environment = served.environment(memory.stub())
        del environment["PAGEKIT_OWNER"]
        code = 'say(len(os.listdir("/proc/self/task")))'
        process = start(support.target_command(code, memory.stub(), memory), environment)
        with stopping(process):
            assert support.ended(process) == ("1\n", "")


# Wrong settings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"PAGEKIT_BACKEND": "magic"}, "PAGEKIT_BACKEND=magic: auto, share or copy"),
        ({"PAGEKIT_PLAIN": "/x"}, "set either PAGEKIT_SOCKET or PAGEKIT_PLAIN"),
        ({"PAGEKIT_SOCKET": ""}, "set either PAGEKIT_SOCKET or PAGEKIT_PLAIN"),
        ({"PAGEKIT_OWNER": "me"}, "PAGEKIT_OWNER=me is no process id"),
    ],
)
def test_wrong_settings_end_the_program(
    memory: Memory, change: dict[str, str], message: str
) -> None:
    """Going on would give the program the stub's zeros."""
    with support.serving(memory) as served:
        stub = memory.stub()
        environment = served.environment(stub) | change
        process = start(support.target_command("map_file()", stub, memory), environment)
        with stopping(process):
            _, err = support.ended(process, UNAVAILABLE)
        assert message in err


def test_without_a_server(memory: Memory) -> None:
    environment = {
        **pagekit.owner_environment(),
        "PAGEKIT_FILE": str(memory.stub()),
        "PAGEKIT_SOCKET": str(memory.path.with_name("nobody")),
    }
    code = """
try:
    map_file()
except OSError as error:
    say(error.errno)
"""
    process = start(support.target_command(code, memory.stub(), memory), environment)
    with stopping(process):
        out, err = support.ended(process)
    assert out == "5\n"
    assert "cannot reach the pagekit server at" in err


# The plain mapping


def test_plain_mapping_of_a_file(memory: Memory) -> None:
    """Without a server; what the program punches out of its stub harms nobody."""
    before = memory.digest()
    stub = memory.stub()
    code = """
start = map_file()
check(start, range(PAGES))
put(start, 1, b"mine")
punch(0, 50)
call(libc.madvise, start, 100 * PAGE, DONTNEED)
assert all(page(start, number) == ZEROS for number in range(50))
check(start, range(50, PAGES))
wait_for(in_child(lambda: check(start, range(50, PAGES))))
say("right")
"""
    process = start(
        support.target_command(code, stub, memory), pagekit.plain_environment(stub, memory.path)
    )
    with stopping(process):
        assert support.ended(process) == ("right\n", "")
    assert memory.digest() == before


def test_auto_maps_a_local_file_plainly(memory: Memory) -> None:
    with support.serving(memory, "auto") as served:
        assert served.server.backend == "plain"
        assert "local raw file" in served.server.reason
        right(served, "check(map_file(), range(PAGES))")
        assert served.server.statistics()["demand_faults"] == 0


def test_auto_serves_what_is_more_than_a_file(memory: Memory) -> None:
    with support.serving(memory, "auto", layers=["stats"]) as served:
        assert served.server.backend == "share"
        right(served, "check(map_file(), range(PAGES))")
        stack = served.template.statistics()["stack"]
        assert stack["stats.bytes"] == served.server.statistics()["bytes_read"]


# Ends


def test_a_program_ends_with_its_owner(memory: Memory) -> None:
    with support.serving(memory) as served:
        owner = start(["cat"], {})
        environment = served.environment(memory.stub()) | {"PAGEKIT_OWNER": str(owner.pid)}
        code = "map_file()\nlive_on()"
        process = start(support.target_command(code, memory.stub(), memory), environment)
        with stopping(process, owner):
            assert process.stdout.readline() == "ready\n"
            owner.kill()
            _, err = support.ended(process, UNAVAILABLE)
            assert f"process {owner.pid}, which started this one, is gone" in err


def test_exec_of_another_program_ends_the_target(served: Served) -> None:
    """Exec announces itself to nobody: the server finds out, and lets go."""
    code = """
check(map_file(), range(100))
say("ready")
sys.stdin.readline()
os.execv("/bin/cat", ["cat"])
"""
    process = served.start(code)
    with stopping(process):
        assert process.stdout.readline() == "ready\n"
        assert [t["pid"] for t in served.server.statistics()["targets"]] == [process.pid]
        process.stdin.write("\n")
        process.stdin.flush()
        assert served.server.wait(10)
        assert process.poll() is None


# Other users


@pytest.fixture
def nobody(memory: Memory) -> Nobody:
    return Nobody(memory.path.parent)


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_an_unprivileged_program(memory: Memory, nobody: Nobody, backend: str) -> None:
    """With the device handed over; the sysctl forbids it a userfaultfd of its own. Children and
    kernel-mode faults too."""
    support.need_userfaultfd()
    code = """
start = map_file()
ends = os.pipe()
for number in range(0, PAGES, 3):
    view = (ctypes.c_char * PAGE).from_address(start + number * PAGE)
    assert os.write(ends[1], view) == PAGE      # the kernel takes the fault
    assert os.read(ends[0], PAGE) == expected(number)
wait_for(in_child(lambda: check(start, range(PAGES))))
check(start, range(PAGES))
say("right", os.getuid())
"""
    options = ["--backend", backend, "--owner", NOBODY]
    with (
        support.sysctl("vm.unprivileged_userfaultfd", "0"),
        Daemon(memory.spec, memory.path.with_name("socket"), *options) as daemon,
    ):
        socket = daemon.socket.stat()
        assert (socket.st_uid, socket.st_mode & 0o777) == (NOBODY, 0o600)
        assert nobody.run(daemon, code, memory) == (f"right {NOBODY}\n", "")
        statistics, _ = daemon.stop()
        assert statistics["targets_ever"] == 2


def test_the_socket_is_for_its_owner_alone(memory: Memory, nobody: Nobody) -> None:
    with Daemon(memory.spec, memory.path.with_name("socket"), "--backend", "share") as daemon:
        _, err = nobody.run(daemon, "map_file()", memory, 1)
        assert "cannot reach the pagekit server" in err and "ermission denied" in err


def test_mode_and_group_of_the_socket(memory: Memory) -> None:
    support.need_root()
    path = memory.path.with_name("socket")
    with Daemon(memory.spec, path, "--owner", f"12:{NOBODY}", "--mode", "660"):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (12, NOBODY)
        assert status.st_mode & 0o777 == 0o660
    with (
        pagekit.Template(memory.spec) as template,
        pagekit.Server(template, path, owner=NOBODY, mode=0o666),
    ):
        status = path.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (NOBODY, 0o666)


def test_only_those_who_may_give_sockets_away(memory: Memory, nobody: Nobody) -> None:
    memory.path.parent.chmod(0o777)
    socket = memory.path.with_name("socket")
    status, err = support.refused(
        memory.spec, "--socket", socket, "--owner", 0, program=nobody.server, **nobody.who
    )
    assert status == 4 and f"{socket} cannot be given to user 0" in err and "hint: " in err
    assert not socket.exists()


def test_an_unprivileged_server_without_userfaultfd_loads_everything(
    memory: Memory, nobody: Nobody
) -> None:
    memory.path.parent.chmod(0o777)
    socket = memory.path.with_name("socket")
    code = """
start = map_file()
check(start, range(PAGES))
wait_for(in_child(lambda: check(start, range(PAGES))))
say("right")
"""
    with support.sysctl("vm.unprivileged_userfaultfd", "0"):
        # A layer, because a bare file is mapped plainly anyway.
        options = {"program": nobody.server, **nobody.who}
        with Daemon(memory.spec, socket, "--layer", "pass", **options) as daemon:
            assert daemon.ready["backend"] == "plain"
            assert "userfaultfd is unavailable" in daemon.ready["reason"]
            assert "so all of it is loaded first" in daemon.ready["reason"]
            assert nobody.run(daemon, code, memory) == ("right\n", "")
        status, err = support.refused(
            memory.spec, "--socket", socket, "--backend", "share", **options
        )
        assert status == 4, err
        assert "userfaultfd(2) is not permitted to this user" in err
        assert "hint: " in err and "vm.unprivileged_userfaultfd=1" in err


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_an_unprivileged_server_with_userfaultfd(
    memory: Memory, nobody: Nobody, backend: str
) -> None:
    """It cannot be told of forks, so served memory is kept out of children: they die of touching
    it, and never read zeros. Its file is a sealed memfd."""
    support.need_userfaultfd()
    memory.path.parent.chmod(0o777)
    code = """
import signal
start = map_file()
check(start, range(0, PAGES, 2))
child = os.fork()
if child == 0:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os._exit(page(start, 1) == ZEROS)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV, status
assert libc.madvise(start, PAGES * PAGE, DOFORK) == -1
check(start, range(PAGES))
say("right")
"""
    socket = memory.path.with_name("socket")
    with (
        support.sysctl("vm.unprivileged_userfaultfd", "1"),
        Daemon(
            memory.spec, socket, "--backend", backend, program=nobody.server, **nobody.who
        ) as daemon,
    ):
        assert daemon.ready["backend"] == backend
        assert nobody.run(daemon, code, memory) == ("right\n", "")
        daemon.stop()


def test_idle_servers_do_nothing(served: Served) -> None:
    """At most 1 % of a CPU from 100 ms after the last fault."""
    process = served.start('check(map_file(), range(PAGES))\nsay("ready")\nsys.stdin.readline()')
    with stopping(process):
        assert process.stdout.readline() == "ready\n"
        # Not a wait for a state: the promise is about time itself.
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.01
        support.ended(process)


def test_a_killed_target_is_let_go(served: Served) -> None:
    process = served.start('check(map_file(), range(100))\nsay("ready")\nsys.stdin.readline()')
    with stopping(process):
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
        assert served.server.wait(5)


def test_paths_with_spaces(memory: Memory) -> None:
    directory = memory.path.parent / "a b"
    directory.mkdir()
    spaced = Memory(Path(shutil.copy(memory.path, directory / "m m")), memory.pages, memory.holes)
    with support.serving(spaced) as served:
        right(served, "check(map_file(), range(PAGES))")
