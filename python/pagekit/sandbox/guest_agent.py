"""The program inside the guest: answers requests over a virtio-serial port.

It is PID 1 of the guest, needs nothing but Python's standard library, and is also imported on the
host for its constants and for :func:`data_page`.

One JSON object per line, both ways::

    guest → host  {"ready": true, "python": "3.11.2", "kernel": "6.1.0-…", "data_pages": 10240}
    host → guest  {"id": 7, "code": "result = 6 * 7", "identity": {…}}
    guest → host  {"id": 7, "output": "", "result": "42", "error": null}

``ready``
    is said once, at the end of a cold boot, as soon as the host has opened the channel. A fork
    never says it: it wakes where the template was frozen, waiting for a request.
``identity``
    belongs in the first request after a fork has woken, and is applied before any code runs:
    ``fork_id`` (text), ``time_ns`` (nanoseconds since 1970, UTC) and ``entropy`` (base64 of 64
    secret random bytes).
``output``
    is what the code and its child processes wrote to standard output. Standard error goes to the
    guest's console.
``result``
    is ``str()`` of the variable ``result`` if the code set it.
``error``
    is a traceback when the code raised, or a sentence when the request could not be understood; the
    ``id`` is null when even that could not be read.

Code runs in one namespace that lives as long as the guest, holding the preloaded modules and
``data``.

The host may close the channel and open it again at any time, and the guest need not notice. So a
host begins with an empty line, which ends whatever its predecessor left unfinished, and passes over
lines that are not an answer with the id it waits for: they are the rest of its predecessor's.
"""

from __future__ import annotations

import binascii
import fcntl
import gc
import hashlib
import importlib
import io
import json
import linecache
import os
import random
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PORT_NAME = "pagekit.agent"
"""Name of the virtio-serial port, as given to QEMU's ``virtserialport``."""

PAGE_SIZE = 4096
"""Size in bytes of the pages that :data:`DATA_PAGES` counts."""

DATA_PAGES = 10240
"""How many pages of distinct content ``data`` holds in the guest: 40 MiB."""

FORK_ID_FILE = "/run/pagekit/fork_id"
"""Where a fork finds its id; it is in the environment as ``PAGEKIT_FORK_ID`` too."""

PRELOADED = (
    "collections",
    "dataclasses",
    "datetime",
    "decimal",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "math",
    "os",
    "random",
    "re",
    "sqlite3",
    "statistics",
    "subprocess",
    "sys",
    "time",
    "urllib.parse",
    "uuid",
    "zlib",
)
"""Modules imported while booting, so that no fork has to; the code finds them in its namespace."""

# linux/random.h and linux/netlink.h; Python has no names for them.
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
NETLINK_KOBJECT_UEVENT = 15


def data_page(number: int) -> bytes:
    """Return page ``number`` of the guest's ``data``: the same on every machine, never all zero."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest() * (PAGE_SIZE // 32)


def make_data() -> bytearray:
    """Make ``data``, in place: a temporary copy would stay behind in the template as dead pages."""
    data = bytearray(DATA_PAGES * PAGE_SIZE)
    view = memoryview(data)
    for number in range(DATA_PAGES):
        view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = data_page(number)
    return data


class Identity:
    """What makes a fork different from its siblings, whose memory was the same until it woke.

    A fork does this before anything else, on a processor that has forgotten all it had translated
    or cached, so everything that can be done before the freeze is.
    """

    def __init__(self) -> None:
        self._random = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
        Path(FORK_ID_FILE).parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(FORK_ID_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)

    def assume(self, identity: dict[str, Any]) -> None:
        """Set the clock, reseed every random generator, and tell the fork who it is.

        The kernel is given secret entropy and made to draw a new key from it at once: by itself it
        would do so only after a minute.

        Raises:
            KeyError, ValueError, TypeError: the identity is incomplete or of the wrong shape.
            OSError: the kernel refused.
        """
        fork_id, time_ns = str(identity["fork_id"]), int(identity["time_ns"])
        entropy = binascii.a2b_base64(identity["entropy"])
        if len(entropy) < 32:
            raise ValueError(f"entropy of {len(entropy)} bytes is too little to make a fork unique")

        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)
        fcntl.ioctl(
            self._random, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
        )
        fcntl.ioctl(self._random, RNDRESEEDCRNG)

        random.seed(int.from_bytes(os.urandom(32), "little"))
        # These two keep something random for the life of the process: the node in a uuid1
        # (multicast bit set, as RFC 9562 wants of a made-up one), the names of temporary files.
        if "uuid" in sys.modules:
            sys.modules["uuid"]._node = random.getrandbits(48) | 1 << 40  # type: ignore[attr-defined]
        if "tempfile" in sys.modules:
            sys.modules["tempfile"]._name_sequence = None  # type: ignore[attr-defined]

        os.environ["PAGEKIT_FORK_ID"] = fork_id
        encoded = fork_id.encode()
        os.pwrite(self._file, encoded, 0)
        os.ftruncate(self._file, len(encoded))


class Capture:
    """Standard output of this process and of its children, caught in a file of memory."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("output")
        self._open()

    def _open(self) -> None:
        os.dup2(self._fd, 1)
        self._stream = io.TextIOWrapper(
            io.FileIO(1, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
        )

    def __enter__(self) -> None:
        sys.stdout = self._stream

    def __exit__(self, *_: object) -> None:
        if self._stream.closed:
            self._open()
        else:
            self._stream.flush()

    def text(self) -> str:
        """Return what was written since the last call, and forget it."""
        size = os.lseek(self._fd, 0, os.SEEK_CUR)
        if not size:
            return ""
        written = os.pread(self._fd, size, 0)
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        return written.decode(errors="replace")


class Agent:
    """Runs requests, one after the other."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        for name in PRELOADED:
            importlib.import_module(name)
            package = name.partition(".")[0]
            self.namespace[package] = sys.modules[package]
        self.namespace["data"] = make_data()
        self.identity = Identity()
        self.capture = Capture()

    def answer(self, line: bytes) -> dict[str, Any]:
        """Do what a request asks. Never raises: what goes wrong is in the answer's ``error``."""
        answer: dict[str, Any] = {"id": None, "output": "", "result": None, "error": None}
        try:
            request = json.loads(line)
            answer["id"] = request["id"]
            if "identity" in request:
                self.identity.assume(request["identity"])
            code = request["code"]
            if not isinstance(code, str):
                raise TypeError(f"code is {type(code).__name__}, not text")
        except Exception as error:
            answer["error"] = f"bad request: {type(error).__name__}: {error}"
            return answer

        self.namespace.pop("result", None)
        with self.capture:
            answer["result"], answer["error"] = self.run(code, f"<request {answer['id']}>")
        answer["output"] = self.capture.text()
        return answer

    def run(self, code: str, filename: str) -> tuple[str | None, str | None]:
        """Run ``code``; return its result, or the traceback if it raised, SystemExit included."""
        process = os.getpid()
        # So that tracebacks quote the code.
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        try:
            exec(compile(code, filename, "exec"), self.namespace)
            result = self.namespace.get("result")
            return None if result is None else str(result), None
        except BaseException as error:
            frames = error.__traceback__
            return None, "".join(
                traceback.format_exception(type(error), error, frames and frames.tb_next)
            )
        finally:
            if os.getpid() != process:
                os._exit(0)  # a child that the code has forked must not answer in our place
            linecache.cache.pop(filename, None)


class Channel:
    """Lines to and from the host, through one virtio-serial port.

    Facts about such a port: reading waits while the host has the channel open and gives end of
    file while it has not; writing waits for the host to open it. SIGIO tells of both coming and
    going, so a closed channel is waited for without polling.
    """

    def __init__(self, device: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        self._fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_ASYNC)
        self._buffer = bytearray()

    def read_line(self) -> bytes:
        """Wait for a line that is not empty and return it without its end."""
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._buffer[:end]).strip()
                del self._buffer[: end + 1]
                searched = 0
                if line:
                    return line
                continue
            searched = len(self._buffer)
            piece = os.read(self._fd, 1 << 16)
            if piece:
                self._buffer += piece
                continue
            # The host has closed the channel: what it began to say will not be finished. The time
            # limit is only for a signal lost in another thread that the code has started.
            self._buffer.clear()
            searched = 0
            signal.sigtimedwait({signal.SIGIO}, 1)

    def write(self, message: dict[str, Any]) -> None:
        """Send one object as a line, however long."""
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def find_port(name: str, timeout: float = 10) -> str:
    """Return the device of the virtio-serial port called ``name``, waiting for it to appear.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) as uevents:
        uevents.bind((0, 1))  # before the first look, so that no port can appear unseen
        uevents.settimeout(timeout)
        while True:
            for file in Path("/sys/class/virtio-ports").glob("*/name"):
                if file.read_text().strip() == name:
                    return f"/dev/{file.parent.name}"
            try:
                uevents.recv(1 << 16)
            except TimeoutError:
                raise TimeoutError(
                    f"no virtio-serial port named {name}: the VMM was started without one"
                ) from None


def main() -> None:
    """Boot: import, make ``data``, say so, and answer for ever."""
    agent = Agent()
    channel = Channel(find_port(PORT_NAME))
    # What lives now lives for good. Collections that looked at it would dirty it in every fork.
    gc.collect()
    gc.freeze()
    channel.write(
        {
            "ready": True,
            "python": sys.version.split()[0],
            "kernel": os.uname().release,
            "data_pages": DATA_PAGES,
        }
    )
    while True:
        channel.write(agent.answer(channel.read_line()))


if __name__ == "__main__":
    main()
