"""Freezing a QEMU that somebody else started, through its QMP socket.

What runs there is told from its command line: a snapshot needs the arguments for the same machine,
without what only one process can have. What cannot be had twice and cannot be left out is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SnapshotError
from . import machine
from .channel import Channel
from .freezing import freeze
from .qmp import Qmp, QmpError
from .snapshot import Snapshot

_SHARE_HINT = (
    "start QEMU with `-object memory-backend-file,id=ram,size=…,mem-path=…,share=on "
    "-machine …,memory-backend=ram`"
)

# Options without a value; all others have one.
_FLAGS = frozenset(
    (
        *("S", "curses", "daemonize", "enable-kvm", "full-screen", "mem-prealloc", "no-acpi"),
        *("no-fd-bootchk", "no-hpet", "no-reboot", "no-shutdown", "no-user-config", "nodefaults"),
        *("nographic", "only-migratable", "preconfig", "s", "singlestep", "snapshot", "usb"),
    )
)
# What belongs to the process that was started, and not to its machine.
_DROPPED = frozenset(
    (
        *("D", "S", "append", "chroot", "curses", "d", "daemonize", "display", "dtb"),
        *("full-screen", "gdb", "incoming", "initrd", "kernel", "mon", "monitor", "nographic"),
        *("pidfile", "qmp", "qmp-pretty", "runas", "s", "sandbox", "spice", "trace", "vnc"),
    )
)
_REFUSED = {
    "add-fd": "inherited descriptors",
    "mem-path": "memory given by -mem-path",
    "readconfig": "options in a file",
}


def freeze_running(
    qmp_socket: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    timeout: float = 10,
) -> Snapshot:
    """Freeze a running QEMU into a snapshot; it runs on afterwards.

    Args:
        qmp_socket: the Unix socket of its QMP monitor, which nobody else is connected to.
        directory: the snapshot's place, which must not exist yet, or be empty.
        timeout: seconds that its monitor may take for an answer.

    Raises:
        UsageError: there is something in that place.
        SnapshotError: there is no QEMU behind the socket, it has something that a fork cannot have,
            or its memory is not one shared file; or saving failed.
    """
    with _connected(Path(qmp_socket), timeout) as (pid, qmp):
        try:
            return _freeze(pid, qmp, directory)
        except QmpError as error:
            raise SnapshotError(
                f"cannot freeze the QEMU at {qmp_socket}: {error}", hint=error.hint
            ) from error


@contextlib.contextmanager
def _connected(path: Path, timeout: float) -> Iterator[tuple[int, Qmp]]:
    """Yield the process behind a QMP socket, and a connection to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.settimeout(timeout)
        try:
            end.connect(str(path))
            credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError as error:
            raise SnapshotError(
                f"cannot connect to {path}: {error.strerror or error}",
                hint="give the socket of `-qmp unix:PATH,server=on,wait=off`",
            ) from error
        pid = struct.unpack("iii", credentials)[0]
        yield pid, Qmp(Channel(end), timeout=timeout)


def _freeze(pid: int, qmp: Qmp, directory: str | os.PathLike[str]) -> Snapshot:
    version = qmp.execute("query-version")["qemu"]
    program, given = _command_line(pid)
    for device in qmp.execute("query-block"):
        inserted = device.get("inserted")
        if inserted and not inserted["ro"]:
            raise SnapshotError(
                f"it has a writable disk, {device['device'] or inserted['file']}: forks would all "
                "write to it",
                hint="keep what the guest needs in its initramfs, or attach disks read-only",
            )
    backend, size, path = _memory_backend(qmp, pid)
    arguments, agent = _for_forks(given, backend, size)
    try:
        memory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(f"cannot open its memory {path}: {error.strerror}") from error
    try:
        found = os.fstat(memory).st_size
        if found != size:
            raise SnapshotError(f"its memory file has {found} bytes and not {size}: {path}")
        return freeze(
            qmp,
            memory,
            directory,
            qemu=program,
            qemu_version=".".join(str(version[part]) for part in ("major", "minor", "micro")),
            accelerator="kvm" if qmp.execute("query-kvm")["enabled"] else "tcg",
            arguments=arguments,
            agent=agent,
        )
    finally:
        os.close(memory)


def _command_line(pid: int) -> tuple[str, list[str]]:
    """Return program and arguments of a QEMU process."""
    process = Path(f"/proc/{pid}")
    try:
        program = str((process / "exe").readlink())
        words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError as error:
        raise SnapshotError(
            f"cannot see the process behind the socket, {pid}: {error.strerror}",
            hint="it must be visible to you: run this as its user, outside of other containers",
        ) from error
    if "qemu" not in Path(program).name:
        raise SnapshotError(f"the process behind the socket is {program}, not QEMU")
    return program, [os.fsdecode(word) for word in words[1:]]


def _memory_backend(qmp: Qmp, pid: int) -> tuple[str, int, str]:
    """Return id, size, and a path to us, of the file that is all of the guest's memory."""
    backends = qmp.execute("query-memdev")
    if len(backends) != 1:
        names = ", ".join(str(backend.get("id", "?")) for backend in backends) or "none"
        raise SnapshotError(
            f"it must have one memory backend, and has {len(backends)}: {names}", hint=_SHARE_HINT
        )
    name, size = str(backends[0]["id"]), int(backends[0]["size"])
    try:
        path = str(qmp.execute("qom-get", path=f"/objects/{name}", property="mem-path"))
    except QmpError as error:
        if error.closed:
            raise
        raise SnapshotError(f"its memory {name} is not a file", hint=_SHARE_HINT) from error
    if not backends[0].get("share"):
        raise SnapshotError(
            f"its memory {path} is not shared (share=on): the file lacks what the guest wrote",
            hint=_SHARE_HINT,
        )
    if inherited := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", path):
        return name, size, f"/proc/{pid}/fd/{inherited[1]}"
    view = f"/proc/{pid}/root" if path.startswith("/") else f"/proc/{pid}/cwd/"
    return name, size, view + path


def _for_forks(given: list[str], backend: str, size: int) -> tuple[list[str], bool]:
    """Turn a running QEMU's arguments into those of its forks; say whether there is an agent."""
    options = list(_options(given))
    agent = next(
        (
            properties.get("chardev")
            for option, value in options
            if option == "device"
            for properties in [_properties(value, "driver")]
            if properties.get("name") == machine.AGENT_PORT
        ),
        None,
    )
    arguments: list[str] = []
    for option, value in options:
        if option in _REFUSED:
            raise SnapshotError(f"forks cannot have {_REFUSED[option]} (-{option})")
        if option in _DROPPED:
            continue
        if option == "chardev":
            properties = _properties(value, "backend")
            kind = "socket,id={},fd={{agent}}" if properties.get("id") == agent else "null,id={}"
            value = kind.format(properties.get("id", ""))
        elif option in ("serial", "parallel") and value != "none":
            value = value if value.startswith("chardev:") else "null"
        elif option == "object" and _properties(value, "qom-type").get("id") == backend:
            value = machine.memory_object(backend, size)
        elif option in ("netdev", "nic", "net"):
            _check_network(value)
        arguments += [f"-{option}"] if option in _FLAGS else [f"-{option}", value]
    return [*arguments, "-display", "none", *machine.monitor()], agent is not None


def _options(given: list[str]) -> Iterator[tuple[str, str]]:
    words = iter(given)
    for word in words:
        if not word.startswith("-"):
            raise SnapshotError(f"forks cannot have a disk given by its name alone ({word})")
        option = word.lstrip("-")
        yield option, "" if option in _FLAGS else next(words, "")


def _properties(value: str, first: str) -> dict[str, Any]:
    """Take apart ``first,name=value,…`` or its JSON form."""
    if value.startswith("{"):
        with contextlib.suppress(ValueError):
            parsed: dict[str, Any] = json.loads(value)
            return parsed
    properties: dict[str, Any] = {}
    # Two commas are one that is meant.
    for number, part in enumerate(re.split(r"(?<!,),(?!,)", value)):
        name, equals, content = part.partition("=")
        if number == 0 and not equals:
            name, content = first, part
        properties[name] = content.replace(",,", ",")
    return properties


def _check_network(value: str) -> None:
    properties = _properties(value, "type")
    kind = properties.get("type", "")
    if kind == "none" or (kind in ("user", "nic") and "hostfwd" not in properties):
        return
    raise SnapshotError(
        f"forks cannot share a network of type {kind or '?'} ({value})",
        hint="user networking without forwarded ports can be forked",
    )
