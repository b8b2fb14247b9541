"""Memory as a mounted file, from Python and from the command line."""

from __future__ import annotations

import mmap
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import PAGE, Daemon, Memory, need_fuse, page_content, start, stopping

import pagekit
from pagekit.errors import AddressInUse, UsageError

PAGEKIT = [Path(sys.executable).with_name("pagekit")]


@pytest.fixture
def memory() -> Iterator[Memory]:
    need_fuse()
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


@pytest.fixture
def directory(memory: Memory) -> Path:
    path = memory.path.with_name("mounted")
    path.mkdir()
    return path


def expected(memory: Memory, page: int) -> bytes:
    hole = any(start <= page < end for start, end in memory.holes)
    return bytes(PAGE) if hole else page_content(page)


def checks(memory: Memory, path: Path) -> None:
    """Every page of a private mapping, touched from the end, is what it must be."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert len(mapped) == memory.size
        for page in reversed(range(memory.pages)):
            at = page * PAGE
            assert mapped[at : at + PAGE] == expected(memory, page), page
        mapped[:8] = b"my own!!"
    with path.open("rb") as file:
        assert file.read(8) == page_content(0)[:8]


def is_mounted(directory: Path) -> bool:
    return f" {directory} " in Path("/proc/self/mountinfo").read_text()


def test_the_file_is_the_memory_and_goes_with_the_server(memory: Memory, directory: Path) -> None:
    layers = ["stats"]
    with (
        pagekit.Template(memory.spec, layers=layers) as template,
        pagekit.Server(template, mount=directory) as server,
    ):
        assert server.mount_path == directory / "memory" and server.mount_plan == "cached"
        assert server.backend is None and server.socket is None
        assert "mount=" in repr(server)
        status = server.mount_path.stat()
        assert (stat.filemode(status.st_mode), status.st_size) == ("-r--------", memory.size)
        checks(memory, server.mount_path)
        fetches = server.statistics()["fetches"]
        checks(memory, server.mount_path)
        statistics = server.statistics()
        assert statistics["fetches"] == fetches, "the second reader costs the source nothing"
        assert statistics["mount"]["opens"] == 4 and statistics["mount"]["errors"] == 0
        with pytest.raises(UsageError, match="no socket"):
            server.environment("stub")
        with pytest.raises(OSError), server.mount_path.open("r+b"):
            pass
    assert not is_mounted(directory) and not list(directory.iterdir())


def test_a_local_file_passes_through(memory: Memory, directory: Path) -> None:
    with (
        pagekit.Template(memory.spec) as template,
        pagekit.Server(template, mount=pagekit.Mount(directory, name="ram", mode=0o444)) as server,
    ):
        assert server.mount_path == directory / "ram"
        assert server.mount_plan == "passthrough"
        checks(memory, server.mount_path)
        assert server.statistics()["fetches"] == 0


def test_it_serves_beside_a_socket(memory: Memory, directory: Path) -> None:
    support.need_userfaultfd()
    mount = pagekit.Mount(directory, passthrough="never")
    with (
        pagekit.Template(memory.spec) as template,
        pagekit.Server(
            template, memory.path.with_name("socket"), mount=mount, backend="share"
        ) as server,
    ):
        assert server.mount_path is not None
        checks(memory, server.mount_path)
        fetches = server.statistics()["fetches"]
        served = support.Served(memory, template, server, "share")
        out, _ = served.run("check(map_file(), range(PAGES))\nsay('right')")
        assert out == "right\n" and server.statistics()["fetches"] == fetches
        assert server.wait(60)


def test_a_working_set_is_recorded_exactly_and_pushed(memory: Memory, directory: Path) -> None:
    mount = pagekit.Mount(directory, passthrough="never")
    pages = [3, 4, 150, 499, 210]

    def touch(path: Path) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for page in pages:
                assert mapped[page * PAGE : page * PAGE + 8] == page_content(page)[:8]

    with pagekit.Template(memory.spec) as template:
        recording = template.record()
        with pagekit.Server(template, mount=mount) as server:
            assert server.mount_path is not None
            touch(server.mount_path)
        found = recording.finish()
    assert found.page_numbers() == set(pages)
    with (
        pagekit.Template(memory.spec, layers=["delay=1ms"]) as template,
        pagekit.Server(template, mount=mount) as server,
    ):
        assert server.mount_path is not None
        assert template.replay(found).wait(60)
        pushed = lambda: server.statistics()["mount"]["pushed_pages"]  # noqa: E731
        support.until(lambda: pushed() == len(pages), "the kernel has the pages")
        touch(server.mount_path)
        statistics = server.statistics()
        assert statistics["fetches"] == statistics["template"]["replay"]["requests"]


def test_places_that_cannot_be_mounted_on(memory: Memory, directory: Path) -> None:
    with pagekit.Template(memory.spec) as template:
        with pytest.raises(UsageError):
            pagekit.Server(template)
        with pytest.raises(UsageError, match="passthrough"):
            pagekit.Server(template, mount=pagekit.Mount(directory, passthrough="maybe"))
        with pytest.raises(UsageError):
            pagekit.Server(template, mount=pagekit.Mount(directory, name="a/b"))
        with pytest.raises(pagekit.errors.PagekitError, match="none"):
            pagekit.Server(template, mount=directory / "none")
        with pytest.raises(pagekit.errors.PagekitError):
            pagekit.Server(template, mount=memory.path)
        with pagekit.Server(template, mount=directory), pytest.raises(AddressInUse):
            pagekit.Server(template, mount=directory)
        assert not is_mounted(directory)


# The command line


def test_the_server_program_mounts_and_replaces_what_a_dead_one_left(
    memory: Memory, directory: Path
) -> None:
    socket = memory.path.with_name("socket")
    options = ["--mount", directory, "--passthrough", "never", "--backend", "plain"]
    with Daemon(memory.spec, socket, *options) as daemon:
        assert daemon.ready["mount"] == str(directory / "memory")
        checks(memory, directory / "memory")
        daemon.process.send_signal(signal.SIGKILL)
        support.ended(daemon.process, -signal.SIGKILL)
    assert is_mounted(directory)
    with pytest.raises(OSError):
        (directory / "memory").read_bytes()
    with Daemon(memory.spec, socket, *options) as daemon:
        checks(memory, directory / "memory")
        statistics, said = daemon.stop()
    assert statistics["mount"]["opens"] == 2 and "memory is file:" in said
    assert not is_mounted(directory)


def test_the_verb_mounts_until_it_is_interrupted(memory: Memory, directory: Path) -> None:
    command = [*PAGEKIT, "mount", memory.spec, directory, "--json"]
    process = start(command, {})
    assert isinstance(process, subprocess.Popen) and process.stdout is not None
    with stopping(process):
        assert '"ready":true' in process.stdout.readline()
        checks(memory, directory / "memory")
        process.send_signal(signal.SIGINT)
        support.ended(process)
    assert not is_mounted(directory)
