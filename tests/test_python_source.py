"""Sources of pages that a Python function makes, and all that such a function can do wrong."""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import callbacks
import pytest
import support
from callbacks import PAGE, page

import pagekit
from pagekit import errors
from pagekit.callback import spec_of

PAGES = 64
SIZE = PAGES * PAGE


def content(pages: int = PAGES) -> bytes:
    return b"".join(map(page, range(pages)))


def helper_of(template: pagekit.Template) -> list[Any]:
    """What :func:`callbacks.about_itself` says: process id, its parent's, path, executable."""
    said: list[Any] = ast.literal_eval(template.read(template.size - PAGE, PAGE).decode().strip())
    return said


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.fixture
def template() -> Iterator[pagekit.Template]:
    with pagekit.Template(callbacks.numbered, size=SIZE, layers=["stats"]) as template:
        yield template
        template.audit()


# What works


def test_the_whole(template: pagekit.Template) -> None:
    assert template.spec == f"python:callbacks:numbered:{SIZE}" and template.size == SIZE
    assert template.read(0, SIZE) == content()
    template.read(0, SIZE)
    counted = template.statistics()["stack"]
    assert counted["python.calls"] == counted["stats.reads"] <= PAGES // 16
    assert counted["python.restarts"] == 0


def test_parts_of_any_alignment(template: pagekit.Template) -> None:
    for offset, length in [(5, 1), (PAGE - 1, 2), (7, 40 * PAGE), (SIZE - 1, 1)]:
        assert template.read(offset, length) == content()[offset : offset + length]


@pytest.mark.parametrize(
    "function", [callbacks.buffers, callbacks.Group.numbered, callbacks.nested]
)
def test_whatever_has_a_buffer(function: Callable[[int, int], Any]) -> None:
    with pagekit.Template(function, size=16 * PAGE) as template:
        template.load(request=PAGE)
        assert template.read(0, 16 * PAGE) == content(16)


def test_none_is_zeros() -> None:
    with pagekit.Template("python:callbacks:nothing:64K") as template:
        assert template.read(0, template.size) == bytes(1 << 16)
        assert template.statistics()["bytes_read"] == 0


def test_many_readers_get_each_page_once() -> None:
    with pagekit.Template(callbacks.slow, size=SIZE, layers=["stats"]) as template:
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(lambda _: hashlib.sha256(template.read(0, SIZE)).digest(), range(8))
        assert set(digests) == {hashlib.sha256(content()).digest()}
        assert template.statistics()["stack"]["stats.bytes"] == SIZE


def test_a_size_that_is_huge() -> None:
    """Only what is asked for is ever made."""
    with pagekit.Template(callbacks.numbered, size=1 << 40) as template:
        assert template.read((1 << 40) - PAGE, PAGE) == page((1 << 28) - 1)
        assert template.statistics()["bytes_read"] <= 1 << 20


def test_targets_are_served(tmp_path: Path) -> None:
    support.need_userfaultfd()
    reference = tmp_path / "memory"
    reference.write_bytes(content())
    memory = support.Memory(reference, PAGES, ())
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PAGEKIT_PYTHON": sys.executable}
    spec = "python:callbacks:numbered:256K"
    for backend in ("share", "copy"):
        with support.reachable_directory() as directory:
            socket = directory / "socket"
            command = [support.server_program(), spec, "--socket", socket, "--backend", backend]
            server = support.start([*command, "--json"], environment)
            with support.stopping(server):
                assert server.stdout.readline(), server.stderr.read()
                stub = memory.stub()
                attach = {
                    "LD_PRELOAD": str(support.shim_path()),
                    "PAGEKIT_FILE": str(stub),
                    "PAGEKIT_SOCKET": str(socket),
                    "PAGEKIT_BACKEND": backend,
                }
                check = "check(map_file(), range(PAGES))"
                target = support.start(support.target_command(check, stub, memory), attach)
                with support.stopping(target):
                    support.ended(target)


def test_a_target_that_touches_a_page_that_fails_gets_sigbus(tmp_path: Path) -> None:
    support.need_userfaultfd()
    reference = tmp_path / "memory"
    reference.write_bytes(content(16))
    memory = support.Memory(reference, 16, ())
    stub = memory.stub()
    with (
        support.reachable_directory() as directory,
        pagekit.Template(callbacks.raising, size=16 * PAGE) as template,
        pagekit.Server(template, directory / "socket", backend="share") as server,
    ):
        code = "start = map_file(); check(start, [6]); say('fine'); page(start, 0)"
        command = support.target_command(code, stub, memory)
        target = support.start(command, server.environment(stub, backend="share"))
        with support.stopping(target):
            out, _ = support.ended(target, None)
        assert out == "fine\n" and target.returncode == -signal.SIGBUS
        reports = str(server.statistics()["reports"])
        assert "callback callbacks:raising for page 0: it raised ValueError" in reports, reports


# How a callback is named


def inner() -> Callable[[int, int], bytes]:
    def function(offset: int, length: int) -> bytes:
        return bytes(length)

    return function


@pytest.mark.parametrize(
    "function",
    [
        lambda offset, length: bytes(length),
        inner(),
        callbacks.Group().method,
        functools.partial(callbacks.numbered, 0),
        callbacks.Group(),
    ],
)
def test_callbacks_that_cannot_be_imported(function: Any) -> None:
    with pytest.raises(errors.UsageError, match="cannot be imported") as raised:
        pagekit.Template(function, size=PAGE)
    assert raised.value.hint and "top level" in raised.value.hint


def test_callbacks_of_the_program_itself(tmp_path: Path) -> None:
    """They can be imported if the program was started as a module."""
    program = tmp_path / "started.py"
    program.write_text(
        "import pagekit\n"
        "def function(offset, length): return bytes(length - 1) + b'!'\n"
        "if __name__ == '__main__':\n"
        "    print(pagekit.Template(function, size=4096).read(4095, 1))\n"
    )
    ended = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ended.returncode != 0 and "cannot be imported by a helper" in ended.stderr
    ended = subprocess.run(
        [sys.executable, "-m", "started"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ended.stdout == "b'!'\n", ended.stderr


def test_a_function_has_a_size_and_a_spec_has_its_own() -> None:
    for source, size in [(callbacks.numbered, None), ("zero:1M", 1 << 20)]:
        with pytest.raises(errors.UsageError, match="a function needs a size"):
            pagekit.Template(source, size=size)  # type: ignore[arg-type]
    assert spec_of(callbacks.numbered, PAGE, timeout=2).endswith(":4096,timeout=2s")
    for size in (0, -PAGE, 17):
        with pytest.raises(errors.UsageError, match="whole 4096-byte pages"):
            pagekit.Template(callbacks.numbered, size=size)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("no_such_module:function", "there is no module no_such_module"),
        ("callbacks.more:function", "there is no module callbacks.more"),
        ("callbacks:no_such_function", "module callbacks has no no_such_function"),
        ("callbacks:Group.other", "module callbacks has no Group.other"),
        ("callbacks:PAGE", "PAGE of module callbacks is an int, no function"),
    ],
)
def test_functions_that_are_not_there(name: str, expected: str) -> None:
    with pytest.raises(errors.UsageError, match=expected) as raised:
        pagekit.Template(f"python:{name}:64K")
    assert raised.value.hint and raised.value.exit_code == 2


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of some text, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str, name: str = "made_by_a_test") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_modules_that_raise(module: Callable[[str], str]) -> None:
    name = module("import no_such_module_either\n")
    with pytest.raises(errors.CallbackError, match="cannot be loaded: it raised ModuleN") as raised:
        pagekit.Template(f"python:{name}:function:64K")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    assert "import no_such_module_either" in raised.value.traceback
    assert "importlib" not in raised.value.traceback
    name = module("def function(:\n", "made_wrong")
    with pytest.raises(errors.CallbackError) as raised:
        pagekit.Template(f"python:{name}:function:64K")
    assert isinstance(raised.value.__cause__, SyntaxError)


def test_modules_that_end_the_process(module: Callable[[str], str]) -> None:
    name = module("import os; os._exit(9)")
    with pytest.raises(errors.UsageError, match="ended with status 9 before it had loaded it"):
        pagekit.Template(f"python:{name}:function:64K")


@pytest.mark.parametrize(
    "executable, expected",
    [("/no/such/python", "cannot run callbacks in"), ("/bin/false", "ended with status 1 before")],
)
def test_pythons_that_do_not_work(
    executable: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(errors.UsageError, match=expected) as raised:
        pagekit.Template("python:callbacks:numbered:64K")
    assert raised.value.hint and "PAGEKIT_PYTHON" in raised.value.hint


def test_the_helper_finds_what_we_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Callable[[str], str]
) -> None:
    """In our Python, from our path, also after a change of directory."""
    name = module("from callbacks import about_itself\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])
    with pagekit.Template(f"python:{name}:about_itself:4K") as template:
        monkeypatch.chdir("/")
        _, parent, path, executable, variable = helper_of(template)
    assert parent == os.getpid() and executable == sys.executable
    assert [os.path.normpath(entry) for entry in path] == [str(tmp_path), *sys.path[1:]]
    assert variable == os.environ.get("PYTHONPATH")


# Exceptions


@pytest.fixture
def raising() -> Iterator[pagekit.Template]:
    with pagekit.Template(callbacks.raising, size=8 * PAGE) as template:
        yield template
        assert template.read(7 * PAGE, PAGE) == page(7)


def test_an_exception_reaches_the_reader(raising: pagekit.Template) -> None:
    for _ in range(2):
        with pytest.raises(errors.CallbackError) as raised:
            raising.read(17, 1)
    error = raised.value
    assert str(error) == (
        "callback callbacks:raising for page 0: it raised ValueError('no page here', 17)"
    )
    assert isinstance(error.__cause__, ValueError) and error.__cause__.args == ("no page here", 17)
    assert error.traceback.startswith("Traceback (most recent call last):\n")
    assert 'callbacks.py", line' in error.traceback and "in raising" in error.traceback
    assert 'pagekit/callback.py"' not in error.traceback
    assert not error.retryable and error.exit_code == 6 and isinstance(error, OSError)
    assert raising.statistics()["stack"]["python.restarts"] == 0


@pytest.mark.parametrize(
    "number, kind, text",
    [
        (1, RuntimeError, "Unpicklable('onetwo')"),
        (2, callbacks.Unprintable, "an Unprintable that cannot be printed"),
        (3, SystemExit, "SystemExit(5)"),
        (4, FileNotFoundError, "No such file"),
        (5, OSError, r"second \udcff"),
    ],
)
def test_exceptions_of_every_kind(
    raising: pagekit.Template, number: int, kind: type[BaseException], text: str
) -> None:
    with pytest.raises(errors.CallbackError) as raised:
        raising.read(number * PAGE, 1)
    assert text in str(raised.value)
    assert type(raised.value.__cause__) is kind
    if kind is RuntimeError:
        assert "Unpicklable('onetwo')" in str(raised.value.__cause__)


def test_an_exception_is_raised_once_a_page(raising: pagekit.Template) -> None:
    """Another try would bring the same: once for a window, once for the page waited for in it."""
    with pytest.raises(errors.CallbackError):
        raising.read(0, 1)
    assert raising.statistics()["failures"] == 2


def test_loading_stops_at_an_exception(raising: pagekit.Template) -> None:
    with pytest.raises(errors.CallbackError):
        raising.load()


@pytest.mark.parametrize(
    "number, expected",
    [
        (0, "it returned too few bytes: 4095 instead of 4096"),
        (1, "it returned too many bytes: 4097 instead of 4096"),
        (2, "it returned too few bytes: 0 instead of 4096"),
        (3, "it returned a str, where bytes or None belong"),
        (4, "it returned an int, where bytes or None belong"),
        (5, "it returned a list, where bytes or None belong"),
        (6, "it returned a generator, where bytes or None belong"),
    ],
)
def test_what_is_returned_must_be_what_was_asked_for(number: int, expected: str) -> None:
    with (
        pagekit.Template(callbacks.wrong, size=8 * PAGE) as template,
        pytest.raises(errors.CallbackError) as raised,
    ):
        template.read(number * PAGE, 1)
    assert str(raised.value) == f"callback callbacks:wrong for page {number}: {expected}"
    assert raised.value.__cause__ is None and raised.value.traceback == ""


# Time


@pytest.mark.parametrize("function", [callbacks.hanging, callbacks.hanging_with_the_gil])
def test_one_that_hangs(function: Callable[[int, int], bytes]) -> None:
    spec = spec_of(function, SIZE, timeout=1)
    with pagekit.Template(spec) as template:
        with pytest.raises(TimeoutError) as raised:
            template.read(PAGE, PAGE)
        assert isinstance(raised.value, errors.SourceTimeout)
        assert "for page 1 did not return in 1s" in str(raised.value)
        assert raised.value.hint and "timeout=60s" in raised.value.hint
        assert not raised.value.retryable and raised.value.exit_code == 6
        # Its neighbours are not taken along, and need not wait for it again.
        assert template.read(2 * PAGE, PAGE) == page(2)
        assert template.statistics()["stack"]["python.restarts"] == 2


def test_one_that_hangs_does_not_stop_other_python_threads() -> None:
    with pagekit.Template(spec_of(callbacks.hanging, SIZE, timeout=0.4)) as template:
        failed: list[BaseException] = []

        def read() -> None:
            try:
                template.read(PAGE, 1)
            except errors.SourceTimeout as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        turns = 0
        while reader.is_alive():
            turns += 1
        assert turns > 100 and failed


def test_one_that_reads_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for itself: that is noticed, and no deadlock."""
    support.need_fuse()
    with support.reachable_directory() as directory:
        mounted = directory / "mounted"
        mounted.mkdir()
        monkeypatch.setenv("PAGEKIT_TEST_FILE", str(mounted / "memory"))
        spec = spec_of(callbacks.reading_what_it_serves, SIZE, timeout=0.4)
        with pagekit.Template(spec) as template, pagekit.Server(template, mount=mounted) as server:
            with pytest.raises(errors.SourceTimeout):
                template.read(0, 1)
            assert server.mount_path
            with pytest.raises(OSError):
                server.mount_path.read_bytes()


def test_one_that_opens_what_it_serves() -> None:
    with (
        pagekit.Template(callbacks.recursive, size=16 * PAGE) as template,
        pytest.raises(errors.CallbackError, match="opens the source that it serves") as raised,
    ):
        template.read(0, 1)
    assert isinstance(raised.value.__cause__, errors.UsageError) and raised.value.__cause__.hint
    assert "recursive" in raised.value.traceback


# Life and death of the helper


def test_one_that_dies() -> None:
    with pagekit.Template(callbacks.dying, size=SIZE) as dying:
        for _ in range(2):
            with pytest.raises(errors.CallbackError, match="ended with status 7, as did the one"):
                dying.read(PAGE, 1)
        assert dying.read(2 * PAGE, 1) == page(2)[:1]


def test_one_that_is_killed_is_started_again() -> None:
    with pagekit.Template(callbacks.about_itself, size=4 << 20) as template:
        process = helper_of(template)[0]
        os.kill(process, signal.SIGKILL)
        template.read(0, 1)
        statistics = template.statistics()
        assert statistics["failures"] == statistics["stack"]["python.restarts"] == 1
        assert not alive(process)


def test_one_that_is_killed_when_there_is_no_time_left() -> None:
    with pagekit.Template(callbacks.about_itself, size=2 * PAGE, deadline=0) as template:
        process = helper_of(template)[0]
    assert not alive(process)
    with pagekit.Template(callbacks.dying, size=2 * PAGE, deadline=0) as template:
        assert template.read(0, 1) == page(0)[:1]
        with pytest.raises(errors.SourceError):
            template.read(PAGE, 1)


def test_an_interruption_is_not_meant_for_it() -> None:
    """Ctrl-C reaches the whole group. Who handles it may need pages to do so."""
    with pagekit.Template(callbacks.about_itself, size=4 << 20) as template:
        process = helper_of(template)[0]
        os.kill(process, signal.SIGINT)
        template.read(0, 1)
        assert template.statistics()["failures"] == 0 and alive(process)


def test_it_ends_with_its_template() -> None:
    template = pagekit.Template(callbacks.about_itself, size=4 << 20)
    process = helper_of(template)[0]
    assert alive(process)
    template.close()
    assert not alive(process)


ABANDONED = """
import callbacks, os, pagekit, sys, threading
template = pagekit.Template(getattr(callbacks, sys.argv[1]), size=16 << 12)
if sys.argv[1] == "about_itself":
    print(eval(template.read(4096, 4096).strip())[0], flush=True)
    if sys.argv[2:]:
        sys.stdin.read()
else:
    threading.Thread(target=template.read, args=(4096, 1)).start()
    print("reading", flush=True)
"""


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


@pytest.mark.parametrize("function", ["about_itself", "hanging", "hanging_with_the_gil"])
def test_it_ends_with_the_process_however_that_ends(function: str, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    command = [sys.executable, "-c", ABANDONED, function, "wait"]
    where = {"PYTHONPATH": str(Path(__file__).parent), "PAGEKIT_TEST_FILE": str(begun)}
    process = support.start(command, where)
    with support.stopping(process):
        assert process.stdout.readline(), process.stderr.read()
        if function != "about_itself":
            support.until(begun.exists, "a callback under way")
        (helper,) = children_of(process.pid)
        process.kill()
        support.until(lambda: not alive(helper), "the end of the helper")


def test_it_ends_with_an_interpreter_that_forgets_it() -> None:
    command = [sys.executable, "-c", ABANDONED, "about_itself"]
    process = support.start(command, {"PYTHONPATH": str(Path(__file__).parent)})
    with support.stopping(process):
        out, _ = support.ended(process)
    support.until(lambda: not alive(int(out)), "the end of the helper")


def test_what_it_prints_goes_to_standard_error() -> None:
    code = "import pagekit; print(len(pagekit.Template('python:callbacks:printing:4K').read(0, 9)))"
    process = support.start(
        [sys.executable, "-c", code], {"PYTHONPATH": str(Path(__file__).parent)}
    )
    with support.stopping(process):
        out, err = support.ended(process)
    assert out == "9\n" and err == "said by the callback\nit reads ''\n"


def test_a_forked_process_is_told_apart() -> None:
    """It has a copy of the socket, and must not get the answers of its parent."""
    code = """
import os, pagekit
template = pagekit.Template("python:callbacks:numbered:4M")
template.read(0, 1)
child = os.fork()
if child == 0:
    try:
        template.read(1 << 20, 1)
    except pagekit.errors.UsageError as error:
        print(error, flush=True)
    template.close()
    os._exit(0)
os.waitpid(child, 0)
print(template.read((4 << 20) - 4096, 4096) == (1024).to_bytes(8, "little") * 512)
"""
    process = support.start(
        [sys.executable, "-c", code], {"PYTHONPATH": str(Path(__file__).parent)}
    )
    with support.stopping(process):
        out, _ = support.ended(process)
    assert out.splitlines() == [
        "it was made by the process that this one was forked from, and works there only",
        "True",
    ]


def test_closing_while_a_callback_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads gets an answer; the helper ends with the last reader."""
    begun = tmp_path / "begun"
    monkeypatch.setenv("PAGEKIT_TEST_FILE", str(begun))
    others = set(children_of(os.getpid()))
    template = pagekit.Template(spec_of(callbacks.hanging, SIZE, timeout=0.4))
    failed = threading.Event()

    def read() -> None:
        try:
            template.read(PAGE, 1)
        except errors.SourceTimeout:
            failed.set()

    reader = threading.Thread(target=read)
    reader.start()
    support.until(begun.exists, "a callback under way")
    helpers = set(children_of(os.getpid())) - others
    template.close()
    reader.join(support.PATIENCE)
    assert failed.is_set() and helpers
    assert not helpers & set(children_of(os.getpid()))


# Through a map: whoever touches a page may hold the GIL


@pytest.mark.parametrize("faults", ["thread", "signal"])
def test_a_map_of_computed_pages(faults: Any) -> None:
    support.need_userfaultfd()
    with (
        pagekit.map(callbacks.numbered, size=SIZE, faults=faults) as memory,
        memoryview(memory) as view,
    ):
        for number in (PAGES - 1, 0, 17):
            assert view[number * PAGE] == (number + 1) % 256  # with the GIL
            assert memory[number * PAGE : (number + 1) * PAGE] == page(number)
        assert bytes(memory) == content()
        assert memory.find(page(40)[:9], PAGE) == 40 * PAGE


@pytest.mark.parametrize(
    "function, place, kind, text",
    [
        (callbacks.raising, 0, errors.CallbackError, "it raised ValueError('no page here', 17)"),
        (callbacks.wrong, 0, errors.CallbackError, "too few bytes: 4095 instead of 4096"),
        (callbacks.hanging, PAGE, errors.SourceTimeout, "for page 1 did not return in 1s"),
        (callbacks.dying, PAGE, errors.CallbackError, "ended with status 7, as did the one before"),
        (callbacks.recursive, 0, errors.CallbackError, "opens the source that it serves"),
    ],
)
def test_a_map_raises_what_went_wrong(
    function: Callable[[int, int], Any], place: int, kind: type[BaseException], text: str
) -> None:
    support.need_userfaultfd()
    with pagekit.map(spec_of(function, 16 * PAGE, timeout=1)) as memory:
        for use in (lambda: memory[place], lambda: memory[place : place + 9], memory.populate):
            with pytest.raises(kind) as raised:
                use()
            assert text in str(raised.value)
        if function is callbacks.raising:
            assert isinstance(raised.value.__cause__, ValueError)
            assert memory[7 * PAGE : 8 * PAGE] == page(7)


RAW = """
import callbacks, pagekit, sys
from pagekit.callback import spec_of
spec = spec_of(getattr(callbacks, sys.argv[1]), 16 << 12, timeout=1)
view = memoryview(pagekit.map(spec, faults=sys.argv[3]))
print(view[8 << 12], flush=True)
print(view[int(sys.argv[2])])
"""


@pytest.mark.parametrize("faults", ["thread", "signal"])
@pytest.mark.parametrize(
    "function, number, text",
    [
        ("raising", 0, "it raised ValueError('no page here', 17)"),
        ("hanging", 1, "did not return in 1s"),
        ("dying", 1, "ended with status 7"),
    ],
)
def test_a_raw_view_gets_sigbus_and_a_reason(
    function: str, number: int, text: str, faults: str
) -> None:
    support.need_userfaultfd()
    command = [sys.executable, "-c", RAW, function, number * PAGE, faults]
    process = support.start(command, {"PYTHONPATH": str(Path(__file__).parent)})
    with support.stopping(process):
        out, err = support.ended(process, -signal.SIGBUS)
    assert out == "9\n"
    assert f"page {number}" in err and text in err, err


@pytest.mark.parametrize(
    "function, kind",
    [
        (callbacks.touching, errors.SourceTimeout),
        (callbacks.peeking, errors.CallbackError),
    ],
)
def test_one_that_touches_the_map_it_serves(
    function: Callable[[int, int], Any],
    kind: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From outside, as it is another process: it waits for itself, or the kernel says no."""
    support.need_userfaultfd()
    place = tmp_path / "address"
    monkeypatch.setenv("PAGEKIT_TEST_FILE", str(place))
    with pagekit.map(spec_of(function, 16 * PAGE, timeout=1), writable=True) as memory:
        start = ctypes.c_char.from_buffer(memory)
        place.write_text(str(ctypes.addressof(start)))
        with pytest.raises(kind):
            memory[0]
        del start
