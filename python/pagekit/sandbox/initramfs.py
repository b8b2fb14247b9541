"""Initramfs archives, written without a program for it, and what every one of ours has in it."""

from __future__ import annotations

import io
import lzma
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import GuestMissing
from .packages import run


class Initramfs:
    """Writes a cpio archive (``newc``, Documentation/driver-api/early-userspace in the kernel).

    Each entry is a header of 110 characters, the name, and the content, each padded to four bytes.
    Not compressed: unpacking costs an emulated processor more than reading does.
    """

    def __init__(self, output: io.BufferedIOBase) -> None:
        self._output = output
        self._inode = 0
        self._directories: set[PurePosixPath] = set()

    def base(self, busybox: Path) -> None:
        """Write what every guest has: empty directories, a console, and all of busybox in /bin.

        Args:
            busybox: a static one.
        """
        for name in ("dev", "proc", "sys", "run", "tmp", "root"):
            self.directory(PurePosixPath(name))
        # The kernel opens this before /init runs: without it, /init has no standard output.
        self._entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        self.file("bin/busybox", busybox.read_bytes(), executable=True)
        for applet in run([str(busybox), "--list"]).split():
            if applet != "busybox":
                self.link(f"bin/{applet}", "busybox")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Write a file, and the directories it lies in."""
        self.directory(PurePosixPath(name).parent)
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """Write a symbolic link; its directory must be there."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def directory(self, path: PurePosixPath) -> None:
        """Write a directory, and those it lies in, unless they were written already."""
        for part in [*reversed(path.parents), path]:
            if part.name and part not in self._directories:
                self._directories.add(part)
                self._entry(str(part), stat.S_IFDIR | 0o755)

    def end(self) -> None:
        """Write what ends an archive."""
        self._entry("TRAILER!!!", 0)

    def _entry(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device it is on, name size, no checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._output.write(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
        self._output.write(content + b"\0" * (-len(content) % 4))


def kernel_image(root: Path) -> Path:
    """Return the file to boot, of a kernel whose packages were unpacked in ``root``.

    Raises:
        GuestMissing: there is none, or more than one.
    """
    found = [
        file
        for place in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz")
        for file in root.glob(place)
    ]
    if len(found) != 1:
        raise GuestMissing(f"the packages of the kernel have {len(found)} kernels, not one")
    return found[0]


def kernel_modules(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the kernel modules ``names`` by name, each after those it depends on.

    Those that are built into the kernel are left out.

    Args:
        root: where the kernel's packages were unpacked.
        names: what is wanted.
    """
    files = {re.sub(r"\.ko.*", "", file.name): file for file in root.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return  # not a module: built into this kernel
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for dependency in (depends[1].decode() if depends else "").split(","):
            add(dependency.replace("-", "_"))
        ordered[name] = content

    for name in names:
        add(name)
    return ordered
