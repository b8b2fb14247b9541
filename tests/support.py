"""What the tests share: memory files, programs that map them, servers, and the reason of a skip."""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

import pagekit
from pagekit.client import server_program, shim_path

PAGE = 4096
PROGRAMS = Path(__file__).parent / "programs"
UNAVAILABLE = 69
NOBODY = 65534
PATIENCE = 60.0
"""Seconds after which something that must happen has not."""

# What a machine that is said to run the whole suite has.
REQUIRED = {"userfaultfd", "fuse", "root", "cc", "setpriv", "prlimit"}


def need(name: str, condition: object, reason: str) -> None:
    """Skips a test that lacks ``name``, saying why. With PAGEKIT_STRICT=1 it fails instead, if that
    is something this machine was said to have."""
    if condition:
        return
    if name in REQUIRED and os.environ.get("PAGEKIT_STRICT") == "1":
        pytest.fail(f"{name} is required here: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def need_root() -> None:
    need("root", os.geteuid() == 0, "needs to become other users and to set kernel knobs")


def need_userfaultfd() -> None:
    way = None
    if sys.platform == "linux":
        from pagekit import _core

        way = _core.probe()[0]
    need("userfaultfd", way, "this process can have no userfaultfd; see `pagekit doctor`")


def need_fuse() -> None:
    able = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    need("fuse", able, "needs to mount a file system in user space")


@functools.cache
def program(name: str) -> Path:
    """tests/programs/NAME.c, compiled once."""
    compiler = shutil.which("cc")
    need("cc", compiler, "no C compiler")
    assert compiler is not None
    binary = _programs() / name
    subprocess.run(
        [compiler, "-O2", "-Wall", "-pthread", "-o", binary, PROGRAMS / f"{name}.c"], check=True
    )
    return binary


@functools.cache
def _programs() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="pk-test-programs-"))
    directory.chmod(0o755)
    atexit.register(shutil.rmtree, directory)
    return directory


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Looks again and again until ``condition`` holds, for states that announce themselves to
    nobody; gives its value."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.002)
    return value


# Memory files


@dataclass(frozen=True)
class Memory:
    """A memory file whose pages are all different, except those of its holes."""

    path: Path
    pages: int
    holes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return self.pages * PAGE

    @property
    def spec(self) -> str:
        return f"file:{self.path}"

    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def stub(self, name: str = "stub", size: int | None = None) -> Path:
        """A file for one program to map. Anybody may write it."""
        path = self.path.with_name(name)
        with path.open("wb") as file:
            file.truncate(self.size if size is None else size)
        path.chmod(0o666)
        return path


def page_content(number: int) -> bytes:
    """A page that is unlike every other, and nowhere zero."""
    word = (number * 0x9E3779B97F4A7C15 + 0x123456789ABCDEF) & (1 << 64) - 1
    return struct.pack("<Q", word | 0x0101010101010101) * (PAGE // 8)


def make_memory(
    directory: Path, pages: int = 512, holes: Sequence[tuple[int, int]] = ((64, 128), (300, 400))
) -> Memory:
    """A memory file in ``directory``; ``holes`` are runs of pages (start, end)."""
    memory = Memory(directory / "memory", pages, tuple(holes))
    with memory.path.open("wb") as file:
        file.truncate(memory.size)
        for page in range(pages):
            if not any(start <= page < end for start, end in holes):
                file.seek(page * PAGE)
                file.write(page_content(page))
    memory.path.chmod(0o644)
    return memory


# Programs that map them


def target_command(
    code: str, stub: Path, memory: Memory, *arguments: object, python: str = sys.executable
) -> list[str]:
    """A Python program that maps ``stub``: tests/programs/prelude.py, then ``code``."""
    prelude = (PROGRAMS / "prelude.py").read_text()
    return [
        *(python, "-I", "-S", "-c", f"{prelude}\n{code}"),
        *(str(stub), str(memory.path), *map(str, arguments)),
    ]


class Nobody:
    """Another user, with copies of what it may not reach where it is installed."""

    def __init__(self, directory: Path) -> None:
        need_root()
        self.who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        known = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
        found = next((python for python in known if self.may_run(python)), None)
        need("a Python for everybody", found, "only root can run the Python at hand")
        self.python = str(found)
        self.server = Path(shutil.copy(server_program(), directory))
        self.shim = Path(shutil.copy(shim_path(), directory))

    def may_run(self, python: str) -> bool:
        with suppress(OSError):
            return subprocess.run([python, "-c", ""], **self.who).returncode == 0  # type: ignore
        return False

    def run(self, daemon: Daemon, code: str, memory: Memory, status: int = 0) -> tuple[str, str]:
        """Runs a Python target as this user."""
        stub = memory.stub("nobodys")
        environment = daemon.environment(stub) | {"LD_PRELOAD": str(self.shim)}
        command = target_command(code, stub, memory, python=self.python)
        process = start(command, environment, **self.who)
        with stopping(process):
            return ended(process, status)


def ended(
    process: subprocess.Popen[str], status: int | None = 0, patience: float = PATIENCE
) -> tuple[str, str]:
    """Waits for a program to end, checks its status, and gives what it said."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"{process.args!r} hangs; it said: {out}{err}")
    if status is not None:
        assert process.returncode == status, f"status {process.returncode}: {out}{err}"
    return out, err


def start(command: Sequence[object], environment: Mapping[str, str], **more: Any) -> Any:
    """Starts a program with ``environment`` added to ours."""
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@contextmanager
def stopping(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens, these processes do not outlive the test."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()


WITNESS = """
start = map_file()
check(start, range(0, PAGES, 2))
say("half")
sys.stdin.readline()
check(start, range(PAGES))
say("all right")
"""


class Witness:
    """A target that was there before something bad happens, and must not notice it."""

    def __init__(self, environment: Mapping[str, str], memory: Memory, stub: Path) -> None:
        self.process = start(target_command(WITNESS, stub, memory), environment)

    def __enter__(self) -> Self:
        line = self.process.stdout.readline()
        assert line == "half\n", line + self.process.stderr.read()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with stopping(self.process):
            if error is None:
                self.process.stdin.write("\n")
                self.process.stdin.flush()
                assert ended(self.process)[0] == "all right\n"


# Servers


class Daemon:
    """The server program, ready; stopped with the context."""

    def __init__(
        self,
        spec: str,
        socket: Path | None,
        *options: object,
        prefix: Sequence[object] = (),
        program: Path | None = None,
        **more: Any,
    ) -> None:
        self.socket = socket
        command = [
            *prefix,
            program or server_program(),
            spec,
            *(["--socket", socket] if socket else []),
            "--json",
            *options,
        ]
        self.process = start(command, {}, **more)
        line = self.process.stdout.readline()
        if not line:
            out, err = ended(self.process, None)
            raise AssertionError(f"the server ended with {self.process.returncode}: {out}{err}")
        self.ready: dict[str, Any] = json.loads(line)

    def environment(self, stub: Path, backend: str = "auto") -> dict[str, str]:
        return {
            "LD_PRELOAD": str(shim_path()),
            "PAGEKIT_FILE": str(stub),
            "PAGEKIT_SOCKET": str(self.socket),
            "PAGEKIT_BACKEND": backend,
        }

    def stop(self) -> tuple[dict[str, Any], str]:
        """Ends it in peace; its last statistics, and what it said."""
        self.process.send_signal(signal.SIGTERM)
        out, err = ended(self.process)
        return json.loads(out), err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with stopping(self.process):
            pass


def refused(
    *arguments: object,
    prefix: Sequence[object] = (),
    program: Path | None = None,
    **more: Any,
) -> tuple[int, str]:
    """Runs the server program with arguments that it must refuse: its status, and what it said."""
    process = start([*prefix, program or server_program(), *arguments], {}, **more)
    with stopping(process):
        out, err = ended(process, None)
        assert out == "", out
        return process.returncode, err


@dataclass
class Served:
    """A memory file, its template and its server in this process."""

    memory: Memory
    template: pagekit.Template
    server: pagekit.Server
    backend: str

    def environment(self, stub: Path) -> dict[str, str]:
        return self.server.environment(stub, backend=self.backend)

    def start(self, code: str, *arguments: object, stub: Path | None = None, **more: Any) -> Any:
        """Starts a Python target."""
        stub = stub or self.memory.stub()
        command = target_command(code, stub, self.memory, *arguments)
        return start(command, self.environment(stub), **more)

    def run(self, code: str, *arguments: object, status: int = 0, **more: Any) -> tuple[str, str]:
        """Runs a Python target to its end: what it said."""
        process = self.start(code, *arguments, **more)
        with stopping(process):
            return ended(process, status)


@contextmanager
def serving(
    memory: Memory, backend: str = "share", *, layers: Sequence[str] = (), deadline: float = 5.0
) -> Iterator[Served]:
    """A server in this process. At its end no target may be left and the template must be whole."""
    need_userfaultfd()
    before = memory.digest()
    path = memory.path.with_name("socket")
    with (
        pagekit.Template(memory.spec, layers=layers, deadline=deadline) as template,
        pagekit.Server(template, path, backend=backend) as server,
    ):
        yield Served(memory, template, server, backend)
        assert server.wait(PATIENCE), server.statistics()["targets"]
        template.audit()
        assert memory.digest() == before
    assert not path.exists()


# The protocol, spoken by hand


class Client:
    """Speaks the shim's protocol (crates/pagekit/src/wire.rs)."""

    ATTACH, OFFER, REGION, READY, CHILD, HOLDER, REFUSAL = range(1, 8)

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))

    def send(
        self, body: bytes, descriptors: Sequence[int] = (), *, head: bytes = b"pgkt\1"
    ) -> None:
        socket.send_fds(self.socket, [head + body], list(descriptors))

    def receive(self) -> tuple[int, bytes, list[int]]:
        """Kind, body and descriptors of an answer; kind 0 when the connection is closed."""
        with suppress(ConnectionResetError):
            data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 17, 16)
            if data:
                assert data[:5] == b"pgkt\1", data[:5]
                return data[5], data[6:], descriptors
        return 0, b"", []

    def attach(self, length: int, wish: int = 0, offset: int = 0) -> tuple[int, bytes, list[int]]:
        self.send(struct.pack("=BBQQ", self.ATTACH, wish, offset, length))
        return self.receive()

    def region(self, start: int, descriptors: Sequence[int]) -> tuple[int, bytes, list[int]]:
        self.send(struct.pack("=BQQ", self.REGION, start, 0), descriptors)
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@contextmanager
def sysctl(name: str, value: str) -> Iterator[None]:
    """A kernel knob, turned for a while, and locked: there is one for all tests that run on
    this machine, the Rust tests' too."""
    need_root()
    path = Path("/proc/sys") / name.replace(".", "/")
    with path.open() as knob:
        fcntl.flock(knob, fcntl.LOCK_EX)
        before = path.read_text()
        path.write_text(value)
        try:
            yield
        finally:
            path.write_text(before)


@contextmanager
def reachable_directory() -> Iterator[Path]:
    """A short-named directory that other users can enter (pytest's own they cannot)."""
    with tempfile.TemporaryDirectory(prefix="pk-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
