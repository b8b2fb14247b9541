"""Freezing a QEMU that somebody else started, and refusing what cannot be frozen."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
from test_sandbox_fork import RIGHT, SUM

from pagekit.errors import AgentError, SnapshotError, UsageError
from pagekit.sandbox import Qemu, find_qemu, freeze_running
from pagekit.sandbox.channel import Channel
from pagekit.sandbox.foreign import _for_forks
from pagekit.sandbox.guest import COMMAND_LINE, Guest
from pagekit.sandbox.qmp import Qmp

FILE = "memory-backend-file,id=ram,size={size},mem-path={run}/memory,share=on"
MACHINE = ("-machine", "q35,memory-backend=ram")


@contextmanager
def running(run: Path, *arguments: str) -> Iterator[Path]:
    """Start a QEMU like anybody would; yield its QMP socket."""
    monitor = run / "qmp"
    command = [
        *(find_qemu().path, "-display", "none", "-nodefaults", "-accel", "tcg", *arguments),
        *("-qmp", f"unix:{monitor},server=on,wait=off", "-S"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with support.stopping(process):
        support.until(lambda: listens(monitor) or process.poll() is not None, "QEMU listens")
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield monitor


def listens(path: Path) -> bool:
    """Whether somebody listens at a socket: its file is there a moment before that."""
    accepting = "00010000"
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == accepting for line in lines)


def connected(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(support.PATIENCE)
    end.connect(str(path))
    return end


def test_freeze_a_running_qemu(guest: Guest, run: Path, tmp_path: Path) -> None:
    agent = run / "agent,socket"  # a comma, as QEMU's options have it
    arguments = [
        *("-m", "512M", *MACHINE, "-object", FILE.format(size="512M", run=run)),
        *("-cpu", "max", "-serial", f"file:{run}/console", "-name", "somebody's"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", COMMAND_LINE),
        *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
        *("-chardev", f"socket,path={str(agent).replace(',', ',,')},server=on,wait=off,id=channel"),
        *("-device", "virtserialport,chardev=channel,name=pagekit.agent"),
    ]
    with running(run, *arguments) as monitor, connected(agent) as end:
        qmp = Qmp(Channel(connected(monitor)))
        qmp.execute("cont")
        qmp.close()
        theirs = Channel(end)
        assert theirs.receive(timeout=support.PATIENCE)["ready"] is True

        def ask(code: str) -> Any:
            theirs.send({"id": 1, "code": code}, timeout=support.PATIENCE)
            return theirs.receive(timeout=support.PATIENCE)["result"]

        assert ask("x = 6; result = x") == "6"
        snapshot = freeze_running(monitor, tmp_path / "snapshot")
        assert snapshot.agent
        assert snapshot.memory_bytes == 512 << 20
        assert snapshot.accelerator == "tcg"

        # It runs on, as it was.
        assert ask("x += 1; result = x") == "7"
        qmp = Qmp(Channel(connected(monitor)))
        assert qmp.execute("query-status")["running"]
        states = {c["capability"]: c["state"] for c in qmp.execute("query-migrate-capabilities")}
        assert not states["x-ignore-shared"]
        qmp.close()

        with pytest.raises(UsageError, match="exists already"):
            freeze_running(monitor, tmp_path / "snapshot")
        before = snapshot.digest()
        with Qemu.fork(snapshot) as one, Qemu.fork(snapshot) as two:
            for fork in (one, two):
                assert fork.exec("result = x").result == "6"
                assert fork.exec(SUM).result == RIGHT
            drawn = [fork.exec("result = os.urandom(8).hex()").result for fork in (one, two)]
            assert drawn[0] != drawn[1]
        assert snapshot.digest() == before


def test_freeze_a_guest_without_an_agent_that_is_stopped(run: Path, tmp_path: Path) -> None:
    backend = json.dumps(
        {
            "qom-type": "memory-backend-file",
            "id": "ram",
            "size": 128 << 20,
            "mem-path": str(run / "memory"),
            "share": True,
        }
    )
    with running(run, "-m", "128M", *MACHINE, "-object", backend) as monitor:
        snapshot = freeze_running(monitor, tmp_path / "snapshot")
        assert not snapshot.agent
        qmp = Qmp(Channel(connected(monitor)))
        assert not qmp.execute("query-status")["running"]  # nor was it before
        qmp.close()
    with Qemu.fork(snapshot) as fork:
        assert fork.monitor("query-status")["running"]
        with pytest.raises(AgentError, match="no agent"):
            fork.exec("pass")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "128M", "-machine", "q35"), "is not a file"),
        (
            ("-m", "128M", *MACHINE, "-object", FILE.replace("share=on", "share=off")),
            "not shared",
        ),
        (
            (
                *("-m", "128M", *MACHINE, "-object", FILE),
                *("-object", "memory-backend-ram,id=more,size=16M"),
            ),
            "has 2: ",
        ),
        (("-machine", "none"), "has 0"),
        (
            ("-m", "128M", *MACHINE, "-object", FILE, "-drive", "file={run}/disk,format=raw"),
            "writable disk",
        ),
        (
            (
                *("-m", "128M", *MACHINE, "-object", FILE),
                *("-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:0-:22"),
            ),
            "network of type user",
        ),
    ],
)
def test_what_cannot_be_frozen(
    arguments: tuple[str, ...], said: str, run: Path, tmp_path: Path
) -> None:
    (run / "disk").write_bytes(bytes(1 << 20))
    filled = [
        argument.replace("{size}", "128M").replace("{run}", str(run)) for argument in arguments
    ]
    with running(run, *filled) as monitor:
        with pytest.raises(SnapshotError, match=said) as error:
            freeze_running(monitor, tmp_path / "snapshot")
        assert error.value.hint
        qmp = Qmp(Channel(connected(monitor)))  # it is still there, and free to talk
        qmp.execute("query-status")
        qmp.close()
    assert not (tmp_path / "snapshot").exists()


def test_another_client_is_at_the_monitor(run: Path, tmp_path: Path) -> None:
    with running(run, "-machine", "none") as monitor, connected(monitor):
        with pytest.raises(SnapshotError, match="in time") as error:
            freeze_running(monitor, tmp_path / "snapshot", timeout=0.5)
        assert "another one connected" in (error.value.hint or "")


def test_sockets_that_are_no_monitor(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot connect"):
        freeze_running(run / "nothing", tmp_path / "snapshot")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "socket"))
        listener.listen()
        with pytest.raises(SnapshotError, match="in time"):
            freeze_running(run / "socket", tmp_path / "snapshot", timeout=0.3)


def test_arguments_for_forks() -> None:
    given = [
        *("--daemonize", "-S", "-pidfile", "/run/p", "-qmp", "unix:/q", "-nodefaults", "-m", "1G"),
        *("-chardev", "pty,id=other", "-mon", "chardev=other", "-serial", "chardev:other"),
        *("-serial", "mon:stdio", "-vnc", ":1", "-netdev", "user,id=n"),
        *("-object", "memory-backend-file,id=ram,size=1G,mem-path=/m,,x,share=on,prealloc=on"),
        *("-object", '{"qom-type":"rng-random","id":"rng"}'),
    ]
    arguments, agent = _for_forks(given, "ram", 1 << 30)
    assert not agent
    assert arguments[:-6] == [
        *("-nodefaults", "-m", "1G", "-chardev", "null,id=other", "-serial", "chardev:other"),
        *("-serial", "null", "-netdev", "user,id=n"),
        *("-object", "memory-backend-file,id=ram,size=1073741824,mem-path={memory},share={share}"),
        *("-object", '{"qom-type":"rng-random","id":"rng"}'),
    ]
    for refused in (["-readconfig", "f"], ["-add-fd", "fd=3,set=2"], ["disk.img"]):
        with pytest.raises(SnapshotError, match="forks cannot have"):
            _for_forks(refused, "ram", 1 << 30)
