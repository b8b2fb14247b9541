"""pagekit.Template and pagekit.Server as Python sees them."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import support
from support import PAGE, Memory

import pagekit
from pagekit import errors


@pytest.fixture
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


@pytest.fixture
def template(memory: Memory) -> Iterator[pagekit.Template]:
    with pagekit.Template(memory.spec) as template:
        yield template
        template.audit()


def test_the_whole(memory: Memory, template: pagekit.Template) -> None:
    assert template.size == memory.size and template.page_size == PAGE
    assert hashlib.sha256(template.read(0, template.size)).hexdigest() == memory.digest()
    statistics = template.statistics()
    holes = sum(end - start for start, end in memory.holes)
    assert statistics["zero_pages"] == holes
    assert statistics["present_pages"] == memory.pages - holes
    assert statistics["bytes_read"] == (memory.pages - holes) * PAGE


@pytest.mark.parametrize(
    "offset, length",
    [(0, 0), (0, 1), (PAGE - 1, 2), (63 * PAGE + 7, 66 * PAGE), (512 * PAGE - 3, 3), (5, 300_000)],
)
def test_parts_of_any_alignment(
    memory: Memory, template: pagekit.Template, offset: int, length: int
) -> None:
    assert template.read(offset, length) == memory.path.read_bytes()[offset : offset + length]


@pytest.mark.parametrize("offset, length", [(512 * PAGE, 1), (0, 512 * PAGE + 1), (2**63, 2**62)])
def test_beyond_the_end(template: pagekit.Template, offset: int, length: int) -> None:
    with pytest.raises(errors.UsageError, match="beyond the template"):
        template.read(offset, length)


def test_nothing_is_read_before_it_is_asked_for(template: pagekit.Template) -> None:
    assert template.statistics()["fetches"] == 0
    template.read(0, 1)
    assert template.statistics()["fetches"] == 1
    template.read(1, 1)
    assert template.statistics()["fetches"] == 1


def test_load_brings_everything_once(template: pagekit.Template) -> None:
    template.load()
    before = template.statistics()
    assert before["present_pages"] + before["zero_pages"] == before["pages"]
    template.load()
    template.read(0, template.size)
    assert template.statistics()["fetches"] == before["fetches"]


def test_many_readers_fetch_each_page_once(memory: Memory) -> None:
    with pagekit.Template(memory.spec, layers=["stats", "delay=1ms"]) as template:
        begin = threading.Barrier(8)

        def read(_: int) -> str:
            begin.wait()
            return hashlib.sha256(template.read(0, template.size)).hexdigest()

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, range(8))) == {memory.digest()}
        holes = sum(end - start for start, end in memory.holes)
        statistics = template.statistics()
        assert statistics["stack"]["stats.bytes"] == (memory.pages - holes) * PAGE


def test_a_waiting_read_gives_up_the_gil(memory: Memory) -> None:
    with pagekit.Template(memory.spec, layers=["delay=200ms"]) as template:
        reader = threading.Thread(target=template.read, args=(0, 1))
        reader.start()
        turns = 0
        while reader.is_alive():
            turns += 1
        assert turns > 100


def test_failures(memory: Memory) -> None:
    with pagekit.Template(memory.spec, layers=["fail=3"]) as template:
        assert template.read(0, 8) == support.page_content(0)[:8]
        assert template.statistics()["failures"] == 3
    with pagekit.Template(memory.spec, layers=["fail=always"], deadline=0.05) as template:
        with pytest.raises(errors.Unavailable, match="layer fail=always failed") as raised:
            template.read(0, 1)
        assert raised.value.retryable and raised.value.exit_code == 6


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(PAGE * 100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, (0, 0))


@pytest.mark.parametrize("change", [cut, overwrite])
def test_a_changed_file_is_an_error(memory: Memory, change: Callable[[Path], None]) -> None:
    """For ever, and for everything that was not fetched before; never zeros, never a mixture."""
    with pagekit.Template(memory.spec) as template:
        template.read(10 * PAGE, 8)
        change(memory.path)
        assert template.read(10 * PAGE, 8) == support.page_content(10)[:8]
        for _ in range(2):
            with pytest.raises(errors.IntegrityError, match="was changed while it") as raised:
                template.read(450 * PAGE, 1)
        assert raised.value.exit_code == 7 and not raised.value.retryable


def test_zeros() -> None:
    with pagekit.Template("zero:1M") as template:
        assert template.read(0, 1 << 20) == bytes(1 << 20)
        assert template.statistics()["present_pages"] == 0


def test_closed(memory: Memory) -> None:
    template = pagekit.Template(memory.spec)
    template.close()
    template.close()
    for use in (lambda: template.read(0, 1), lambda: template.size, template.audit, template.load):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("deadline", [-1.0, float("nan"), float("inf")])
def test_absurd_deadlines(memory: Memory, deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        pagekit.Template(memory.spec, deadline=deadline)


def test_a_server_keeps_its_template(memory: Memory) -> None:
    """Closing the template is no reason for targets to read anything else."""
    support.need_userfaultfd()
    stub = memory.stub()
    template = pagekit.Template(memory.spec)
    with pagekit.Server(template, memory.path.with_name("socket"), backend="share") as server:
        template.close()
        command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
        process = support.start(command, server.environment(stub))
        with support.stopping(process):
            support.ended(process)


def test_two_servers_of_one_template(memory: Memory, template: pagekit.Template) -> None:
    """What one brought, the other need not fetch."""
    support.need_userfaultfd()
    stub = memory.stub()
    command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
    fetches = []
    with (
        pagekit.Server(template, memory.path.with_name("one"), backend="share") as one,
        pagekit.Server(template, memory.path.with_name("two"), backend="copy") as two,
    ):
        for server in (one, two):
            process = support.start(command, server.environment(stub, backend=server.backend))
            with support.stopping(process):
                support.ended(process)
            fetches.append(template.statistics()["fetches"])
    assert fetches[0] == fetches[1] > 0


def test_server_arguments(memory: Memory, template: pagekit.Template) -> None:
    path = memory.path.with_name("socket")
    with pytest.raises(errors.UsageError, match='"magic" names no backend'):
        pagekit.Server(template, path, backend="magic")
    with pagekit.Server(template, str(path)) as server:
        assert server.backend == "plain" and "local raw file" in server.reason
        assert str(path) in repr(server)
        assert server.environment("stub")["PAGEKIT_SOCKET"] == str(path)
        assert server.wait(1)
        server.close()
        server.close()
    assert not path.exists()


def test_relative_paths(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target may run in another directory."""
    support.need_userfaultfd()
    monkeypatch.chdir(memory.path.parent)
    memory.stub()
    code = "check(map_file(path=ARGUMENTS[0]), range(PAGES))"
    with (
        pagekit.Template("file:memory") as template,
        pagekit.Server(template, "socket", backend="share") as server,
    ):
        stub = memory.path.with_name("stub")
        command = support.target_command(code, stub, memory, stub)
        process = support.start(command, server.environment("stub"), cwd="/")
        with support.stopping(process):
            support.ended(process)
        assert server.statistics()["targets_ever"] == 1


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing works everywhere; what needs Linux says so."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(errors.Unsupported, match="on Linux only, and this is darwin") as raised:
        pagekit.Template("zero:1M")
    assert raised.value.hint and raised.value.exit_code == 3


def test_an_installation_without_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pagekit import client

    monkeypatch.setattr(client, "__file__", str(tmp_path / "client.py"))
    with pytest.raises(errors.Unsupported, match="is not installed") as raised:
        client.shim_path()
    assert raised.value.hint


def test_errors_are_what_callers_already_catch() -> None:
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.Missing, OSError)
    assert issubclass(errors.PermissionDenied, OSError)
