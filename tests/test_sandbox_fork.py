"""Forks of a frozen guest: right answers whatever the backing, all of them different, and what
happens when one dies."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import support

import pagekit
from pagekit.errors import (
    AgentError,
    BootFailed,
    CodeError,
    ForkDied,
    QemuMissing,
    SnapshotError,
    UsageError,
)
from pagekit.sandbox import (
    Backing,
    Eager,
    Fleet,
    Mounted,
    Plain,
    Qemu,
    Served,
    Snapshot,
    choose,
    mount_in,
)
from pagekit.sandbox.guest_agent import DATA_PAGES, PAGE_SIZE, data_page

SUM = f"result = sum(data[::{PAGE_SIZE}])"
RIGHT = str(sum(data_page(page)[0] for page in range(DATA_PAGES)))
BACKINGS = ("plain", "eager", "share", "copy", "mount")


@contextmanager
def backing(name: str, snapshot: Snapshot, run: Path) -> Iterator[Backing]:
    if name == "plain":
        yield Plain()
    elif name == "eager":
        yield Eager()
    elif name == "mount":
        support.need_fuse()
        (run / "mount").mkdir()
        with (
            pagekit.Template(f"file:{snapshot.memory}") as template,
            pagekit.Server(template, mount=mount_in(run / "mount")) as server,
        ):
            yield Mounted(server)
            template.audit()
    else:
        support.need_userfaultfd()
        with (
            pagekit.Template(f"file:{snapshot.memory}") as template,
            pagekit.Server(template, run / "socket", backend=name) as server,
        ):
            yield Served(server)
            assert server.wait(support.PATIENCE)
            template.audit()


@pytest.fixture(params=BACKINGS)
def each(request: pytest.FixtureRequest, snapshot: Snapshot, run: Path) -> Iterator[Backing]:
    with backing(request.param, snapshot, run) as found:
        yield found


@pytest.fixture
def fork(snapshot: Snapshot) -> Iterator[Qemu]:
    with Qemu.fork(snapshot) as found:
        yield found


def test_fork_answers_right(each: Backing, snapshot: Snapshot) -> None:
    with Qemu.fork(snapshot, each, fork_id="one") as fork:
        first = fork.exec(SUM)
        assert first.result == RIGHT
        assert fork.exec("print('hello'); result = os.environ['PAGEKIT_FORK_ID']") == (
            dataclasses.replace(first, output="hello\n", result="one", seconds=pytest.approx(1, 1))
        )
        every = fork.exec("result = hashlib.sha256(data).hexdigest()").result
        marks = fork.marks
        assert marks.ready_s > marks.resume_to_answer_s >= first.seconds > 0
        private = fork.memory()
        used = snapshot.memory.stat().st_blocks // 2
        # 40 MiB were read: copied or not, by backing; what was written is far less than that.
        low = {"eager": used, "copy": 40 << 10}.get(each.name, 100)
        high = {"eager": used * 2, "copy": used}.get(each.name, 20 << 10)
        assert low <= private.guest_kib <= high
        assert private.vmm_kib > 1000
    with Qemu.fork(snapshot) as plain:
        assert plain.exec("result = hashlib.sha256(data).hexdigest()").result == every


def test_writes_are_the_forks_own(each: Backing, snapshot: Snapshot) -> None:
    with Qemu.fork(snapshot, each) as one, Qemu.fork(snapshot, each) as two:
        one.exec("data[:] = b'x' * len(data)")
        assert two.exec(SUM).result == RIGHT
        assert one.exec(SUM).result == str(ord("x") * DATA_PAGES)


def test_later_forks_cause_next_to_no_faults(snapshot: Snapshot, run: Path) -> None:
    with backing("share", snapshot, run) as served:
        with Qemu.fork(snapshot, served) as fork:
            fork.exec(SUM)
        before = served.server.statistics()
        for _ in range(3):
            with Qemu.fork(snapshot, served) as fork:
                assert fork.exec(SUM).result == RIGHT
        after = served.server.statistics()
        assert before["demand_faults"] > 100
        assert after["demand_faults"] - before["demand_faults"] < 30
        assert after["fetches"] - before["fetches"] < 30


@pytest.mark.parametrize("name", ["share", "plain"])
def test_twenty_forks_are_different(
    name: str, frozen: dict[str, str], snapshot: Snapshot, run: Path
) -> None:
    code = "result = [os.urandom(16).hex(), str(uuid.uuid4()), random.random(), time.time()]"
    with backing(name, snapshot, run) as chosen, Fleet(snapshot, chosen) as fleet:
        drawn = [ast.literal_eval(frozen["drawn"])]
        for _ in range(20):
            (outcome,) = fleet.run([code])
            assert outcome.error is None
            assert outcome.answer is not None
            *values, clock = ast.literal_eval(outcome.answer.result or "")
            assert abs(clock - time.time()) < 1
            drawn.append(values)
        assert len(fleet.forks) == 20
        for values in zip(*drawn, strict=True):
            assert len(set(values)) == 21
        boot_ids = {
            fork.exec("result = open('/proc/sys/kernel/random/boot_id').read()").result
            for fork in fleet.forks
        }
        assert len(boot_ids) == 20
        ids = {
            fork.exec("result = open('/run/pagekit/fork_id').read()").result for fork in fleet.forks
        }
        assert ids == {fork.fork_id for fork in fleet.forks}


def test_many_forks_at_once_each_with_its_own_code(each: Backing, snapshot: Snapshot) -> None:
    with Fleet(snapshot, each) as fleet:
        outcomes = fleet.run([f"result = {n} * sum(data[{n}::{PAGE_SIZE}])" for n in range(6)])
        for number, outcome in enumerate(outcomes):
            right = number * sum(data_page(page)[number] for page in range(DATA_PAGES))
            assert outcome.error is None
            assert outcome.answer is not None
            assert outcome.answer.result == str(right)


def test_an_error_in_one_fork_leaves_the_others_alone(snapshot: Snapshot) -> None:
    with Fleet(snapshot, Plain()) as fleet:
        good, bad, worse = fleet.run(
            ["result = 1", "1 / 0", "os.kill(1, 9); import ctypes; ctypes.string_at(0)"], timeout=20
        )
        assert good.answer is not None
        assert isinstance(bad.error, CodeError)
        assert "ZeroDivisionError" in bad.error.traceback
        assert isinstance(worse.error, ForkDied)


def test_state_lives_on_and_errors_do_not_end_it(fork: Qemu) -> None:
    fork.exec("x = 20")
    with pytest.raises(CodeError, match="raised") as raised:
        fork.exec("x += 1\n1 / 0")
    assert "line 2" in raised.value.traceback
    assert fork.exec("result = x * 2").result == "42"
    assert fork.exec("result = None").result is None


def test_no_answer_in_time(fork: Qemu) -> None:
    with pytest.raises(AgentError, match=r"did not answer within 0\.2 s"):
        fork.exec("time.sleep(1.5)", timeout=0.2)
    # The late answer is not taken for this one's.
    assert fork.exec("result = 'next'").result == "next"


def test_large_requests_and_answers(fork: Qemu) -> None:
    assert fork.exec(f"result = len({'x' * 500_000!r})").result == "500000"
    assert fork.exec("print('é' * 300_000)").output == "é" * 300_000 + "\n"


def test_killed_vmm(fork: Qemu) -> None:
    fork.exec("pass")
    os.kill(fork.pid, signal.SIGKILL)
    with pytest.raises(ForkDied, match="signal 9") as died:
        fork.exec("pass")
    assert died.value.status == -9
    assert died.value.hint


def test_guest_that_shuts_down(fork: Qemu) -> None:
    with pytest.raises(ForkDied, match="the guest shut down") as died:
        fork.exec("open('/proc/sysrq-trigger', 'w').write('o'); time.sleep(30)")
    assert died.value.status == 0


def test_closed_fork(snapshot: Snapshot) -> None:
    fork = Qemu.fork(snapshot)
    fork.close()
    fork.close()
    with pytest.raises(ForkDied, match="closed"):
        fork.exec("pass")


def test_forks_end_with_their_server(snapshot: Snapshot, run: Path) -> None:
    support.need_userfaultfd()
    with pagekit.Template(f"file:{snapshot.memory}") as template:
        server = pagekit.Server(template, run / "socket", backend="share")
        with Qemu.fork(snapshot, Served(server)) as fork:
            fork.exec("pass")
            server.close()
            with pytest.raises(ForkDied, match="server went away") as died:
                fork.exec(SUM)
            assert died.value.status == support.UNAVAILABLE
            assert died.value.log
            assert died.value.hint


def test_forks_over_a_mount_end_when_they_need_its_server(snapshot: Snapshot, run: Path) -> None:
    support.need_fuse()
    (run / "mount").mkdir()
    with pagekit.Template(f"file:{snapshot.memory}") as template:
        server = pagekit.Server(template, mount=mount_in(run / "mount"))
        with Qemu.fork(snapshot, Mounted(server)) as fork:
            fork.exec("pass")
            server.close()
            with pytest.raises(ForkDied, match="signal 7") as died:
                fork.exec(SUM)
            assert "could not be provided" in (died.value.hint or "")


def test_forks_need_a_mount(snapshot: Snapshot, run: Path) -> None:
    with (
        pagekit.Template(f"file:{snapshot.memory}") as template,
        pagekit.Server(template, run / "socket", backend="plain") as server,
        pytest.raises(UsageError, match="mounted nothing"),
    ):
        Qemu.fork(snapshot, Mounted(server))


def test_forks_end_with_a_server_that_is_killed(snapshot: Snapshot, run: Path) -> None:
    support.need_userfaultfd()

    class Elsewhere:
        """A server in another process."""

        name = "share"

        def prepare(self, snapshot: Snapshot, directory: Path) -> object:
            prepared = Plain().prepare(snapshot, directory)
            prepared.environment = daemon.environment(Path(prepared.path), "share")
            return prepared

    spec = f"file:{snapshot.memory}"
    with (
        support.Daemon(spec, run / "socket", "--backend", "share") as daemon,
        Qemu.fork(snapshot, Elsewhere()) as fork,
        Qemu.fork(snapshot) as other,
    ):
        fork.exec("pass")
        daemon.process.kill()
        with pytest.raises(ForkDied, match="server went away"):
            fork.exec(SUM)
        assert other.exec(SUM).result == RIGHT


# Programs and snapshots that are not what they should be


def fake(tmp_path: Path, script: str, interpreter: str = "/bin/sh") -> str:
    program = tmp_path / "fake-qemu"
    program.write_text(f"#!{interpreter}\n{script}\n")
    program.chmod(0o755)
    return str(program)


def test_vmm_that_does_not_answer(snapshot: Snapshot, tmp_path: Path) -> None:
    silent = dataclasses.replace(snapshot, qemu=fake(tmp_path, "exec sleep 600"))
    started = time.monotonic()
    with pytest.raises(BootFailed, match="in time"):
        Qemu.fork(silent, timeout=0.5)
    assert time.monotonic() - started < 5


def test_vmm_that_dies(snapshot: Snapshot, tmp_path: Path) -> None:
    dying = dataclasses.replace(snapshot, qemu=fake(tmp_path, "echo out of luck >&2; exit 3"))
    with pytest.raises(BootFailed, match="status 3: out of luck"):
        Qemu.fork(dying)


def test_vmm_that_speaks_something_else(snapshot: Snapshot, tmp_path: Path) -> None:
    script = """
import os, re, sys, time
os.write(int(re.search("pagekit-qmp,fd=([0-9]+)", " ".join(sys.argv))[1]), b"hello\\n")
time.sleep(600)
"""
    program = fake(tmp_path, script, sys.executable)
    with pytest.raises(BootFailed, match="not a QMP monitor"):
        Qemu.fork(dataclasses.replace(snapshot, qemu=program))


def test_vmm_that_is_gone(snapshot: Snapshot) -> None:
    with pytest.raises(QemuMissing, match="not found") as missing:
        Qemu.fork(dataclasses.replace(snapshot, qemu="/nonexistent/qemu-system-x86_64"))
    assert "apt-get install" in (missing.value.hint or "")


@pytest.fixture
def damaged(snapshot: Snapshot, tmp_path: Path) -> Path:
    """A copy of the snapshot, with an empty memory of the right size, to be damaged."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    for name in ("snapshot.json", "state"):
        shutil.copy(snapshot.directory / name, directory)
    with (directory / "memory").open("wb") as memory:
        memory.truncate(snapshot.memory_bytes)
    Snapshot.load(directory)
    return directory


def test_state_that_is_cut_short(damaged: Path) -> None:
    os.truncate(damaged / "state", 100_000)
    with pytest.raises(BootFailed, match="a fork did not start"):
        Qemu.fork(Snapshot.load(damaged))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("snapshot.json", None, "is not a snapshot"),
        ("snapshot.json", "{", "cannot read"),
        ("snapshot.json", "[]", "damaged"),
        ("snapshot.json", '{"version": 99}', "another version"),
        ("snapshot.json", '{"version": 1}', "damaged"),
        ("memory", "short", "5 bytes instead of"),
        ("state", "", "not QEMU's"),
        ("state", None, "damaged"),
    ],
)
def test_damaged_snapshot(damaged: Path, name: str, content: str | None, said: str) -> None:
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_text(content)
    with pytest.raises(SnapshotError, match=said) as error:
        Snapshot.load(damaged)
    assert error.value.hint or name == "snapshot.json"


def test_snapshot_that_vanishes(damaged: Path) -> None:
    found = Snapshot.load(damaged)
    shutil.rmtree(damaged)
    with pytest.raises(SnapshotError, match="it is gone"):
        Qemu.fork(found, Eager())
    with pytest.raises(SnapshotError, match="it is gone"):
        Qemu.fork(found)


# Freezing


def test_forks_that_share_memory_cannot_be_frozen(fork: Qemu, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be frozen"):
        fork.freeze(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_fork_of_its_own_memory_can_be_frozen(snapshot: Snapshot, tmp_path: Path) -> None:
    with Qemu.fork(snapshot, Eager()) as first:
        first.exec("x = 6")
        again = first.freeze(tmp_path / "again")
        # It runs on, and neither knows the random numbers of the other.
        mine = first.exec("x += 1; result = os.urandom(8).hex()").result
        with Qemu.fork(again) as second:
            assert second.exec("result = x").result == "6"
            assert second.exec(SUM).result == RIGHT
            assert second.exec("result = os.urandom(8).hex()").result != mine
        assert first.exec("result = x").result == "7"
    assert again.agent
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_saving_where_something_is(snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with Qemu.fork(snapshot, Eager()) as fork:
        for place in (tmp_path, tmp_path / "file"):
            with pytest.raises(UsageError, match="exists already"):
                fork.freeze(place)
        with pytest.raises(SnapshotError, match="cannot save"):
            fork.freeze("/proc/nonexistent/place")
        assert fork.exec(SUM).result == RIGHT
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", ["64k", "8m"])  # enough for neither, for the state
def test_saving_without_space(size: str, snapshot: Snapshot, tmp_path: Path) -> None:
    support.need_root()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", tmp_path], check=True)
    try:
        with Qemu.fork(snapshot, Eager()) as fork:
            with pytest.raises(SnapshotError, match="cannot save") as full:
                fork.freeze(tmp_path / "full")
            assert full.value.hint
            assert not list(tmp_path.iterdir())
            assert fork.exec(SUM).result == RIGHT
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_choosing_a_backing(snapshot: Snapshot, run: Path) -> None:
    with choose(snapshot, "auto", run) as (chosen, reason):
        assert chosen.name == "plain"
        assert reason
    for name, more, said in (
        ("nonsense", {}, "nonsense"),
        ("plain", {"recording": True}, "served"),
    ):
        with pytest.raises(UsageError, match=said), choose(snapshot, name, run, **more):
            pass
    support.need_userfaultfd()
    with choose(snapshot, "auto", run, recording=True) as (chosen, reason):
        assert chosen.name == "share"
    support.need_fuse()
    for name in ("share", "copy", "mount"):
        with choose(snapshot, name, run) as (chosen, reason):
            assert chosen.name == name
            with Qemu.fork(snapshot, chosen) as fork:
                assert fork.exec(SUM).result == RIGHT
        assert reason
