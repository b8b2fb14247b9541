"""Maps: memory of this process that fills itself."""

from __future__ import annotations

import array
import ctypes
import faulthandler
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import callbacks
import pytest
import support
from support import NOBODY, PAGE, Memory, make_memory, need, need_root, page_content, until

import pagekit
from pagekit.errors import CallbackError, IntegrityError, SourceError, SourceTimeout, UsageError

WAYS = ("thread", "signal")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


@pytest.fixture(autouse=True)
def _able() -> None:
    support.need_userfaultfd()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """512 pages, two runs of them holes. Whatever happens to maps of it, the file stays so."""
    made = make_memory(tmp_path)
    before = made.digest()
    yield made
    assert made.digest() == before


def expected(memory: Memory, page: int) -> bytes:
    hole = any(start <= page < end for start, end in memory.holes)
    return bytes(PAGE) if hole else page_content(page)


def run(
    code: str, *arguments: object, prefix: Any = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program of its own, which a hanging test must not outlive."""
    program = [sys.executable, "-c", f"import os, sys, pagekit\n{code}"]
    command = [*prefix, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=support.PATIENCE, **more)


# What it holds


@pytest.mark.parametrize("faults", WAYS)
@pytest.mark.parametrize("layers", [(), ("delay=300us",)])
def test_pages_arrive_in_any_order(memory: Memory, faults: Any, layers: tuple[str, ...]) -> None:
    order = list(range(memory.pages))
    random.Random(4).shuffle(order)
    with pagekit.map(memory.spec, layers=layers, faults=faults) as found:
        assert found.statistics()["faults"] == faults
        with memoryview(found) as view:
            assert view.readonly and view.nbytes == len(found) == memory.size
            for page in order:
                assert view[page * PAGE : (page + 1) * PAGE] == expected(memory, page), page
        statistics = found.statistics()
        assert statistics["failures"] == 0
        assert 0 < statistics["demand_faults"] <= memory.pages


def test_subscripts_are_those_of_bytes(memory: Memory) -> None:
    whole = memory.path.read_bytes()
    with pagekit.map(memory.spec) as found:
        for key in (0, -1, 4095, 4096, -memory.size, memory.size - 1):
            assert found[key] == whole[key]
        cuts = (
            None,
            0,
            1,
            -1,
            4097,
            1 << 20,
            -5000,
            memory.size,
            memory.size + 9,
            -memory.size - 9,
        )
        for start in cuts:
            for stop in cuts:
                assert found[start:stop] == whole[start:stop]
        for step in (2, 4096, -1, -3, 1 << 22, -(1 << 22)):
            for cut in (slice(None, None, step), slice(5, 90000, step), slice(90000, 5, step)):
                assert found[cut] == whole[cut]
        assert isinstance(found[2:9], bytes) and bytes(found) == whole
        for key in (memory.size, -memory.size - 1, 1 << 80):
            with pytest.raises(IndexError):
                found[key]
        with pytest.raises(TypeError):
            found["a"]  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            found[0] = 1


def test_only_what_is_asked_for_is_fetched(tmp_path: Path) -> None:
    memory = make_memory(tmp_path, pages=4096, holes=())
    with pagekit.map(memory.spec, layers=["stats"]) as found:
        assert found[100 * PAGE : 110 * PAGE] == b"".join(map(page_content, range(100, 110)))
        assert found[-1] == page_content(4095)[-1]
        assert dict(found.statistics()["template"]["stack"])["stats.bytes"] == 11 * PAGE


def test_touching_a_little_takes_little_memory(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(4 << 30)
        for at in range(0, 4 << 30, 64 << 20):
            file.seek(at)
            file.write(page_content(at // PAGE))
    done = run(
        """
import re
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = resident()
with pagekit.map("file:" + sys.argv[1]) as found:
    view = memoryview(found)
    total = sum(view[at] for at in range(0, len(found), 16 << 20))
    print(total > 0, resident() - before)
""",
        big,
    )
    assert done.returncode == 0, done.stderr
    well, grown = done.stdout.split()
    assert well == "True" and int(grown) < 64 << 10, done.stdout


def test_other_things_take_it_for_a_buffer(memory: Memory) -> None:
    whole = memory.path.read_bytes()
    with pagekit.map(memory.spec) as found:
        assert hashlib.sha256(found).hexdigest() == memory.digest()
        part = whole[200 * PAGE + 5 : 200 * PAGE + 25]
        match = re.search(re.escape(part), found)
        assert match and match.start() == whole.index(part)
        words = array.array("Q")
        words.frombytes(memoryview(found)[: 8 * PAGE])
        assert words.tobytes() == whole[: 8 * PAGE]
        # Views of it are of it, whatever their shape.
        cast = memoryview(found).cast("Q")
        assert cast[512] == int.from_bytes(whole[4096:4104], sys.byteorder)


def test_finding(memory: Memory) -> None:
    whole = memory.path.read_bytes()
    with pagekit.map(memory.spec, layers=["stats"]) as found:
        part = whole[70 * PAGE - 6 : 70 * PAGE + 3]
        for pattern in (
            whole[3 * PAGE - 8 : 3 * PAGE + 8],
            part,
            b"\0\0\0",
            b"",
            b"not there at all",
        ):
            for start, end in (
                (0, None),
                (5, 9),
                (-9000, None),
                (300, -300),
                (1 << 40, None),
                (9, 5),
            ):
                assert found.find(pattern, start, end) == whole.find(pattern, start, end)
        assert found.find(0) == whole.find(b"\0") and found.find(bytearray(part)) == whole.find(
            part
        )
        assert part in found and b"not there at all" not in found and 0 in found
    with pagekit.map(memory.spec, layers=["stats"]) as found:
        assert found.find(page_content(2)[:16]) == 2 * PAGE
        read = dict(found.statistics()["template"]["stack"])["stats.bytes"]
        assert read <= 1 << 20, "it searches no farther than it must"


# Writing


@pytest.mark.parametrize("faults", WAYS)
def test_what_is_written_is_the_maps_own(memory: Memory, faults: Any) -> None:
    whole = memory.path.read_bytes()
    with (
        pagekit.Template(memory.spec) as template,
        pagekit.map(template, writable=True, faults=faults) as one,
        pagekit.map(template, writable=True, faults=faults) as two,
        pagekit.map(template) as three,
    ):
        one[10:20] = b"0123456789"
        one[70 * PAGE] = 9  # in a hole
        two[12] = 0
        with memoryview(two) as view:
            view[5 * PAGE : 6 * PAGE] = bytes(PAGE)
        first, second = bytearray(whole), bytearray(whole)
        first[10:20] = b"0123456789"
        first[70 * PAGE] = 9
        second[12] = 0
        second[5 * PAGE : 6 * PAGE] = bytes(PAGE)
        assert one[:] == first and two[:] == second and three[:] == whole
        assert template.read(0, template.size) == whole
        template.audit()


def test_writes_are_those_of_a_bytearray_of_one_size(memory: Memory) -> None:
    mirror = bytearray(memory.path.read_bytes())
    with pagekit.map(memory.spec, writable=True) as found:
        for key, value in (
            (slice(0, 3), b"abc"),
            (slice(5000, 5008), array.array("Q", [7])),
            (slice(9000, 8000, -100), bytes(10)),
            (slice(9, 9), b""),
        ):
            found[key] = value
            mirror[key] = bytes(value)
        found[-1] = mirror[-1] = 255
        assert found[:] == mirror
        for key, value in ((slice(0, 3), b"ab"), (slice(0, 9, 2), b"abc")):
            with pytest.raises(ValueError):
                found[key] = value
        with pytest.raises(ValueError):
            found[0] = 256
        with pytest.raises(TypeError):
            found[0] = b"a"
        with pytest.raises(IndexError):
            found[memory.size] = 0
    with pagekit.map(memory.spec) as found, pytest.raises(TypeError, match="not writable"):
        (ctypes.c_char * 8).from_buffer(found)


# Threads, and the kernel


@pytest.mark.parametrize("faults", WAYS)
def test_many_threads_that_do_not_hold_the_gil(memory: Memory, faults: Any) -> None:
    with pagekit.map(memory.spec, layers=["delay=500us"], faults=faults) as found:
        view = memoryview(found)
        # Large updates of a hash are computed without the GIL.
        with ThreadPoolExecutor(8) as pool:
            parts = [view[start:] for start in range(0, 8 * 40 * PAGE, 40 * PAGE)]
            digests = list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))
        whole = memory.path.read_bytes()
        for part, digest in zip(range(0, 8 * 40 * PAGE, 40 * PAGE), digests, strict=True):
            assert hashlib.sha256(whole[part:]).digest() == digest


def test_a_thread_that_waits_for_a_page_may_hold_the_gil(memory: Memory) -> None:
    # Comparing two views holds it, and nobody else can run meanwhile but those who bring pages.
    with (
        pagekit.map(memory.spec, layers=["delay=1ms"]) as one,
        pagekit.map(memory.spec, layers=["delay=1ms"], faults="signal") as two,
    ):
        assert memoryview(one) == memoryview(two)


def test_system_calls_meet_missing_pages(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["delay=1ms"]) as found:
        assert found.statistics()["kernel_faults"]
        view = memoryview(found)
        reader, writer = os.pipe()
        here, there = socket.socketpair()
        with here, there:
            for page in (7, 200, 301):
                part = view[page * PAGE : (page + 1) * PAGE]
                assert os.write(writer, part) == PAGE
                assert os.read(reader, PAGE) == expected(memory, page)
                page += 1
                assert there.send(view[page * PAGE : (page + 1) * PAGE]) == PAGE
                assert here.recv(PAGE, socket.MSG_WAITALL) == expected(memory, page)
        os.close(reader)
        os.close(writer)
        # And into it, where it can be written.
    with pagekit.map(memory.spec, writable=True) as found, memory.path.open("rb") as file:
        file.seek(PAGE)
        with memoryview(found) as view:
            assert file.readinto(view[: 3 * PAGE]) == 3 * PAGE
        assert found[: 3 * PAGE] == memory.path.read_bytes()[PAGE : 4 * PAGE]


def test_with_signals_system_calls_fail_instead(memory: Memory) -> None:
    with pagekit.map(memory.spec, faults="signal") as found:
        statistics = found.statistics()
        assert not statistics["kernel_faults"] and "signal" in statistics["reason"]
        with memoryview(found) as view, Path(os.devnull).open("wb", buffering=0) as nothing:
            reader, writer = os.pipe()
            with pytest.raises(OSError, match="Bad address"):
                os.write(writer, view[7 * PAGE : 8 * PAGE])
            found.populate()
            assert os.write(writer, view[7 * PAGE : 8 * PAGE]) == PAGE
            assert os.read(reader, PAGE) == page_content(7)
            nothing.write(view)
            os.close(reader)
            os.close(writer)


# Ahead


def test_fetching_ahead(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["stats", "delay=1ms"]) as found:
        found.will_need(150 * PAGE + 7, 250 * PAGE - 7)
        until(lambda: found.statistics()["template"]["present_pages"] >= 100, "it comes by itself")
        assert found.statistics()["template"]["present_pages"] == 100
        assert found.statistics()["demand_faults"] == 0
        found.will_need(memory.size, memory.size)
        found.will_need()
        found.populate()
        statistics = found.statistics()
        pages = memory.pages - statistics["template"]["zero_pages"]
        assert statistics["template"]["present_pages"] == pages
        assert dict(statistics["template"]["stack"])["stats.bytes"] == pages * PAGE, "none twice"


@pytest.mark.parametrize("start, stop", [(-1, 5), (0, 1 << 62), (9, 5), (1 << 62, None)])
def test_hints_outside_are_refused(memory: Memory, start: int, stop: int | None) -> None:
    with pagekit.map(memory.spec) as found, pytest.raises(UsageError, match="not inside"):
        found.will_need(start, stop)


# What cannot be had


@pytest.mark.parametrize("faults", WAYS)
def test_methods_raise_what_the_source_raises(memory: Memory, faults: Any) -> None:
    with pagekit.map(memory.spec, layers=["fail=page:17"], faults=faults, deadline=0) as found:
        assert found[16 * PAGE] == page_content(16)[0]
        for ask in (
            lambda: found[17 * PAGE],
            lambda: found[16 * PAGE : 19 * PAGE],
            lambda: found.find(b"nowhere"),
            found.populate,
            lambda: bytes(found),
        ):
            with pytest.raises(IntegrityError, match="fail=page:17"):
                ask()
        found.will_need()
        assert found[18 * PAGE] == page_content(18)[0]
    with pagekit.map(memory.spec, layers=["fail=always"], faults=faults, deadline=0.05) as found:
        with pytest.raises(SourceError, match="fail=always"):
            found[0]
        with pytest.raises(SourceError):
            found.populate()


def test_what_fails_for_a_while_is_waited_for(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["fail=3"]) as found:
        assert memoryview(found)[9 * PAGE] == page_content(9)[0]
        assert found.statistics()["failures"] == 0


RAW = """
template = pagekit.Template(sys.argv[1], layers=["fail=page:17"], deadline=0)
found = pagekit.map(template, faults=sys.argv[2])
view = memoryview(found)
assert view[18 * 4096]
print("before", flush=True)
view[17 * 4096]
print("zeros?")
"""


@pytest.mark.parametrize("faults", WAYS)
def test_a_view_of_what_cannot_be_had_ends_the_process_with_a_word(
    memory: Memory, faults: str
) -> None:
    done = run(RAW, memory.spec, faults)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n"), done.stderr
    line = r"pagekit: map of file:\S+: page 17 \(at 0x[0-9a-f]+\) cannot be had: .*fail=page:17.*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


@pytest.mark.parametrize("faults", WAYS)
def test_a_handler_that_was_there_before_is_asked_too(memory: Memory, faults: str) -> None:
    done = run("import faulthandler; faulthandler.enable()\n" + RAW, memory.spec, faults)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n")
    assert "page 17 (at 0x" in done.stderr and "Fatal Python error: Bus error" in done.stderr


def test_a_handler_that_mends_nothing_is_asked_once(memory: Memory) -> None:
    ignores = "import signal; signal.signal(signal.SIGBUS, lambda *_: None)\n"
    for faults in WAYS:
        done = run(ignores + RAW, memory.spec, faults)
        assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n"), done.stderr


def test_a_bus_error_of_somebody_else_is_not_ours(memory: Memory, tmp_path: Path) -> None:
    code = """
import mmap
found = pagekit.map(sys.argv[1], faults="signal")
assert memoryview(found)[0]
if sys.argv[2] == "sent":
    os.kill(os.getpid(), 7)
file = open(sys.argv[2], "w+b")
file.truncate(8192)
beyond = mmap.mmap(file.fileno(), 8192)
file.truncate(0)
beyond[4096]
"""
    for what in ("sent", str(tmp_path / "short")):
        done = run(code, memory.spec, what)
        assert (done.returncode, done.stderr) == (-signal.SIGBUS, ""), what
    done = run("import faulthandler; faulthandler.enable()\n" + code, memory.spec, "sent")
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr


def test_system_calls_get_an_error_for_what_cannot_be_had(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["fail=page:17"], deadline=0) as found:
        reader, writer = os.pipe()
        with memoryview(found) as view, pytest.raises(OSError):
            os.write(writer, view[17 * PAGE : 18 * PAGE])
        os.close(reader)
        os.close(writer)
        statistics = found.statistics()
        assert (statistics["failures"], statistics["lost_pages"]) == (1, 1)
        assert any("fail=page:17" in report for report in statistics["engine"]["reports"])


def test_a_report_waits_for_no_pipe(memory: Memory) -> None:
    """A thread that writes a lost page into a pipe holds the pipe while it waits. If somebody
    reported into the same pipe before it is served, both would wait for ever."""
    code = """
found = pagekit.map(sys.argv[1], layers=["fail=page:17"], deadline=0)
reader, writer = os.pipe()
os.dup2(writer, 2)
try:
    os.write(writer, memoryview(found)[17 * 4096 : 18 * 4096])
except OSError as error:
    print(error.errno)
"""
    done = run(code, memory.spec)
    assert done.returncode == 0 and done.stdout.strip() in ("14", "133"), done


# Pages that a function makes


def test_a_function_as_the_source() -> None:
    size = 300 * PAGE
    with pagekit.map(callbacks.numbered, size=size) as found:
        view = memoryview(found)
        assert view[299 * PAGE : 299 * PAGE + 8] == callbacks.page(299)[:8]
        assert found[:] == b"".join(map(callbacks.page, range(300)))
        view.release()
    with pytest.raises(UsageError, match="a size"):
        pagekit.map(callbacks.numbered)


def test_what_a_function_raises_is_the_cause() -> None:
    with pagekit.map(callbacks.raising, size=8 * PAGE, deadline=0) as found:
        with pytest.raises(CallbackError) as raised:
            found[0]
        assert isinstance(raised.value.__cause__, ValueError)
        assert found[7 * PAGE] == callbacks.page(7)[0]


def test_a_function_that_waits_for_its_own_map_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEKIT_TEST_MAP", str(tmp_path / "socket"))
    spec = f"python:callbacks:of_the_map_itself:{64 * PAGE},timeout=1s"
    with socket.socket(socket.AF_UNIX) as door, pagekit.map(spec) as found:
        door.bind(str(tmp_path / "socket"))
        door.listen()
        said: list[BaseException] = []

        def answer() -> None:
            visitor, _ = door.accept()
            with visitor, visitor.makefile("rb") as asked:
                offset, length = map(int, asked.readline().split())
                try:
                    visitor.sendall(found[offset : offset + length])
                except SourceTimeout as error:
                    said.append(error)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(SourceTimeout):
            found[5 * PAGE]
        answering.join()
        assert len(said) == 1


# Closing


def test_views_outlive_closing(memory: Memory) -> None:
    found = pagekit.map(memory.spec, layers=["delay=100us"])
    view = memoryview(found)
    half = view[256 * PAGE :]
    found.close()
    found.close()
    view.release()
    assert found.closed and "closed" in repr(found)
    for page in range(256, 512, 7):
        assert half[(page - 256) * PAGE] == expected(memory, page)[0]
    for use in (
        lambda: found[0],
        lambda: found[0:5],
        lambda: memoryview(found),
        lambda: found.find(b"a"),
        lambda: found.will_need(0, 5),
        found.populate,
        found.statistics,
        lambda: bytes(found),
    ):
        with pytest.raises(UsageError, match="closed"):
            use()
    assert len(found) == memory.size
    half.release()


def mapped_ranges() -> str:
    return Path("/proc/self/maps").read_text()


def test_the_last_view_unmaps_it(memory: Memory) -> None:
    found = pagekit.map(memory.spec, writable=True)
    view = memoryview(found)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    gc.collect()
    mark = f"{address:x}-"
    assert mark in mapped_ranges()
    del found
    gc.collect()
    assert mark in mapped_ranges() and view[3 * PAGE] == page_content(3)[0]
    view.release()
    gc.collect()
    assert mark not in mapped_ranges()


@pytest.mark.parametrize("faults", WAYS)
def test_closing_under_load(memory: Memory, faults: Any) -> None:
    template = pagekit.Template(memory.spec, layers=["delay=200us"])
    whole = memory.path.read_bytes()
    for _ in range(10):
        found = pagekit.map(template, faults=faults, writable=True)
        started = threading.Barrier(5)
        wrong: list[object] = []

        def use(
            number: int,
            found: pagekit.Map = found,
            started: threading.Barrier = started,
            wrong: list[object] = wrong,
        ) -> None:
            chosen = random.Random(number)
            view = memoryview(found)
            started.wait()
            try:
                while True:
                    at = chosen.randrange(memory.size - 9000)
                    if found[at : at + 9000] != whole[at : at + 9000]:
                        wrong.append(at)
            except UsageError:
                pass
            if view != whole:
                wrong.append("view")
            view.release()

        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        found.close()
        for thread in threads:
            thread.join()
        assert not wrong
    template.audit()
    template.close()


def test_a_template_may_be_closed_before_its_maps(memory: Memory) -> None:
    template = pagekit.Template(memory.spec)
    found = pagekit.map(template)
    template.close()
    assert found[:] == memory.path.read_bytes()
    found.close()


def test_the_end_of_the_interpreter(memory: Memory) -> None:
    done = run(
        """
import atexit, threading
found = pagekit.map(sys.argv[1], layers=["delay=1ms"])
view = memoryview(found)
found.will_need()
atexit.register(lambda: print(view[400 * 4096]))
threading.Thread(target=lambda: sum(view[::4096]), daemon=True).start()
""",
        memory.spec,
    )
    assert (done.returncode, done.stdout) == (0, f"{page_content(400)[0]}\n"), done.stderr


def test_what_cannot_be_meant(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no source"):
        pagekit.map(str(memory.path))
    with pytest.raises(SourceError):
        pagekit.map(f"file:{tmp_path / 'nothing'}")
    with pytest.raises(UsageError, match="is not understood"):
        pagekit.map(memory.spec, faults="now and then")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no pages of 8192 bytes"):
        pagekit.map(memory.spec, page_size=8192)
    with pytest.raises(UsageError, match="no huge pages"):
        pagekit.map(memory.spec, page_size=2 << 20, faults="signal")
    with pagekit.Template(memory.spec) as template, pytest.raises(UsageError, match="layers"):
        pagekit.map(template, layers=["stats"])
    with pagekit.map(memory.spec) as found:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=r"call pagekit\.map in the other process"):
                pickle.dumps(found, protocol)


# Children


def in_child(body: Any) -> int:
    """Runs ``body`` in a child of ``os.fork``, which goes the whole way to the end of its
    interpreter; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        faulthandler.disable()  # where a signal is wanted, it would only be noise
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("faults", WAYS)
def test_children_see_what_was_there_and_get_the_rest(memory: Memory, faults: Any) -> None:
    found = pagekit.map(memory.spec, layers=["delay=200us"], faults=faults, writable=True)
    view = memoryview(found)
    view[5] = 77
    whole = bytearray(memory.path.read_bytes())
    whole[5] = 77

    def child() -> None:
        assert view[5] == 77 and found.statistics()["faults"] == "parent"
        view[6] = 78
        found.will_need()
        assert in_child(grandchild) == 0
        found.populate()
        whole[6] = 78
        assert found[:] == whole and found.find(whole[-PAGE:]) == memory.size - PAGE
        # Maps of its own are its own.
        with pagekit.map(memory.spec, faults=faults) as mine:
            assert mine[:] == memory.path.read_bytes()
            assert mine.statistics()["faults"] == faults

    def grandchild() -> None:
        whole[6] = 78
        assert view[5] == 77 and view == whole
        assert os.write(os.pipe()[1], view[300 * PAGE : 301 * PAGE]) == PAGE

    assert in_child(child) == 0
    assert found[:] == memory.path.read_bytes()[:5] + b"\x4d" + memory.path.read_bytes()[6:]
    until(lambda: found.statistics()["children"] == 0, "children that are gone are forgotten")
    found.close()


def test_a_child_that_closes_the_map_is_not_served_any_more(memory: Memory) -> None:
    said, heard = os.pipe(), os.pipe()
    with pagekit.map(memory.spec) as found:
        pid = os.fork()
        if pid == 0:
            os.close(heard[1])  # so that it ends when the test does
            assert found[0] == page_content(0)[0]
            os.write(said[1], b"1")
            os.read(heard[0], 1)
            found.close()
            os.write(said[1], b"2")
            os.read(heard[0], 1)
            os._exit(0)
        try:
            os.read(said[0], 1)
            until(lambda: found.statistics()["children"] == 1, "the child is served")
            os.write(heard[1], b"1")
            os.read(said[0], 1)
            until(lambda: found.statistics()["children"] == 0, "nobody has it any more")
            assert found[299 * PAGE] == page_content(299)[0]
        finally:
            os.close(heard[1])
            assert os.waitpid(pid, 0)[1] == 0
    for number in (*said, heard[0]):
        os.close(number)


def test_a_child_may_end_as_any_process_does(memory: Memory) -> None:
    """With all its objects, which are not its own, and are not taken apart there."""
    done = run(
        """
import gc
template = pagekit.Template(sys.argv[1], layers=["delay=1ms"])
server = pagekit.Server(template, sys.argv[2])
found = pagekit.map(template, writable=True)
views = [memoryview(found) for _ in range(3)]
found.will_need()
pid = os.fork()
if pid == 0:
    assert views[0][9 * 4096]
    for use in (lambda: template.read(0, 1), server.statistics):
        try:
            use()
        except pagekit.errors.UsageError as error:
            assert "made by the process" in str(error), error
        else:
            raise AssertionError("it worked")
    server.close(), template.close(), found.close()
    del views[1:], template, server
    gc.collect()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists(sys.argv[2]))
print(views[0][10 * 4096])
template.audit()
server.close()
""",
        memory.spec,
        memory.path.with_name("socket"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"7 True\n{page_content(10)[0]}\n"


def digest_of(view: Any) -> str:
    return hashlib.sha256(view).hexdigest()


def digest_of_its_own(spec: str) -> str:
    with pagekit.map(spec) as found:
        return digest_of(found)


SHARED: dict[str, Any] = {}


def digest_of_the_shared() -> str:
    return digest_of(SHARED["map"])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(memory: Memory, method: str) -> None:
    context = multiprocessing.get_context(method)
    with pagekit.map(memory.spec, layers=["delay=200us"]) as found:
        if method == "fork":
            SHARED["map"] = found
            with context.Pool(3) as pool:
                results = [pool.apply_async(digest_of_the_shared) for _ in range(9)]
                assert {result.get(support.PATIENCE) for result in results} == {memory.digest()}
            SHARED.clear()
        else:
            # They inherit nothing, and a map cannot be passed.
            with pytest.raises(TypeError, match="cannot be pickled"):
                context.Process(target=digest_of, args=(found,)).start()
            with context.Pool(2) as pool:
                results = pool.map(digest_of_its_own, [memory.spec] * 4)
                assert set(results) == {memory.digest()}


@pytest.mark.parametrize("how", [{}, {"close_fds": False}, {"preexec_fn": os.getpid}])
def test_programs_that_are_started_meanwhile(memory: Memory, how: dict[str, Any]) -> None:
    with pagekit.map(memory.spec, layers=["delay=200us"]) as found:
        view = memoryview(found)
        for page in range(0, 60, 20):
            done = subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, **how)
            assert done.stdout == b"3\n"
            assert view[page * PAGE] == page_content(page)[0]
        view.release()


def test_children_while_many_threads_touch(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["delay=300us"], writable=True) as found:
        view = memoryview(found)
        whole = memory.path.read_bytes()
        with ThreadPoolExecutor(3) as pool:
            results = [
                pool.submit(lambda at: hashlib.sha256(view[at:]).digest(), at)
                for at in range(0, 300 * PAGE, 50 * PAGE)
            ]
            for _ in range(5):
                assert in_child(lambda: view[17 * PAGE :] == whole[17 * PAGE :] or 1 / 0) == 0
            for at, result in zip(range(0, 300 * PAGE, 50 * PAGE), results, strict=True):
                assert result.result() == hashlib.sha256(whole[at:]).digest()
        view.release()


ORPHAN = """
import json, signal, subprocess
found = pagekit.map(sys.argv[1], writable=True)
view = memoryview(found)
view[0] = 5
assert view[140 * 4096]
report, gone = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(gone[1])
    os.read(gone[0], 1)  # until the process that made the map has ended
    # What was there is there, and the rest is lost, loudly.
    kept = [view[0], view[140 * 4096], view[70 * 4096]]
    while True:
        try:
            found[200 * 4096]
        except pagekit.errors.SourceError as error:
            break
    os.dup2(report[1], 2)
    print(json.dumps(kept), file=sys.stderr, flush=True)
    view[201 * 4096]
    print("zeros?", file=sys.stderr)
    os._exit(0)
"""


HEAR = """
# The process that made the map ends with this; what its child says is heard by the next program.
os.set_inheritable(report[0], True)
os.close(report[1])
hear = "import os, sys; sys.stdout.write(os.fdopen(int(sys.argv[1])).read())"
os.execv(sys.executable, [sys.executable, "-c", hear, str(report[0])])
"""


def test_orphans_lose_what_is_missing_and_keep_the_rest(memory: Memory) -> None:
    done = run(ORPHAN + HEAR, memory.spec)
    assert done.returncode == 0, done.stderr
    kept, said = done.stdout.split("\n", 1)
    assert json.loads(kept) == [5, page_content(140)[0], 0]
    assert "page 201 (at 0x" in said and "the process that served it is gone" in said
    assert "zeros?" not in said


def test_a_daemon_that_closes_all_descriptors(memory: Memory) -> None:
    with pagekit.map(memory.spec, layers=["delay=200us"]) as found:
        view = memoryview(found)

        def child() -> None:
            os.closerange(3, 4096)
            assert view == memory.path.read_bytes()
            # Whose children it cannot announce any more.
            assert in_child(lambda: view[0]) in (-signal.SIGSEGV, -signal.SIGBUS, 0)

        assert in_child(child) == 0
        view.release()


def test_a_bare_clone_does_not_have_it(memory: Memory) -> None:
    code = """
import ctypes, signal
found = pagekit.map(sys.argv[1])
view = memoryview(found)
assert view[0]
libc = ctypes.CDLL(None, use_errno=True)
pid = libc.syscall(56, signal.SIGCHLD, 0, 0, 0, 0)
if pid == 0:
    try:
        found[0]
    except pagekit.errors.UsageError:
        view[int(sys.argv[2]) * 4096]
    os._exit(0)
print(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    for page in (0, 200, 70):
        done = run(code, memory.spec, page)
        assert done.stdout == f"{int(signal.SIGSEGV)}\n", done


def test_a_child_whose_memory_cannot_be_registered_has_no_map(memory: Memory) -> None:
    """For want of descriptors, for example."""
    done = run(
        """
import resource
found = pagekit.map(sys.argv[1])
view = memoryview(found)
assert view[0]
first = os.dup(0)
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (first, limit[1]))
pid = os.fork()
if pid == 0:
    try:
        found[0]
    except pagekit.errors.UsageError as error:
        print(error, flush=True)
        view[0]
    os._exit(0)
print(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""",
        memory.spec,
    )
    said, status = done.stdout.splitlines()
    assert said.startswith("the map is not in this process:"), done
    assert int(status) == signal.SIGSEGV


# Huge pages


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    need_root()
    knob = Path("/proc/sys/vm/nr_hugepages")
    before = knob.read_text()
    knob.write_text(str(int(before) + count))
    try:
        have = int(knob.read_text())
        need("huge pages", have >= int(before) + count, "the kernel finds no room for them")
        yield
    finally:
        knob.write_text(before)


def test_huge_pages(tmp_path: Path) -> None:
    memory = make_memory(tmp_path, pages=1536, holes=((100, 200), (512, 1024)))
    whole = memory.path.read_bytes()
    with huge_pages(4):
        with pagekit.map(
            memory.spec, page_size=2 << 20, writable=True, layers=["delay=100us"]
        ) as found:
            assert found.statistics()["page_size"] == 2 << 20
            assert memoryview(found)[1030 * PAGE] == page_content(1030)[0]
            found[3] = 9
            assert found[:] == whole[:3] + b"\x09" + whole[4:]
            # Not in children, and no other memory is there either.
            assert in_child(lambda: found[0]) == 1
            assert in_child(lambda: memoryview(found)[0]) == 1
            view = memoryview(found)
            assert in_child(lambda: view[0]) == -signal.SIGSEGV
            view.release()
        with (
            pagekit.map(memory.spec, page_size=2 << 20, layers=["fail=page:700"]) as found,
            pagekit.map(memory.spec, page_size=PAGE) as other,
        ):
            assert found[:] == other[:] == whole, "a page that is zero by the map is not read"
    with pytest.raises(pagekit.errors.Unsupported, match="no 32768 free huge pages"):
        pagekit.map("zero:64G", page_size=2 << 20)
    with pytest.raises(UsageError, match="whole huge pages"):
        pagekit.map("zero:4100K", page_size=2 << 20)


# Other users


@contextmanager
def sysctl(knob: str) -> Iterator[None]:
    need_root()
    before = SYSCTL.read_text()
    SYSCTL.write_text(knob)
    try:
        yield
    finally:
        SYSCTL.write_text(before)


# What a program needs that only root can read is read before it is another user's.
BECOME_NOBODY = f"""
import ctypes, json, pagekit.mapping, pagekit._core
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its /proc/self is its own
"""

UNPRIVILEGED = """
found = pagekit.map(sys.argv[1], faults=sys.argv[2], writable=True)
view = memoryview(found)
whole = open(sys.argv[1][5:], "rb").read()
result = {key: found.statistics()[key] for key in ("faults", "kernel_faults", "reason")}
reader, writer = os.pipe()
try:
    result["written"] = os.write(writer, view[200 * 4096 : 201 * 4096])
except OSError as error:
    result["written"] = error.errno
assert view[300 * 4096 - 5] == whole[300 * 4096 - 5]
view[7] = 7
pid = os.fork()
if pid == 0:
    os._exit(0 if view[8:] == whole[8:] and view[7] == 7 and found[9:] == whole[9:] else 1)
assert os.waitpid(pid, 0)[1] == 0
found.populate()
assert view[8:] == whole[8:]
os.read(reader, 4096) if result["written"] == 4096 else None
assert os.write(writer, view[200 * 4096 : 201 * 4096]) == 4096
print(json.dumps(result))
"""


def run_as_nobody(code: str, *arguments: object, prefix: Any = ()) -> Any:
    done = run(BECOME_NOBODY + code, *arguments, prefix=prefix)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def public(memory: Memory) -> Memory:
    """A memory file that everybody can reach."""
    directory = memory.path.parent
    while (
        directory != directory.parent and directory.owner() == "root" and directory != Path("/tmp")
    ):
        directory.chmod(0o755)
        directory = directory.parent
    return memory


@pytest.mark.parametrize("faults", WAYS)
def test_users_without_any_right(public: Memory, faults: str) -> None:
    with sysctl("0"):
        result = run_as_nobody(UNPRIVILEGED, public.spec, faults)
    assert result["faults"] == faults and result["kernel_faults"] is False
    assert result["written"] == 14, "EFAULT"
    if faults == "thread":
        assert "user mode" in result["reason"]


def test_users_with_a_right(public: Memory) -> None:
    with sysctl("1"):
        result = run_as_nobody(UNPRIVILEGED, public.spec, "auto")
    assert result == {
        "faults": "thread",
        "kernel_faults": True,
        "reason": None,
        "written": PAGE,
    }


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_without_any_userfaultfd(public: Memory, error: str) -> None:
    """A filter refuses it, as in many containers."""
    with sysctl("0"):
        prefix = [str(support.program("filter")), error]
        result = run_as_nobody(UNPRIVILEGED, public.spec, "auto", prefix=prefix)
        assert result["faults"] == "loaded" and "no userfaultfd" in result["reason"]
        assert result["written"] == PAGE
        refused = """
try:
    pagekit.map(sys.argv[1], faults="thread")
except pagekit.errors.PermissionDenied as error:
    print(json.dumps([str(error), error.hint]))
"""
        message, hint = run_as_nobody(refused, public.spec, prefix=prefix)
        assert "userfaultfd" in message and hint
