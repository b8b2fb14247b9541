"""The command line: `pagekit serve` and the server program behind it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import UNAVAILABLE, Daemon, Memory, need_userfaultfd, program, start, stopping

import pagekit
import pagekit.client

PAGEKIT = [Path(sys.executable).with_name("pagekit")]


@pytest.fixture
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


def serve(memory: Memory, *arguments: object) -> subprocess.Popen[str]:
    socket = memory.path.with_name("socket")
    process = start([*PAGEKIT, "serve", memory.spec, "--socket", socket, *arguments], {})
    assert isinstance(process, subprocess.Popen)
    return process


def left(memory: Memory) -> set[str]:
    """Files that were not there before."""
    return {path.name for path in memory.path.parent.iterdir()} - {"memory"}


@pytest.mark.parametrize("backend", ["share", "copy", "plain", "auto"])
def test_captive(memory: Memory, backend: str) -> None:
    command = ["--run", "--", program("toucher"), "{file}", memory.path, 2, "random", "both"]
    process = serve(memory, "--backend", backend, *command)
    with stopping(process):
        out, err = support.ended(process)
    assert out == f"pages {memory.pages} wrong 0\n"
    assert f"pagekit: backend {'plain' if backend == 'auto' else backend}: " in err
    assert "faults" in err.splitlines()[-1]
    assert not left(memory)


def test_captive_with_json(memory: Memory) -> None:
    need_userfaultfd()
    arguments = ["--backend", "share", "--layer", "stats", "--json"]
    process = serve(memory, *arguments, "--run", "--", "true")
    with stopping(process):
        out, _ = support.ended(process)
    first, last = (json.loads(line) for line in out.splitlines())
    assert first["ready"] is True and first["backend"] == "share"
    assert last["targets_ever"] == 0


@pytest.mark.parametrize("status", [0, 3, 200])
def test_captive_gives_the_status(memory: Memory, status: int) -> None:
    process = serve(memory, "--run", "--", "sh", "-c", f"exit {status}")
    with stopping(process):
        support.ended(process, status)
    assert not left(memory)


def test_captive_gives_the_signal(memory: Memory) -> None:
    process = serve(memory, "--run", "--", "sh", "-c", "kill -SEGV $$")
    with stopping(process):
        support.ended(process, 128 + signal.SIGSEGV)


def test_captive_of_nothing(memory: Memory) -> None:
    process = serve(memory, "--run", "--", "/no/such/program")
    with stopping(process):
        _, err = support.ended(process, 6)
    assert "error: cannot run /no/such/program: No such file" in err
    assert not left(memory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(memory: Memory, number: signal.Signals) -> None:
    """The command gets the signal, and nothing is left behind."""
    need_userfaultfd()
    code = "map_file(path=sys.argv[1])\nsay(os.getpid())\nsys.stdin.readline()"
    command = support.target_command(code, Path("{file}"), memory)
    process = serve(memory, "--backend", "share", "--run", "--", *command)
    with stopping(process):
        assert process.stdout is not None
        child = os.pidfd_open(int(process.stdout.readline()))
        process.send_signal(number)
        support.ended(process, 128 + number)
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(child, 0)
        os.close(child)
    assert not left(memory)


def test_killed(memory: Memory) -> None:
    """The command ends with the server, whatever happens to that."""
    need_userfaultfd()
    code = "map_file(path=sys.argv[1])\nlive_on()"
    command = support.target_command(code, Path("{file}"), memory)
    process = serve(memory, "--backend", "share", "--run", "--", *command)
    with stopping(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # Until the command has closed it too.
        _, err = process.communicate(timeout=support.PATIENCE)
        assert "is gone" in err and "ending" in err


def test_a_server_says_how_to_attach(memory: Memory) -> None:
    process = serve(memory)
    with stopping(process):
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        assert lines[0] == f"pagekit: serving {memory.spec} at {memory.path.with_name('socket')}\n"
        assert lines[1].startswith("pagekit: backend plain: the source is a local raw file")
        assert lines[2].startswith("hint: truncate -s SIZE stub; LD_PRELOAD=")
        process.send_signal(signal.SIGINT)
        support.ended(process)
    assert not left(memory)


def test_the_end_says_who_was_attached(memory: Memory) -> None:
    need_userfaultfd()
    stub = memory.stub()
    with Daemon(memory.spec, memory.path.with_name("socket"), "--backend", "share") as daemon:
        code = "map_file()\nlive_on()"
        command = support.target_command(code, stub, memory)
        process = start(command, daemon.environment(stub))
        with stopping(process):
            assert process.stdout.readline() == "ready\n"
            _, err = daemon.stop()
            assert "1 targets were still attached; they end now" in err
            support.ended(process, UNAVAILABLE)


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["serve"], 2, "Missing argument 'SPEC'"),
        (["serve", "zero:1M"], 2, "there is no way in"),
        (["serve", "zero:1M", "--socket", "s", "--run"], 2, "belong together"),
        (["serve", "zero:1M", "--socket", "s", "--", "true"], 2, "belong together"),
        (["serve", "file:/no/such/file", "--socket", "s"], 6, "No such file"),
        (["serve", "zero:1M", "--socket", "/no/s"], 3, "cannot listen at /no/s"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_wrong_use(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    process = start([*PAGEKIT, *arguments], {}, cwd=tmp_path)
    with stopping(process):
        out, err = support.ended(process, status)
    assert out == "" and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_versions_agree() -> None:
    for command in ([*PAGEKIT, "--version"], [pagekit.client.server_program(), "--version"]):
        process = start(command, {})
        with stopping(process):
            assert pagekit.__version__ in support.ended(process)[0]
