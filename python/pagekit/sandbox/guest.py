"""The guest that sandboxes boot: Debian's kernel, busybox and Python, unpacked and never installed.

::

    python -m pagekit.sandbox.guest     makes .cache/guest/{vmlinuz,initrd}, prints where they are

Packages are looked up in, and downloaded through, the machine's own apt, as whoever runs this; root
is not needed. What is made is kept: a complete guest is found again in a millisecond, a half-made
one or one made by another version of this file is made anew.

The guest is a kernel and an initramfs: busybox, Python with most of its standard library as
bytecode, the virtio modules, and :mod:`pagekit.sandbox.guest_agent`, which runs as PID 1.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import GuestMissing
from . import packages
from .initramfs import Initramfs, kernel_image, kernel_modules
from .packages import WORK, Apt, find, run, say

KERNEL = "linux-image-cloud-amd64"
"""The package that depends on the kernel to boot."""

PACKAGES = ("busybox-static", "python3-minimal", "libpython3-stdlib")
"""What the initramfs is made of, with everything these depend on."""

MODULES = ("virtio_pci", "virtio_console", "virtio_balloon")
"""Kernel modules that the guest loads, with those they need."""

_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
"""Where Debian's packages have shared libraries, and where the guest's loader looks for them."""

COMMAND_LINE = "console=ttyS0 panic=-1 quiet"
"""The kernel command line to boot with."""

# What no request in a sandbox without a network and a terminal will miss, by name in the standard
# library. OpenSSL's modules are left out for a reason of their own: its random generator lives in
# the process, so every fork would have to reseed that too. hashlib has all its algorithms without.
_LEFT_OUT = re.compile(
    r"(^|/)(_hashlib|_ssl|_uuid|_curses.*|_dbm|_tkinter|nis|readline|ossaudiodev|_test.*|_xx.*|xx.*)\.[^/]*so$"
    r"|^(ensurepip|idlelib|lib2to3|pydoc_data|test|tkinter|turtledemo|config-[^/]*|__pycache__|dist-packages)/"
    r"|(^|/)(tests?|__pycache__)/|\.(pyc|pyo|a)$"
)

_INIT = """\
#!/bin/busybox sh
# PID 1 of the guest until it becomes the agent. The kernel has mounted nothing yet.
export PATH=/usr/bin:/bin HOME=/root
busybox mount -t devtmpfs dev /dev
busybox mkdir /dev/shm /dev/pts
busybox mount -t tmpfs shm /dev/shm
busybox mount -t devpts pts /dev/pts
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t tmpfs run /run
busybox mount -t tmpfs tmp /tmp
for module in {modules}; do busybox insmod /lib/modules/$module.ko; done
exec /usr/bin/python3 -I /usr/lib/pagekit/guest_agent.pyc
"""


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs that boot into the agent."""

    kernel: Path
    initrd: Path


def default_cache() -> Path:
    """Return where downloads and the guest are kept.

    ``PAGEKIT_CACHE`` if set; ``.cache`` of the checkout that this file lies in, its virtual
    environments included; else ``pagekit`` in the user's cache directory.
    """
    if chosen := os.environ.get("PAGEKIT_CACHE"):
        return Path(chosen)
    for parent in Path(__file__).resolve().parents:
        if (parent / "Cargo.toml").is_file() and (parent / "python" / "pagekit").is_dir():
            return parent / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagekit"


def ensure(cache: Path | None = None) -> Guest:
    """Return the guest, making it first if it is not there yet (about ten seconds).

    Any number of processes may call this at once: one makes the guest, the others wait for it.

    Args:
        cache: directory for the guest and its packages; :func:`default_cache` if None.

    Raises:
        GuestMissing: the packages could not be found, downloaded or unpacked; the hint says what
            helps.
    """
    cache = cache or default_cache()
    guest = _complete(cache / "guest")
    if guest:
        return guest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "guest.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            guest = _complete(cache / "guest")
            if not guest:
                for abandoned in cache.glob(f"{WORK}*"):
                    shutil.rmtree(abandoned)
                guest = _make(cache)
    except OSError as error:
        raise GuestMissing(
            f"cannot make the guest in {cache}: {error}",
            hint=packages.ROOM,
        ) from error
    return guest


def _complete(directory: Path) -> Guest | None:
    """Return the guest in ``directory`` if it is whole and made by this version of this file."""
    try:
        stamp = json.loads((directory / "stamp.json").read_text())
        sizes = {name: (directory / name).stat().st_size for name in ("vmlinuz", "initrd")}
    except (OSError, ValueError):
        return None
    if stamp.get("recipe") != _recipe() or stamp.get("sizes") != sizes:
        return None
    return Guest(directory / "vmlinuz", directory / "initrd")


def _recipe() -> str:
    """Return a hash of everything in this package that decides what the guest is."""
    names = ("guest.py", "guest_agent.py", "initramfs.py", "packages.py")
    files = [Path(__file__).with_name(name) for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _make(cache: Path) -> Guest:
    """Download, unpack, pack, and put the result in place in one step."""
    apt = Apt(cache / "packages")
    needed = [*apt.kernel(KERNEL), *apt.closure(PACKAGES)]
    with tempfile.TemporaryDirectory(prefix=WORK, dir=cache) as name:
        work = Path(name)
        made, root, kernel_root = work / "made", work / "root", work / "kernel"
        for directory in (made, root, kernel_root):
            directory.mkdir()

        archives = apt.download(needed)
        say(f"unpacking {len(archives)} packages")
        for archive in archives:
            into = kernel_root if archive.name.startswith("linux-") else root
            run(["dpkg-deb", "-x", str(archive), str(into)])

        say("packing the initramfs")
        shutil.copyfile(kernel_image(kernel_root), made / "vmlinuz")
        with (made / "initrd").open("wb") as output:
            _pack(Initramfs(output), root, kernel_root)
        sizes = {file.name: file.stat().st_size for file in made.iterdir()}
        stamp = {
            "recipe": _recipe(),
            "sizes": sizes,
            "packages": sorted(file.name for file in archives),
        }
        (made / "stamp.json").write_text(json.dumps(stamp, indent=1))

        final = cache / "guest"
        if final.exists():
            final.rename(work / "old")  # goes with the work directory
        made.rename(final)
    guest = _complete(final)
    assert guest is not None
    say(
        f"guest ready in {final}: "
        + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items()))
    )
    return guest


def _pack(initramfs: Initramfs, root: Path, kernel_root: Path) -> None:
    """Write the guest's files, from the packages unpacked in ``root`` and ``kernel_root``."""
    initramfs.base(find(root, "bin/busybox", "usr/bin/busybox"))
    modules = kernel_modules(kernel_root, MODULES)
    for name, module in modules.items():
        initramfs.file(f"lib/modules/{name}.ko", module)
    initramfs.file("init", _INIT.format(modules=" ".join(modules)).encode(), executable=True)

    python = _Python(root)
    initramfs.file("usr/bin/python3", python.program.read_bytes(), executable=True)
    for name, file in (*python.library(), *python.shared_libraries()):
        initramfs.file(name, file.read_bytes(), executable=".so" in name)
    initramfs.end()


class _Python:
    """Debian's Python, unpacked: what of it goes into the guest, with the agent."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (self.program,) = (
            file for file in (root / "usr/bin").glob("python3.*") if file.name[8:].isdigit()
        )
        # Through its own loader and C library, it runs on any distribution.
        self._loader = find(
            root, *(f"{directory}/ld-linux-x86-64.so.2" for directory in _LIBRARIES)
        )
        self._search = ":".join(str(root / directory) for directory in _LIBRARIES)

    def library(self) -> list[tuple[str, Path]]:
        """Return name and file of all of the standard library and the agent, modules as bytecode.

        Debian ships source, to be compiled when a package is installed. In the guest it would be
        compiled again at every boot, so it is compiled here, by the very Python that will read it.
        """
        library = self._root / "usr/lib" / self.program.name
        for file in [file for file in library.rglob("*") if not file.is_dir()]:
            if _LEFT_OUT.search(str(file.relative_to(library))):
                file.unlink()
        agent = self._root / "usr/lib/pagekit"
        agent.mkdir()
        shutil.copy(Path(__file__).with_name("guest_agent.py"), agent)
        compiler = [
            "-I",
            "-m",
            "compileall",
            "-q",
            "-b",
            "-j0",
            "-s",
            str(self._root),
            str(library),
            str(agent),
        ]
        self._run(str(self.program), *compiler, environment={"PYTHONHOME": str(self._root / "usr")})
        return [
            (str(file.relative_to(self._root)), file)
            for file in sorted([*library.rglob("*"), *agent.iterdir()])
            if file.is_file() and file.suffix != ".py"
        ]

    def shared_libraries(self) -> list[tuple[str, Path]]:
        """Return name and file of every shared library that Python and its modules need."""
        users = [
            self.program,
            *(self._root / "usr/lib" / self.program.name / "lib-dynload").glob("*.so"),
        ]
        needed: dict[str, Path] = {}
        for user in users:
            listed = self._run("--list", str(user))
            if missing := re.findall(r"(\S+) => not found", listed):
                raise GuestMissing(
                    f"no package of the guest has {missing[0]}, which {user.name} needs"
                )
            for library in re.findall(r"=> (/\S+)", listed):
                needed[Path(library).name] = Path(library).resolve()
        loader = (
            "ld-linux-x86-64.so.2"  # programs name it by this path; the others are searched for
        )
        return [
            (f"lib64/{name}" if name == loader else f"{_LIBRARIES[0]}/{name}", needed[name])
            for name in sorted(needed)
        ]

    def _run(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        loader = [str(self._loader), "--inhibit-cache", "--library-path", self._search]
        return run([*loader, *arguments], environment=environment)


def main() -> int:
    """Make the guest and print the paths of its two files."""
    try:
        guest = ensure()
    except GuestMissing as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(guest.kernel, guest.initrd, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
