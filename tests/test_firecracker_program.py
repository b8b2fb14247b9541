"""The real Firecracker, wherever one is on PATH and /dev/kvm works: a guest of a few instructions
(tests/programs/guest.S) is frozen, and restored through our socket and from our mount.

The guest has filled 2048 scattered pages before the freeze, and left others untouched. After it, it
compares what it reads with what belongs there, having written first to some of them, and says what
it found on its serial port.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from support import PATIENCE, PROGRAMS, need

import pagekit

# As in guest.S.
PAGES, ZEROS, SPAN, STEP, BASE = 2048, 256, 16384, 7919, 0x1000000
SEED, FACTOR, MASK = 0x5EED5EED5EED5EED, 0x9E3779B97F4A7C15, (1 << 64) - 1
SUM = sum(((BASE + at * STEP % SPAN * 4096) ^ SEED) * FACTOR for at in range(PAGES)) & MASK

SCRIPT = (
    "ENTRY(_start) PHDRS { text PT_LOAD FLAGS(5); } "
    "SECTIONS { . = 0x100000; .text : { *(.text) } :text /DISCARD/ : { *(*) } }"
)


class Api(http.client.HTTPConnection):
    """Firecracker's, over its Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Firecracker:
    """One VMM; what its guest writes to the serial port comes on its stdout."""

    def __init__(self, directory: Path, name: str) -> None:
        self.api = directory / f"{name}.api"
        self.log = directory / f"{name}.log"
        self.said = b""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["firecracker", "--api-sock", self.api, "--id", name, "--log-path", self.log],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        support.until(self._listens, f"{name} has no API socket: {self.log.read_text()}")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.api)) == 0

    def call(self, method: str, path: str, body: object) -> None:
        api = Api(self.api)
        api.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = api.getresponse()
        text = answer.read().decode()
        api.close()
        assert answer.status < 300, f"{method} {path}: {text}"

    def load(self, snapshot: Path, kind: str, path: Path) -> None:
        backend = {"backend_type": kind, "backend_path": str(path)}
        body = {"snapshot_path": f"{snapshot}/state", "mem_backend": backend, "resume_vm": True}
        self.call("PUT", "/snapshot/load", body)

    def go(self) -> None:
        """Has the guest check its memory."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"g")
        self.process.stdin.flush()

    def line(self, begins: bytes) -> bytes:
        """The line of the serial port that begins so."""
        assert self.process.stdout is not None
        output, deadline = self.process.stdout.fileno(), time.monotonic() + PATIENCE
        while (at := self.said.find(begins)) < 0 or (end := self.said.find(b"\n", at)) < 0:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([output], [], [], left)[0], f"in vain; it said {self.said!r}"
            more = os.read(output, 1 << 16)
            assert more, f"it ended: {self.process.wait()}: {self.log.read_text()[-2000:]}"
            self.said += more
        return self.said[at:end]

    def finds_everything_right(self) -> None:
        good, bad, zeros, not_zeros, total, _ = (
            int(word, 16) for word in self.line(b"V ").split()[1:]
        )
        assert (good, bad, zeros, not_zeros, total) == (PAGES, 0, ZEROS, 0, SUM)

    def __enter__(self) -> Firecracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("firecracker", shutil.which("firecracker"), "there is no such program on PATH")
    need("kvm", os.access("/dev/kvm", os.R_OK | os.W_OK), "there is no /dev/kvm for this user")
    need("ld", shutil.which("as") and shutil.which("ld"), "the guest cannot be assembled")
    directory = tmp_path_factory.mktemp("guest")
    (directory / "script").write_text(SCRIPT)
    assemble = ["as", PROGRAMS / "guest.S", "-o", directory / "guest.o"]
    subprocess.run(assemble, check=True)
    link = ["ld", "-n", "-T", "script", "guest.o", "-o", "guest"]
    subprocess.run(link, check=True, cwd=directory)
    return directory / "guest"


def freeze(kernel: Path, directory: Path, **machine: object) -> Path:
    """Boots the guest, freezes it when it is ready, and lets it look at its pages."""
    with Firecracker(directory, "first") as vmm:
        vmm.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, **machine})
        vmm.call("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        vmm.call("PUT", "/actions", {"action_type": "InstanceStart"})
        vmm.line(b"R")
        vmm.call("PATCH", "/vm", {"state": "Paused"})
        files = {"snapshot_path": f"{directory}/state", "mem_file_path": f"{directory}/memory"}
        vmm.call("PUT", "/snapshot/create", {"snapshot_type": "Full", **files})
        vmm.call("PATCH", "/vm", {"state": "Resumed"})
        vmm.go()
        vmm.finds_everything_right()
    return directory


@pytest.fixture(scope="module")
def snapshot(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze(kernel, tmp_path_factory.mktemp("snapshot"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with support.reachable_directory() as directory:  # a short path, for sockets
        yield directory


def restore(snapshot: Path, run: Path, kind: str, paths: Sequence[Path]) -> None:
    """Restores one VMM for each path, all before any of them looks at its memory."""
    with ExitStack() as stack:
        vmms = [
            stack.enter_context(Firecracker(run, f"vmm{number}")) for number in range(len(paths))
        ]
        for vmm, path in zip(vmms, paths, strict=True):
            vmm.load(snapshot, kind, path)
        for vmm in vmms:
            vmm.go()
        for vmm in vmms:
            vmm.finds_everything_right()


@pytest.mark.parametrize("count", [1, 20])
def test_through_one_socket(snapshot: Path, run: Path, count: int) -> None:
    with (
        pagekit.Template(f"file:{snapshot}/memory") as template,
        pagekit.Server(template, firecracker=run / "socket") as server,
    ):
        restore(snapshot, run, "Uffd", [run / "socket"] * count)
        assert server.wait(PATIENCE)
        statistics = server.statistics()
        assert statistics["firecracker"]["served"] == count
        assert statistics["demand_faults"] > 0 and not statistics["reports"]
        assert statistics["bytes_read"] <= 128 << 20, "each page is fetched once for all"


def test_a_socket_for_each(snapshot: Path, run: Path) -> None:
    sockets = [run / "one", run / "two"]
    with (
        pagekit.Template(f"file:{snapshot}/memory") as template,
        pagekit.Server(template, firecracker=sockets),
    ):
        restore(snapshot, run, "Uffd", sockets)


@pytest.mark.parametrize("count", [1, 20])
def test_over_the_mount(snapshot: Path, run: Path, count: int) -> None:
    support.need_fuse()
    (run / "mount").mkdir()
    mount = pagekit.Mount(run / "mount", passthrough="never")
    with (
        pagekit.Template(f"file:{snapshot}/memory") as template,
        pagekit.Server(template, mount=mount) as server,
    ):
        assert server.mount_path is not None
        restore(snapshot, run, "File", [server.mount_path] * count)
        assert server.statistics()["mount"]["opens"] == count


def test_a_working_set_leaves_nothing_to_ask_for(snapshot: Path, run: Path) -> None:
    spec, path = f"file:{snapshot}/memory", run / "socket"
    with pagekit.Template(spec) as template:
        recording = template.record()
        with pagekit.Server(template, firecracker=path):
            restore(snapshot, run, "Uffd", [path])
        working_set = recording.finish()
    assert working_set.pages >= PAGES
    with pagekit.Template(spec) as template, pagekit.Server(template, firecracker=path) as server:
        assert template.replay(working_set).wait(PATIENCE)
        with Firecracker(run, "vmm") as vmm:
            vmm.load(snapshot, "Uffd", path)
            filled = lambda: server.statistics()["ahead_pages"] >= working_set.pages  # noqa: E731
            support.until(filled, "the target was filled ahead")
            before = server.statistics()["demand_faults"]
            vmm.go()
            vmm.finds_everything_right()
            assert server.statistics()["demand_faults"] - before < working_set.pages // 100


def test_pages_of_2_mib(kernel: Path, run: Path) -> None:
    with support.sysctl("vm/nr_hugepages", "200"):
        available = int(Path("/proc/sys/vm/nr_hugepages").read_text())
        need("hugetlb", available >= 200, "not enough huge pages could be made")
        snapshot = freeze(kernel, run, huge_pages="2M")
        with (
            pagekit.Template(f"file:{snapshot}/memory") as template,
            pagekit.Server(template, firecracker=run / "socket") as server,
        ):
            restore(snapshot, run, "Uffd", [run / "socket"] * 2)
            assert server.wait(PATIENCE) and not server.statistics()["reports"]
