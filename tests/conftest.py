"""Frozen guests, each booted once for all tests that fork it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

from pagekit.errors import QemuMissing
from pagekit.sandbox import Qemu, RunDirectory, Snapshot, find_qemu
from pagekit.sandbox.guest import Guest, ensure

# A shell that runs the tests in the background lets them ignore SIGINT, and what they start
# inherits that: programs would take no notice of an interruption that is meant for them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The demo's kernel and initramfs."""
    try:
        find_qemu()
        found = True
    except QemuMissing:
        found = False
    support.need("qemu", found, "qemu-system-x86_64 is not installed")
    return ensure()


@pytest.fixture(scope="session")
def frozen(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the template of :func:`snapshot` drew at random, just before it was frozen."""
    directory = tmp_path_factory.mktemp("frozen") / "snapshot"
    with Qemu.boot(guest.kernel, guest.initrd) as template:
        drawn = template.exec(
            "result = [os.urandom(16).hex(), str(uuid.uuid4()), random.random()]"
        ).result
        template.freeze(directory)
    return {"directory": str(directory), "drawn": str(drawn)}


@pytest.fixture(scope="session")
def snapshot(frozen: dict[str, str]) -> Iterator[Snapshot]:
    """A snapshot of the demo's guest. At the end it must be what it was."""
    found = Snapshot.load(frozen["directory"])
    before = found.digest()
    yield found
    assert found.digest() == before


@pytest.fixture(scope="session")
def balloon_snapshot(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """The same guest with a balloon, and reporting free pages."""
    directory = tmp_path_factory.mktemp("balloon") / "snapshot"
    with Qemu.boot(guest.kernel, guest.initrd, balloon=True) as template:
        found = template.freeze(directory)
    before = found.digest()
    yield found
    assert found.digest() == before


@pytest.fixture
def run() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with RunDirectory() as directory:
        yield directory.path
