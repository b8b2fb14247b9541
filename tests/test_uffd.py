"""`pagekit.uffd`: the kernel's interface from Python, with handlers in a thread and in a
process."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import mmap
import os
import pickle
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import handlers
import pytest
import support
from support import PAGE, PATIENCE, need, page_content

from pagekit import errors, uffd

PAGES = 64
DONTNEED = 4
HWPOISON = 133

# Calls of ctypes give up the GIL, as those that wait for a handler must.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture(autouse=True)
def userfaultfd() -> None:
    support.need_userfaultfd()


def feature(name: str) -> None:
    row = next(row for row in uffd.features() if row.name == name)
    need(f"feature {name}", row.state == "yes", row.remedy)


def numpy() -> ModuleType:
    """NumPy, which is no dependency."""
    try:
        import numpy
    except ImportError:
        numpy = None
    need("numpy", numpy, "it is not installed")
    assert numpy is not None
    return numpy


def wanted(pages: int = PAGES, first: int = 0) -> bytes:
    return b"".join(map(page_content, range(first, first + pages)))


def touch(buffer: Any) -> str:
    """Reads all of it without the GIL, and says what was read."""
    return hashlib.sha256(memoryview(buffer)).hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def given(view: memoryview) -> OSError | None:
    """Lets a system call read memory: the error it fails with, if it does."""
    reader, writer = os.pipe()
    try:
        os.write(writer, view)
    except OSError as error:
        return error
    finally:
        os.close(reader)
        os.close(writer)
    return None


@contextmanager
def running(body: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread, which must have ended at the end, and well."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


@contextmanager
def filled(faults: uffd.Userfaultfd) -> Iterator[None]:
    """A thread of this process handles faults with :func:`handlers.fill`, until the end."""

    def handle() -> None:
        try:
            handlers.fill(faults, tuple(one.range for one in faults.registrations))
        finally:
            faults.close()  # nobody waits for a handler that failed

    with running(handle):
        try:
            yield
        finally:
            faults.close()


def anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def shared_anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def memfd(size: int, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    file = os.memfd_create("pagekit-test")
    try:
        os.truncate(file, size)
        return mmap.mmap(file, size, flags=flags)
    finally:
        os.close(file)


def private_memfd(size: int) -> mmap.mmap:
    return memfd(size, mmap.MAP_PRIVATE)


KINDS = [anonymous, shared_anonymous, memfd, private_memfd]


# Filling


@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_fills_a_mapping(kind: Callable[[int], mmap.mmap]) -> None:
    memory = kind(PAGES * PAGE)
    with uffd.Userfaultfd() as faults:
        registered = faults.register(memory)
        assert registered.length == PAGES * PAGE and registered.modes == {"missing"}
        assert {"COPY", "ZEROPAGE", "WAKE"} <= registered.operations
        with filled(faults):
            assert touch(memory) == digest(wanted())
    assert memory[:] == wanted()
    memory.close()


def test_a_thread_fills_an_array() -> None:
    """Its pages begin somewhere within it; what is before them and behind is no concern of ours."""
    np = numpy()
    # So large that its memory is fresh, whatever was freed before.
    array = np.empty(64 << 17, np.uint64)[: PAGES * PAGE // 8]
    with uffd.Userfaultfd() as faults, faults.register(array) as registered:
        range = registered.range
        assert range.base == array.ctypes.data and range.length >= (PAGES - 2) * PAGE
        with filled(faults):
            touch(array)
    skip = range.start - range.base
    found = array.view(np.uint8)[skip : skip + range.length].tobytes()
    assert found == wanted(range.length // PAGE)


@pytest.mark.parametrize("handler", [handlers.fill, "handlers:fill"], ids=["function", "name"])
def test_a_process_fills_what_is_touched_with_the_gil(handler: uffd.Handler | str) -> None:
    memory = anonymous(PAGES * PAGE)
    with (
        uffd.Userfaultfd() as faults,
        faults.register(memory),
        uffd.handler_process(handler, faults) as process,
    ):
        assert process.pid != os.getpid()
        assert memory[5 * PAGE : 6 * PAGE] == page_content(5)
        assert memory[:] == wanted()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid or 0, 0)


def test_a_process_fills_an_array() -> None:
    np = numpy()
    memory = anonymous(PAGES * PAGE)
    array = np.frombuffer(memory, np.uint64)
    handler = functools.partial(handlers.fill_from, 1000)
    with (
        uffd.Userfaultfd() as faults,
        faults.register(array),
        uffd.handler_process(handler, faults),
    ):
        assert (array == np.frombuffer(wanted(first=1000), np.uint64)).all()


def test_many_threads_touch_and_many_handle() -> None:
    memory = anonymous(16 * PAGES * PAGE)
    view = memoryview(memory)
    parts = [view[at * PAGES * PAGE : (at + 4) * PAGES * PAGE] for at in range(13)]
    with uffd.Userfaultfd(["THREAD_ID"]) as faults:
        faults.register(memory)
        with filled(faults), running(lambda: handle_too(faults)):
            threads = [threading.Thread(target=touch, args=[part]) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            faults.close()
    assert memory[:] == wanted(16 * PAGES)


def handle_too(faults: uffd.Userfaultfd) -> None:
    """A second handler, which may be at something when the userfaultfd is closed."""
    ranges = tuple(one.range for one in faults.registrations)
    with suppress(errors.UsageError):
        handlers.fill(faults, ranges)


# Events


def test_what_a_fault_tells() -> None:
    memory = anonymous(PAGES * PAGE)
    told: list[int] = []

    def read_here(at: int) -> None:
        told.append(threading.get_native_id())
        hashlib.sha256(memoryview(memory)[at : at + 2 * PAGE])

    with uffd.Userfaultfd(["THREAD_ID", "EXACT_ADDRESS"]) as faults, faults.register(memory) as all:
        assert faults.features >= {"THREAD_ID", "EXACT_ADDRESS"}
        assert faults.read(0) == [] == faults.read(0.01)
        with running(lambda: read_here(8 * PAGE + 32)):
            (fault,) = faults.read(PATIENCE)
            assert fault == uffd.Fault(
                all.start + 8 * PAGE + 32, uffd.Cause.MISSING, False, told[0]
            )
            assert all.range.offset(fault.address) == 8 * PAGE + 32
            assert faults.zeropage(all.start, all.length) == all.length
        with open(__file__, "rb") as file, pytest.raises(errors.Exists):  # noqa: PTH123
            assert file.readinto(memory) and faults.zeropage(all.start, PAGE)


def test_events_of_memory_that_changes() -> None:
    memory = libc.mmap(None, PAGES * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    events = ["EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP"]
    with uffd.Userfaultfd(events) as faults, faults.register((memory, PAGES * PAGE)):
        with running(lambda: libc.madvise(memory + PAGE, 2 * PAGE, DONTNEED)):
            assert faults._native() and next(iter(faults)) == uffd.Remove(
                memory + PAGE, memory + 3 * PAGE
            )
        moved: list[int] = []
        with running(lambda: moved.append(libc.mremap(memory, PAGES * PAGE, 2 * PAGES * PAGE, 1))):
            seen = faults.read(PATIENCE)
            while not moved:
                seen += faults.read(0.01)
        (after,) = moved
        if after != memory:  # it had to make room
            assert seen == [
                uffd.Remap(memory, after, PAGES * PAGE),
                uffd.Unmap(memory, memory + PAGES * PAGE),
            ]
        with running(lambda: libc.munmap(after, 2 * PAGES * PAGE)):
            assert faults.read(PATIENCE) == [uffd.Unmap(after, after + 2 * PAGES * PAGE)]


TARGET = """
import hashlib, mmap, os, socket, sys
from pagekit import uffd
size = 16 * 4096
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
faults = uffd.Userfaultfd(sys.argv[2:])
registered = faults.register(memory)
with socket.socket(socket.AF_UNIX) as monitor:
    monitor.connect(sys.argv[1])
    socket.send_fds(monitor, [registered.start.to_bytes(8, "little")], [faults.fileno()])
    monitor.recv(1)
if (child := os.fork()) == 0:
    print("child", hashlib.sha256(memory).hexdigest(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", hashlib.sha256(memory).hexdigest(), flush=True)
sys.stdin.readline()
"""


@contextmanager
def target(*features: str) -> Iterator[tuple[uffd.Userfaultfd, int, socket.socket, Any]]:
    """Another process, its userfaultfd, and where its 16 registered pages are."""
    with (
        support.reachable_directory() as directory,
        socket.socket(socket.AF_UNIX) as door,
    ):
        door.bind(str(directory / "socket"))
        door.listen()
        door.settimeout(PATIENCE)
        command = [sys.executable, "-c", TARGET, directory / "socket", *features]
        process = support.start(command, {})
        with support.stopping(process), door.accept()[0] as connection:
            message, descriptors, _, _ = socket.recv_fds(connection, 8, 1)
            with uffd.Userfaultfd.adopt(descriptors[0]) as faults:
                yield faults, int.from_bytes(message, "little"), connection, process


def test_children_are_served_too() -> None:
    support.need_root()
    with target("EVENT_FORK") as (faults, start, connection, process):
        assert "EVENT_FORK" in faults.features and faults.registrations == ()
        connection.send(b"x")
        (fork,) = faults.read(PATIENCE)
        assert isinstance(fork, uffd.Fork) and fork.child.features == faults.features
        with fork.child as child:
            fill_all(child, start, first=100)
            line = process.stdout.readline()
            assert line == f"child {digest(wanted(16, 100))}\n"
            support.until(lambda: not child.is_alive(start), "the child's memory is gone")
            with pytest.raises(errors.Gone):
                child.zeropage(start, PAGE)
        fill_all(faults, start, first=200)
        assert process.stdout.readline() == f"parent {digest(wanted(16, 200))}\n"


def fill_all(faults: uffd.Userfaultfd, start: int, first: int) -> None:
    """Whatever event is still under way."""

    def ready() -> bool:
        try:
            return faults.copy(start, wanted(16, first)) == 16 * PAGE
        except errors.LayoutChanged as error:
            assert error.done == 0 and error.retryable
            return False

    support.until(ready, "the target ran again")


def test_a_target_that_is_dead() -> None:
    with target() as (faults, start, _, process):
        assert faults.is_alive(start)
        process.kill()
        process.wait()
        assert not faults.is_alive(start)
        for operation in (
            lambda: faults.copy(start, page_content(0)),
            lambda: faults.zeropage(start, PAGE),
            lambda: faults.register((start, PAGE)),
        ):
            with pytest.raises(errors.Gone) as raised:
                operation()
            assert raised.value.errno == errno.ESRCH
            assert raised.value.range == (start, PAGE)
        faults.wake(start, PAGE)
        assert faults.read(0) == []


def test_an_event_under_way() -> None:
    """Its cause has not been told, so nothing can be filled."""
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd(["EVENT_REMOVE"]) as faults, faults.register(memory) as all:
        base = all.start
        with running(lambda: libc.madvise(base, PAGE, DONTNEED)):
            pending = support.until(lambda: changing(faults, base), "an event is pending")
            assert pending.errno == errno.EAGAIN and "events" in (pending.hint or "")
            assert faults.read(PATIENCE) == [uffd.Remove(base, base + PAGE)]
        faults.zeropage(base, PAGE)


def changing(faults: uffd.Userfaultfd, address: int) -> errors.LayoutChanged | None:
    """What a fill meets that nothing comes of: the page behind is there after the first time."""
    try:
        faults.zeropage(address + PAGE, PAGE)
    except errors.LayoutChanged as error:
        return error
    except errors.Exists:
        pass
    return None


# Other ways to resolve


def test_user_mode_only() -> None:
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd(user_mode_only=True) as faults:
        all = faults.register(memory)
        error = given(memoryview(memory)[:PAGE])
        assert error is not None and error.errno == errno.EFAULT
        faults.copy(all.start, wanted())
        assert given(memoryview(memory)[:PAGE]) is None and memory[:] == wanted()


def test_sigbus() -> None:
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd(["SIGBUS"]) as faults, faults.register(memory) as all:
        error = given(memoryview(memory)[:PAGE])
        assert error is not None and error.errno == errno.EFAULT
        assert faults.read(0) == []
        faults.copy(all.start, wanted())
        assert memory[:] == wanted()


def test_poison() -> None:
    feature("POISON")
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        assert faults.poison(all.start, 2 * PAGE) == 2 * PAGE
        error = given(memoryview(memory)[:PAGE])
        assert error is not None and error.errno in (errno.EFAULT, HWPOISON)
        assert faults.copy(all.start, page_content(1)) == PAGE, "a copy heals it"
        assert memory[:PAGE] == page_content(1)


def test_move() -> None:
    feature("MOVE")
    memory, source = anonymous(PAGES * PAGE), anonymous(PAGES * PAGE)
    source[:] = wanted()
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        assert faults.move(all.start, address(source), all.length) == all.length
        assert memory[:] == wanted()
        assert source[:] == bytes(PAGES * PAGE)


def test_a_page_that_is_cached() -> None:
    feature("MINOR_SHMEM")
    file = os.memfd_create("pagekit-test")
    os.truncate(file, PAGES * PAGE)
    memory = mmap.mmap(file, PAGES * PAGE)
    os.pwrite(file, wanted(), 0)
    with uffd.Userfaultfd(["MINOR_SHMEM"]) as faults:
        all = faults.register(memory, missing=False, minor=True)
        assert "CONTINUE" in all.operations
        with running(lambda: touch(memory)):
            (fault,) = faults.read(PATIENCE)
            assert isinstance(fault, uffd.Fault) and fault.cause is uffd.Cause.MINOR
            assert faults.continue_(all.start, all.length) == all.length
        assert memory[:] == wanted()
    os.close(file)


@pytest.mark.parametrize("kind", [anonymous, memfd])
def test_write_protection(kind: Callable[[int], mmap.mmap]) -> None:
    if kind is memfd:
        feature("WP_HUGETLBFS_SHMEM")
    memory = kind(PAGES * PAGE)
    wish = ["PAGEFAULT_FLAG_WP"] if kind is anonymous else ["WP_HUGETLBFS_SHMEM"]
    with uffd.Userfaultfd(wish) as faults, faults.register(memory, wp=True) as all:
        assert all.modes == {"missing", "wp"} and "WRITEPROTECT" in all.operations
        faults.copy(all.start, wanted(), wp=True)
        assert all_protected(memory) and memory[:] == wanted()
        with open(__file__, "rb", buffering=0) as file:  # noqa: PTH123
            with running(lambda: file.readinto(memoryview(memory)[3 * PAGE : 4 * PAGE])):
                (fault,) = faults.read(PATIENCE)
                assert isinstance(fault, uffd.Fault) and fault.write
                assert fault.cause is uffd.Cause.WRITE_PROTECTED
                assert fault.address == all.start + 3 * PAGE
                faults.unprotect(fault.address, PAGE)
            assert memory[3 * PAGE : 4 * PAGE] == Path(__file__).read_bytes()[:PAGE]
        entries = uffd.pagemap(memory)
        assert [entry.write_protected for entry in entries].index(False) == 3
        faults.protect(all.start, all.length)
        assert all_protected(memory)
        faults.unprotect(all.start, all.length)


def all_protected(memory: mmap.mmap) -> bool:
    return all(entry.write_protected and entry.present for entry in uffd.pagemap(memory))


def test_what_was_written_is_found() -> None:
    feature("WP_ASYNC")
    feature("PAGEMAP_SCAN")
    memory = anonymous(PAGES * PAGE)
    with (
        uffd.Userfaultfd(["WP_ASYNC", "WP_UNPOPULATED"]) as faults,
        faults.register(memory, missing=False, wp=True) as all,
    ):
        assert all.modes == {"wp"}
        faults.protect(all.start, all.length)

        def written() -> list[tuple[int, int]]:
            runs = uffd.scan(memory, having=["WRITTEN"], protect=True, only_tracked=True)
            assert all_of(runs) <= {"WPALLOWED", "WRITTEN", "PRESENT", "PFNZERO"}
            return [
                ((run.start - all.start) // PAGE, (run.end - all.start) // PAGE) for run in runs
            ]

        assert written() == []
        for page in (3, 4, 5, 40):
            memory[page * PAGE] = 1
        assert written() == [(3, 6), (40, 41)]
        assert written() == []
        memory[40 * PAGE] = 2
        assert written() == [(40, 41)]


def all_of(runs: list[uffd.Run]) -> set[str]:
    return set().union(*(run.categories for run in runs)) if runs else set()


def test_what_is_true_of_pages() -> None:
    memory = anonymous(PAGES * PAGE)
    memory[PAGE] = 1
    entries = uffd.pagemap(memory)
    assert len(entries) == PAGES and [entry.present for entry in entries[:3]] == [0, 1, 0]
    assert not entries[1].file and entries[1].exclusive and not entries[1].swapped
    start = address(memory)
    assert uffd.pagemap((start, PAGES * PAGE), pid=os.getpid()) == entries
    assert uffd.pagemap(uffd.Range(start + PAGE, PAGE, start)) == [entries[1]]
    feature("PAGEMAP_SCAN")
    (run,) = uffd.scan(memory, having=["PRESENT"], lacking=["FILE"])
    assert (run.start, run.end) == (start + PAGE, start + 2 * PAGE)
    for page in range(PAGES):
        memory[page * PAGE] = 1
    assert sum(run.end - run.start for run in uffd.scan(memory, any_of=["PRESENT"], most=3)) == (
        3 * PAGE
    )
    for what in (uffd.pagemap, uffd.scan):
        with pytest.raises(errors.Gone):
            what((start, PAGE), pid=1 << 22)
        with pytest.raises(errors.UsageError):
            what((start, 17))
    with pytest.raises(errors.UsageError, match="not one of the categories"):
        uffd.scan(memory, having=["DIRTY"])
    with pytest.raises(errors.Ioctl) as raised:
        uffd.scan(memory, protect=True, only_tracked=True)
    assert raised.value.errno == errno.EPERM and "WP_ASYNC" in (raised.value.hint or "")


def test_waking_is_a_thing_of_its_own() -> None:
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        with running(lambda: touch(memory)) as toucher:
            assert len(faults.read(PATIENCE)) == 1
            faults.copy(all.start, wanted(), wake=False)
            assert toucher.is_alive()
            with pytest.raises(errors.Exists) as raised:
                faults.copy(all.start, page_content(0))
            assert "wake" in (raised.value.hint or "")
            faults.wake(all.start, all.length)
        assert memory[:] == wanted()


def test_huge_pages() -> None:
    huge, flag = 2 << 20, 0x40000
    with support.sysctl("vm.nr_hugepages", "4"):
        free = re.search(r"HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text())
        need("huge pages", free and int(free[1]) >= 2, "no memory for them")
        memory = mmap.mmap(-1, 2 * huge, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | flag)
        content = wanted(huge // PAGE)
        with uffd.Userfaultfd() as faults, faults.register(memory) as all:
            assert "ZEROPAGE" not in all.operations and "COPY" in all.operations
            with running(lambda: touch(memoryview(memory)[PAGE : 2 * PAGE])):
                (fault,) = faults.read(PATIENCE)
                assert isinstance(fault, uffd.Fault)
                assert fault.address // huge * huge == all.start
                with pytest.raises(errors.Ioctl) as raised:
                    faults.copy(all.start, page_content(0))
                assert raised.value.errno == errno.EINVAL
                assert faults.copy(all.start, content) == huge
            assert memory[:huge] == content
            feature("POISON")
            with (
                pytest.raises(errors.HandlerError),
                uffd.handler_process(handlers.die, faults),
            ):
                assert given(memoryview(memory)[huge : huge + PAGE]) is not None
        memory.close()


# Bad input


def test_memory_that_cannot_be_registered(tmp_path: Path) -> None:
    memory = anonymous(PAGES * PAGE)
    start = address(memory)
    with uffd.Userfaultfd() as faults:
        for wrong, words in [
            ((start + 1, PAGE), "no whole pages"),
            ((start, PAGE + 1), "no whole pages"),
            ((start, 0), "no whole pages"),
            ((start, -PAGE), "no whole pages"),
            ((-PAGE, PAGE), "in no address space"),
            ((1 << 64, PAGE), "in no address space"),
            (bytearray(100), "no whole page in a buffer"),
            (b"", "no whole page in a buffer"),
            ("text", "no memory to work on"),
        ]:
            with pytest.raises(errors.UsageError, match=words):
                faults.register(wrong)  # type: ignore[arg-type]
        with (
            memoryview(memory)[::2] as every_other,
            pytest.raises(errors.UsageError, match="not contiguous"),
        ):
            faults.register(every_other)
        with pytest.raises(errors.UsageError, match="for something"):
            faults.register(memory, missing=False)
        (tmp_path / "file").write_bytes(bytes(PAGE))
        with (tmp_path / "file").open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as mapped:
            with pytest.raises(errors.Ioctl, match="cannot register") as raised:
                faults.register(mapped)
            assert raised.value.errno == errno.EINVAL and "kind" in (raised.value.hint or "")
        with pytest.raises(errors.Ioctl) as raised:
            faults.register(memory, minor=True)
        assert raised.value.errno == errno.EINVAL
        with pytest.raises(errors.Ioctl):
            faults.register((PAGE, PAGE))  # nothing is mapped there
        assert faults.registrations == ()

        all = faults.register((start + PAGE, 8 * PAGE))
        for overlapping in [(start, 2 * PAGE), (start + 8 * PAGE, PAGE), (start + PAGE, 8 * PAGE)]:
            with pytest.raises(errors.UsageError, match="overlap"):
                faults.register(overlapping)
        beside = faults.register((start + 9 * PAGE, PAGE))
        with uffd.Userfaultfd() as other:
            with pytest.raises(errors.Ioctl) as raised:
                other.register(memory)
            assert raised.value.errno == errno.EBUSY
            all.unregister()
            beside.unregister()
            other.register(memory)
        all.unregister()
    memory.close()


def test_resolving_where_it_cannot_be() -> None:
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd() as faults, faults.register((address(memory), 8 * PAGE)) as all:
        inside, outside = all.start, all.start + 8 * PAGE
        for operation in (
            lambda: faults.copy(outside, page_content(0)),
            lambda: faults.zeropage(outside, PAGE),
            lambda: faults.copy(outside - PAGE, wanted(2)),
            lambda: faults.protect(inside, PAGE),
        ):
            with pytest.raises(errors.NotCovered) as raised:
                operation()
            assert raised.value.errno == errno.ENOENT and "register" in (raised.value.hint or "")
        for unaligned in (
            lambda: faults.copy(inside + 1, page_content(0)),
            lambda: faults.copy(inside, b"short"),
            lambda: faults.copy(inside, b""),
            lambda: faults.zeropage(inside, 0),
            lambda: faults.move(inside, 1, PAGE),
            lambda: faults.wake(inside, 1),
            lambda: faults.unprotect(inside + 1, PAGE),
        ):
            with pytest.raises(errors.UsageError, match="whole pages"):
                unaligned()
        with pytest.raises(errors.UsageError, match="no bytes to copy"):
            faults.copy(inside, "text")  # type: ignore[arg-type]
        with pytest.raises(errors.UsageError, match="memory that faults"):
            faults.copy(inside, memoryview(memory)[:PAGE])
        with pytest.raises(errors.Ioctl, match="continue") as refused:
            faults.continue_(inside, PAGE)
        assert refused.value.errno == errno.EINVAL

        faults.zeropage(inside + 2 * PAGE, PAGE)
        with pytest.raises(errors.Exists) as exists:
            faults.copy(inside, wanted(4))
        assert exists.value.done == 2 * PAGE and exists.value.range == (inside, 4 * PAGE)
        assert exists.value.errno == errno.EEXIST
        assert memory[: 2 * PAGE] == wanted(2)
        with pytest.raises(errors.Exists) as exists:
            faults.copy(inside, wanted(1))
        assert exists.value.done == 0
        whole = anonymous(2 * PAGE)
        assert faults.copy(inside + 6 * PAGE, whole) == 2 * PAGE
        whole.close()


def address(memory: mmap.mmap) -> int:
    """Where it is."""
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        return all.start


def test_what_this_kernel_has_not_got(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in uffd.features()}
    need("older kernel", rows["RWP"].state == "no", "this one has it all")
    memory = anonymous(PAGE)
    with pytest.raises(errors.Unsupported, match="RWP") as raised:
        uffd.Userfaultfd(["RWP", "THREAD_ID"])
    assert raised.value.hint == rows["RWP"].remedy
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        for operation in (faults.protect_against_access, faults.allow_access):
            with pytest.raises(errors.Unsupported, match="RWP") as raised:
                operation(all.start, PAGE)
        with pytest.raises(errors.Unsupported, match="RWP"):
            faults.set_mode(enable=["RWP_ASYNC"])


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([["NONSENSE"]], {}, "'NONSENSE' is not one of the features"),
        ([["KERNEL_FAULTS"]], {}, "is not one of the features"),
        (["THREAD_ID"], {}, "a list of names"),
        ([], {"user_mode_only": True, "device": "/dev/userfaultfd"}, "never for user mode"),
    ],
)
def test_wishes_that_mean_nothing(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        uffd.Userfaultfd(*arguments, **options)


def test_devices() -> None:
    with pytest.raises(errors.KernelError, match="No such file"):
        uffd.Userfaultfd(device="/dev/no/such/device")
    with pytest.raises(errors.KernelError):
        uffd.Userfaultfd(device=os.devnull)
    for wrong in (-1, 1 << 20):
        with pytest.raises(errors.KernelError, match="Bad file descriptor"):
            uffd.Userfaultfd(device=wrong)
    feature("DEVICE")
    device = os.open("/dev/userfaultfd", os.O_RDWR)
    with uffd.Userfaultfd(device=device), uffd.Userfaultfd(device="/dev/userfaultfd"):
        pass
    os.fstat(device)
    os.close(device)


def test_descriptors_that_cannot_be_taken_over() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for wrong in (null, -1, 1 << 20):
        with pytest.raises(errors.UsageError, match="cannot be taken over"):
            uffd.Userfaultfd.adopt(wrong)
    os.close(null)  # left alone


def test_after_close() -> None:
    memory = anonymous(PAGES * PAGE)
    faults = uffd.Userfaultfd()
    all = faults.register(memory)
    number = faults.fileno()
    with pytest.raises(BufferError):
        memory.close()
    with pytest.raises(BufferError):
        memory.resize(2 * PAGES * PAGE)
    faults.close()
    faults.close()
    assert faults.closed and faults.registrations == ()
    # Another file gets the number, and nothing is done to it.
    opened = [os.open(os.devnull, os.O_RDWR)]
    while number not in opened:
        opened.append(os.open(os.devnull, os.O_RDWR))
    for operation in (
        faults.fileno,
        faults.read,
        lambda: faults.register(memory),
        lambda: faults.copy(all.start, page_content(0)),
        lambda: faults.zeropage(all.start, PAGE),
        lambda: faults.poison(all.start, PAGE),
        lambda: faults.continue_(all.start, PAGE),
        lambda: faults.move(all.start, all.start + PAGE, PAGE),
        lambda: faults.protect(all.start, PAGE),
        lambda: faults.unprotect(all.start, PAGE),
        lambda: faults.wake(all.start, PAGE),
        lambda: faults.is_alive(all.start),
        lambda: uffd.handler_process("handlers:fill", faults).__enter__(),
    ):
        with pytest.raises(errors.UsageError, match="closed"):
            operation()
    assert list(faults) == []
    all.unregister()
    for descriptor in opened:
        os.fstat(descriptor)
        os.close(descriptor)
    assert memory[:] == bytes(PAGES * PAGE)
    memory.close()


def test_closing_under_load() -> None:
    """Readers, resolvers and touchers at once: all end, and the number is not used for another
    file meanwhile."""
    for _ in range(10):
        memory = anonymous(4 * PAGES * PAGE)
        faults = uffd.Userfaultfd()
        faults.register(memory)
        ranges = tuple(one.range for one in faults.registrations)
        view = memoryview(memory)
        quarters = [view[at * PAGES * PAGE : (at + 1) * PAGES * PAGE] for at in range(4)]
        seen = threading.Semaphore(0)

        def handle(faults: Any = faults, ranges: Any = ranges, seen: Any = seen) -> None:
            with suppress(errors.UsageError):
                for event in faults:
                    with suppress(errors.Exists, errors.NotCovered):
                        faults.zeropage(event.address, PAGE)
                    seen.release()

        threads = [threading.Thread(target=handle) for _ in range(3)]
        threads += [threading.Thread(target=touch, args=[quarter]) for quarter in quarters]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert seen.acquire(timeout=PATIENCE)
        faults.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_an_interrupt_ends_the_wait() -> None:
    def ring(*_: object) -> None:
        raise InterruptedError("it rang")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with uffd.Userfaultfd() as faults:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(InterruptedError, match="it rang"):
                faults.read()
            for wrong in (-1, float("nan")):
                with pytest.raises(errors.UsageError):
                    faults.read(wrong)
            with pytest.raises(errors.UsageError):
                faults.read(most=0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_descriptor_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    ballast = [os.open(os.devnull, os.O_RDONLY)]
    while ballast[-1] < used:
        ballast.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (ballast[-1] + 1, hard))
    try:
        with pytest.raises(errors.KernelError, match="Too many open files"):
            uffd.Userfaultfd(user_mode_only=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in ballast:
            os.close(descriptor)


def test_a_child_of_fork_leaves_the_parents_memory_registered() -> None:
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd() as faults:
        all = faults.register(memory)
        child = os.fork()
        if child == 0:
            faults.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        faults.zeropage(all.start, PAGE)


# Handlers that fail


@pytest.mark.parametrize(
    ("handler", "words", "cause"),
    [
        (handlers.raise_known, "the handler raised LookupError: no such page", LookupError),
        (handlers.raise_odd, "the handler raised Odd: no page", None),
        (handlers.die, "was killed by signal 9 while it handled faults", None),
        (handlers.return_early, "returned while there was memory to handle", None),
    ],
)
def test_a_handler_that_fails(
    handler: uffd.Handler, words: str, cause: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system call that waits fails; so does what touches a missing page later."""
    feature("POISON")
    memory = anonymous(PAGES * PAGE)
    view = memoryview(memory)
    with uffd.Userfaultfd() as faults, faults.register(memory) as all:
        faults.copy(all.start + 8 * PAGE, page_content(8))
        with (
            pytest.raises(errors.HandlerError, match=words) as raised,
            uffd.handler_process(handler, faults),
        ):
            for page in (0, 1, 63):
                error = given(view[page * PAGE : (page + 1) * PAGE])
                assert error is not None, page
                assert error.errno in (errno.EFAULT, HWPOISON)
            assert given(view[8 * PAGE : 9 * PAGE]) is None
        assert type(raised.value.__cause__) is cause if cause else raised.value.__cause__ is None
        assert ("raise " in raised.value.traceback) == ("raised" in words)
        # Until the userfaultfd is closed.
        assert given(view[20 * PAGE : 21 * PAGE]) is not None
    assert "has ended; pages that are missing raise SIGBUS" in capfd.readouterr().err


def test_a_handler_that_does_not_return() -> None:
    with uffd.Userfaultfd() as faults, faults.register(anonymous(PAGE)):
        process = uffd.handler_process(handlers.never_return, faults, patience=5)
        with pytest.raises(errors.HandlerError, match="did not return within 5"), process:
            pass
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid or 0, 0)


@pytest.mark.parametrize(
    ("handler", "error", "words"),
    [
        (lambda faults, ranges: None, errors.UsageError, "cannot be handed over"),
        ("handlers", errors.UsageError, "names no function"),
        (":fill", errors.UsageError, "names no function"),
        ("no_such_module:fill", errors.HandlerError, "No module named 'no_such_module'"),
        ("handlers:no_such_function", errors.HandlerError, "AttributeError"),
        ("handlers:os", errors.HandlerError, "cannot be called"),
    ],
)
def test_handlers_that_are_none(handler: Any, error: Any, words: str) -> None:
    with (
        uffd.Userfaultfd() as faults,
        pytest.raises(error, match=words),
        uffd.handler_process(handler, faults),
    ):
        pass


def test_a_handler_of_children_is_refused() -> None:
    feature("EVENT_FORK")
    with (
        uffd.Userfaultfd(["EVENT_FORK"]) as faults,
        pytest.raises(errors.UsageError, match="EVENT_FORK"),
    ):
        uffd.handler_process(handlers.fill, faults)


def test_errors_of_the_program_are_not_hidden_by_a_good_handler() -> None:
    with (
        uffd.Userfaultfd() as faults,
        faults.register(anonymous(PAGE)),
        pytest.raises(ZeroDivisionError),
        uffd.handler_process(handlers.fill, faults),
    ):
        raise ZeroDivisionError


DOOMED = """
import faulthandler, mmap, threading
from pagekit import uffd
faulthandler.enable()
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
faults = uffd.Userfaultfd()
registered = faults.register(memory)
"""


def doomed(code: str) -> str:
    """Runs a program that must end by SIGBUS; what it said."""
    command = [sys.executable, "-c", DOOMED + code]
    process = support.start(command, {"PYTHONPATH": str(Path(__file__).parent)})
    with support.stopping(process):
        out, err = support.ended(process, -signal.SIGBUS)
        assert out == "begun\n"
        return err


def test_a_handler_is_killed_while_the_gil_is_held() -> None:
    """The main thread waits for a page with the GIL: nobody else in Python could do anything."""
    feature("POISON")
    said = doomed("""
print("begun", flush=True)
with uffd.handler_process("handlers:die", faults):
    print("never", memory[0])
""")
    assert "the process that handled page faults of this one has ended" in said
    assert "Fatal Python error: Bus error" in said


def test_a_deadlock_is_noticed() -> None:
    """The handler is a thread of the same interpreter, and the touch does not give up the GIL."""
    said = doomed("""
def handle():
    for event in faults:
        faults.zeropage(event.address, 4096)
threading.Thread(target=handle, daemon=True).start()
print("begun", flush=True)
for page in range(256):
    print("never" * memory[page * 4096], end="")
""")
    assert "pagekit: deadlock: thread" in said and "handle faults in another process" in said
    assert "Fatal Python error: Bus error" in said


def test_waiting_for_the_gil_is_no_deadlock() -> None:
    """A thread that has the GIL for long, while another one waits for a page, ends by itself."""
    memory = anonymous(PAGES * PAGE)
    with uffd.Userfaultfd() as faults:
        faults.register(memory)
        with filled(faults), running(lambda: touch(memory)):
            busy_with_the_gil(6.5)
    assert memory[:] == wanted()


def busy_with_the_gil(seconds: float) -> None:
    """Runs in one piece: none of it is bytecode, between which the GIL could be given up."""
    end = time.monotonic() + seconds
    next(filter(end.__lt__, iter(time.monotonic, None)))


def test_what_travels_by_pickle() -> None:
    where = uffd.Range(PAGE, 2 * PAGE, 100)
    assert pickle.loads(pickle.dumps(where)) == where
    assert where.end == 3 * PAGE and PAGE in where and 3 * PAGE not in where
    assert where.offset(PAGE) == PAGE - 100 and "x" not in where


def test_temporary_files_are_mapped_privately() -> None:
    """Write tracking works for any memory with WP_ASYNC, that of an ordinary file too."""
    feature("WP_ASYNC")
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(PAGES * PAGE)
        memory = mmap.mmap(file.fileno(), PAGES * PAGE, flags=mmap.MAP_PRIVATE)
        with (
            uffd.Userfaultfd(["WP_ASYNC"]) as faults,
            faults.register(memory, missing=False, wp=True) as all,
        ):
            faults.protect(all.start, all.length)
            memory[7 * PAGE] = 1
            (run,) = uffd.scan(memory, having=["WRITTEN"], lacking=["FILE"])
            assert run.start == all.start + 7 * PAGE
        memory.close()
