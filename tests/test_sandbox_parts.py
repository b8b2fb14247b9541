"""The small parts of the driver, each alone."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import support

from pagekit.errors import AgentError, SandboxError
from pagekit.sandbox import RunDirectory, machine, memory, sparse, warden
from pagekit.sandbox.agent import Agent
from pagekit.sandbox.channel import Channel, Closed, Malformed
from pagekit.sandbox.process import Child
from pagekit.sandbox.qmp import Qmp, QmpError
from pagekit.sandbox.rundir import sweep

PAGE = 4096


# Sparse files


def file_with(tmp_path: Path, name: str, pages: dict[int, bytes], count: int) -> Path:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(count * PAGE)
        for page, content in pages.items():
            file.seek(page * PAGE)
            file.write(content)
    return path


@pytest.mark.parametrize("seed", range(5))
def test_copying_makes_holes_of_zeros(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    pages = {
        page: dice.choice([bytes(PAGE), dice.randbytes(PAGE), bytes(PAGE - 1) + b"x"])
        for page in dice.sample(range(900), 300)
    }
    source = file_with(tmp_path, "source", pages, 900)
    target = tmp_path / "target"
    with source.open("rb") as read, target.open("w+b") as written:
        count = sparse.copy(read.fileno(), written.fileno(), drop_zeros=True)
        assert sparse.digest(written.fileno()) == hashlib.sha256(source.read_bytes()).hexdigest()
        held = {
            page
            for start, end in sparse.extents(written.fileno())
            for page in range(start // PAGE, end // PAGE)
        }
    assert target.read_bytes() == source.read_bytes()
    wanted = {page for page, content in pages.items() if any(content)}
    assert count == len(wanted) * PAGE
    assert held == wanted


def test_a_file_that_is_one_hole(tmp_path: Path) -> None:
    source = file_with(tmp_path, "source", {}, 10)
    with source.open("rb") as read, (tmp_path / "target").open("w+b") as written:
        assert sparse.copy(read.fileno(), written.fileno()) == 0
        assert os.fstat(written.fileno()).st_size == 10 * PAGE
        assert sparse.digest(written.fileno()) == hashlib.sha256(bytes(10 * PAGE)).hexdigest()


# Channels, QMP, the agent


@pytest.fixture
def pair() -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    return Channel(ours), theirs


def test_channel(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert channel.receive(timeout=1) == {"a": 1}
    with pytest.raises(TimeoutError):
        channel.receive(timeout=0.05)
    theirs.sendall(b": 2}\n[3]\n")
    assert channel.receive(timeout=1) == {"b": 2}
    with pytest.raises(Malformed, match=r"\[3\]"):
        channel.receive(timeout=1)
    theirs.sendall(b"\xff{\n")
    with pytest.raises(Malformed):
        channel.receive(timeout=1)
    with pytest.raises(TimeoutError):
        channel.send({"x": "y" * (4 << 20)}, timeout=0.05)
    theirs.close()
    with pytest.raises(Closed):
        channel.receive(timeout=1)
    with pytest.raises(Closed):
        channel.send({}, timeout=1)
    channel.close()


def test_qmp(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    qmp = Qmp(channel, timeout=0.2)
    assert theirs.recv(4096) == b'{"execute":"qmp_capabilities"}\n'
    theirs.sendall(b'{"QMP": {}}\n{"return": {}}\n{"event": "STOP"}\n{"return": 5}\n')
    theirs.sendall(b'{"event": "RESUME", "data": {"a": 1}}\n')
    assert qmp.execute("query-five", a_b=1) == 5
    assert theirs.recv(4096) == b'{"execute":"query-five","arguments":{"a-b":1}}\n'
    assert qmp.wait_event("RESUME", lambda data: data["a"] == 1, timeout=1) == {"a": 1}
    with pytest.raises(QmpError, match="did not answer stuck in time"):
        qmp.execute("stuck")
    theirs.sendall(b'{"return": {}}\n{"error": {"class": "GenericError", "desc": "no way"}}\n')
    with pytest.raises(QmpError, match="refused unwise: no way"):
        qmp.execute("unwise")
    theirs.close()
    with pytest.raises(QmpError, match="closed its monitor") as closed:
        qmp.execute("late")
    assert closed.value.closed
    qmp.close()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b'{"id": 7}\n{"id": 1}\n', "has no 'output'"),
        (b'{"id": null, "error": "bad request: what?"}\n', "could not read"),
        (b'{"id": 1, "error": "bad request: KeyError"}\n', "refused"),
        (b"Linux version 6\n", "protocol"),
    ],
)
def test_an_agent_that_talks_nonsense(
    said: bytes, error: str, pair: tuple[Channel, socket.socket]
) -> None:
    channel, theirs = pair
    theirs.sendall(said)
    with pytest.raises(AgentError, match=error):
        Agent(channel, "fork").ask("pass", 1)
    theirs.close()


# Run directories


def test_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RunDirectory() as run:
        assert run.path.parent == tmp_path
        assert run.path.stat().st_mode & 0o777 == 0o700
        (run.path / "file").write_text("x")
    assert not run.path.exists()
    run.close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(SandboxError, match="run directory") as error:
        RunDirectory()
    assert "TMPDIR" in (error.value.hint or "")


def test_sweeping(tmp_path: Path) -> None:
    for name in ("run-stale", "run-locked", "run-unmarked", "data"):
        (tmp_path / f"pagekit-{name}" / "sub").mkdir(parents=True)
    for name in ("run-stale", "run-locked", "data"):
        (tmp_path / f"pagekit-{name}" / ".pagekit-run").touch()
    (tmp_path / "pagekit-run-link").symlink_to(tmp_path / "pagekit-data")
    lock = os.open(tmp_path / "pagekit-run-locked", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert [path.name for path in sweep(tmp_path)] == ["pagekit-run-stale"]
    os.close(lock)
    assert [path.name for path in sweep(tmp_path)] == ["pagekit-run-locked"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"pagekit-run-unmarked", "pagekit-run-link", "pagekit-data"}


# Processes


def test_child(tmp_path: Path) -> None:
    code = "import signal; signal.pause()"
    child = Child([sys.executable, "-c", code], environment={}, fds=(), log=tmp_path / "log")
    assert child.wait(0.2) is None
    started = time.monotonic()
    child.kill()
    assert child.status == -signal.SIGKILL
    assert child.wait(10) == -signal.SIGKILL
    assert time.monotonic() - started < 5
    child.kill()
    child.send(signal.SIGTERM)


def test_what_a_child_said(tmp_path: Path) -> None:
    child = Child(
        ["/bin/sh", "-c", "echo $X; echo two >&2; exit 3"],
        environment={"X": "one"},
        fds=(),
        log=tmp_path / "log",
    )
    assert child.wait(10) == 3
    assert child.log() == "one\ntwo"
    child.kill()


# The warden

_OWNER = """
import os, sys, threading
from pathlib import Path
from pagekit.sandbox.process import Child

def child():
    return Child(["sleep", "600"], environment={}, fds=(), log=Path(sys.argv[1]) / "log")

def main(how):
    made = []
    thread = threading.Thread(target=lambda: made.append(child()))
    thread.start()
    thread.join()
    # A copy of this process that lives on must not keep the child alive.
    copy = os.fork()
    if not copy:
        other = child()
        print(os.getpid(), other.pid, flush=True)
        threading.Event().wait()
    print(os.getpid(), made[0].pid, flush=True)
    if how == "exit":
        sys.exit()
    threading.Event().wait()

main(sys.argv[2])
"""


def alive(pid: int) -> bool:
    """Whether it has not ended, as a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["killed", "exit"])
def test_children_end_with_their_owner_and_no_other(how: str, tmp_path: Path) -> None:
    """Made by a thread that has ended since; their owner has a forked copy, which lives on."""
    process = support.start([sys.executable, "-c", _OWNER, tmp_path, how], {})
    with support.stopping(process):
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(2)]
        children = {int(owner): int(child) for owner, child in lines}
        mine = children.pop(process.pid)
        ((copy, its),) = children.items()
        try:
            if how == "killed":
                assert alive(mine)
                process.kill()
            process.wait(support.PATIENCE)
            support.until(lambda: not alive(mine), "the child ends")
            assert alive(copy)
            assert alive(its)
        finally:
            os.kill(copy, signal.SIGKILL)
        support.until(lambda: not alive(its), "the child of the copy ends")


def test_a_warden_that_died(tmp_path: Path) -> None:
    def child() -> Child:
        return Child(["sleep", "600"], environment={}, fds=(), log=tmp_path / "log")

    first = child()
    group = os.getpgid(first.pid)
    assert group == warden.group() != os.getpgid(0)
    os.kill(group, signal.SIGKILL)
    support.until(lambda: not alive(group), "it died")
    second = child()
    assert os.getpgid(second.pid) == warden.group() != group
    for one in (first, second):
        assert alive(one.pid)
        one.kill()


# Arguments


def test_filling_in_arguments() -> None:
    values = {"memory": "/a,b", "share": "off"}
    given = ("x={memory},share={share}", '{"path":"{memory}"}', "{unknown}", "{other}{share}")
    assert machine.fill(given, values) == [
        "x=/a,,b,share=off",
        '{"path":"/a,b"}',
        "{unknown}",
        "{other}off",
    ]
    assert machine.fill(["{memory}"], {"memory": "{share}", "share": "on"}) == ["{share}"]


# Memory


def test_private_memory_of_a_range(tmp_path: Path) -> None:
    size = 64 * PAGE
    path = file_with(tmp_path, "file", {}, 64)  # the kernel joins anonymous neighbours
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped,
    ):
        pinned = ctypes.c_char.from_buffer(mapped)
        base = ctypes.addressof(pinned)
        del pinned
        assert memory.process_memory(os.getpid(), base, size).guest_kib == 0
        for page in range(0, size, 2 * PAGE):
            mapped[page] = 1
        counted = memory.process_memory(os.getpid(), base, size)
        assert counted.guest_kib == size // 2048
        assert counted.vmm_kib > 1000


def test_cached_pages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(256 << 10))
    assert memory.cached_kib(path) == 256
    (tmp_path / "empty").touch()
    assert memory.cached_kib(tmp_path / "empty") == 0
    assert memory.available_kib() > 0
    assert memory.proportional_kib([os.getpid()]) > 0


def test_memory_group() -> None:
    home = Path("/proc/self/cgroup").read_text()
    with memory.memory_group() as group:
        if group is None:
            pytest.skip("memory group: none can be made here")
        assert Path("/proc/self/cgroup").read_text() != home
        before = group.used_kib()
        taken = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, 32 << 20, PAGE):
            taken[page] = 1
        assert 30 << 10 < group.used_kib() - before < 40 << 10
        taken.close()
    assert Path("/proc/self/cgroup").read_text() == home


def test_no_memory_group_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    with memory.memory_group() as group:
        assert group is None
    assert not list(tmp_path.rglob("pagekit-*"))
