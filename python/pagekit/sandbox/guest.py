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
import io
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import GuestMissing

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

_WORK = "guest-"
"""How names of temporary directories begin; one still there was left by a process that died."""

_ROOM = "PAGEKIT_CACHE names another directory; 300 MB are needed while the guest is made"

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
                for abandoned in cache.glob(f"{_WORK}*"):
                    shutil.rmtree(abandoned)
                guest = _make(cache)
    except OSError as error:
        raise GuestMissing(
            f"cannot make the guest in {cache}: {error}",
            hint=_ROOM,
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
    files = (Path(__file__), Path(__file__).with_name("guest_agent.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _make(cache: Path) -> Guest:
    """Download, unpack, pack, and put the result in place in one step."""
    apt = _Apt(cache / "packages")
    kernel = apt.dependency(KERNEL)
    packages = apt.closure(PACKAGES)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=cache) as name:
        work = Path(name)
        made, root, kernel_root = work / "made", work / "root", work / "kernel"
        for directory in (made, root, kernel_root):
            directory.mkdir()

        archives = apt.download([kernel, *packages])
        _say(f"unpacking {len(archives)} packages")
        for archive in archives:
            _run(
                [
                    "dpkg-deb",
                    "-x",
                    str(archive),
                    str(kernel_root if archive.name.startswith("linux-") else root),
                ]
            )

        _say("packing the initramfs")
        (vmlinuz,) = (kernel_root / "boot").glob("vmlinuz-*")
        shutil.copyfile(vmlinuz, made / "vmlinuz")
        with (made / "initrd").open("wb") as output:
            _Initramfs(output).write(root, kernel_root)
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
    _say(
        f"guest ready in {final}: "
        + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items()))
    )
    return guest


class _Apt:
    """The machine's apt, asked as if no package were installed."""

    def __init__(self, directory: Path) -> None:
        if not shutil.which("apt-get"):
            raise GuestMissing(
                "apt-get not found: the guest is made of Debian's packages",
                hint="use Debian, or boot your own with `pagekit boot --kernel FILE --initrd FILE`",
            )
        architecture = _run(["dpkg", "--print-architecture"]).strip()
        if architecture != "amd64":
            raise GuestMissing(
                f"the guest is made for amd64 machines, and this one is {architecture}"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        nothing_installed = directory / "status"
        nothing_installed.touch()
        # The versions that count are the mirror's, not those installed here. The user that apt
        # downloads as, when run by root, cannot write into a private checkout.
        self._options = [
            "-o",
            f"Dir::State::status={nothing_installed}",
            "-o",
            "APT::Sandbox::User=root",
        ]

    def dependency(self, package: str) -> str:
        """Return the first package that ``package`` depends on."""
        listed = self._ask("apt-cache", "depends", "--important", package)
        found = re.search(r"^ *Depends: ([^<\s]+)", listed, re.MULTILINE)
        if not found:
            raise _not_found(package)
        return found[1]

    def closure(self, packages: Iterable[str]) -> list[str]:
        """Return all that ``packages`` need, themselves included."""
        listed = self._ask("apt-get", "--simulate", "--no-install-recommends", "install", *packages)
        return re.findall(r"^Inst (\S+)", listed, re.MULTILINE)

    def download(self, packages: list[str]) -> list[Path]:
        """Return the archives of ``packages``, downloading those that are not here yet."""
        listed = self._ask("apt-get", "--print-uris", "download", *packages)
        # 'http://…' name_version_architecture.deb size hash
        wanted = [
            self._directory / line.split()[1]
            for line in listed.splitlines()
            if line.startswith("'")
        ]
        missing = [archive for archive in wanted if not archive.exists()]
        if missing:
            _say(
                f"downloading {len(missing)} packages through apt, to unpack: nothing is installed"
            )
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=self._directory.parent) as fresh:
                names = [archive.name.partition("_")[0] for archive in missing]
                self._ask("apt-get", "--quiet", "download", *names, directory=fresh)
                for file in Path(fresh).iterdir():
                    file.rename(self._directory / file.name)
        for old in set(self._directory.glob("*.deb")) - set(wanted):
            old.unlink()
        return wanted

    def _ask(self, program: str, *arguments: str, directory: str | None = None) -> str:
        try:
            return _run([program, *self._options, *arguments], directory=directory)
        except GuestMissing as error:
            raise _not_found(error.message) from error


class _Initramfs:
    """Writes a cpio archive (``newc``, Documentation/driver-api/early-userspace in the kernel).

    Each entry is a header of 110 characters, the name, and the content, each padded to four bytes.
    Not compressed: unpacking costs an emulated processor more than reading does.
    """

    def __init__(self, output: io.BufferedIOBase) -> None:
        self._output = output
        self._inode = 0
        self._directories: set[PurePosixPath] = set()

    def write(self, root: Path, kernel_root: Path) -> None:
        """Write the guest's files, from the packages unpacked in ``root`` and ``kernel_root``."""
        for name in ("dev", "proc", "sys", "run", "tmp", "root"):
            self._directory(PurePosixPath(name))
        # The kernel opens this before /init runs: without it, /init has no standard output.
        self._entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

        busybox = _find(root, "bin/busybox", "usr/bin/busybox")
        self._file("bin/busybox", busybox.read_bytes(), executable=True)
        for applet in _run([str(busybox), "--list"]).split():
            if applet != "busybox":
                self._link(f"bin/{applet}", "busybox")

        modules = _module_order(kernel_root)
        for name, module in modules.items():
            self._file(f"lib/modules/{name}.ko", module)
        self._file("init", _INIT.format(modules=" ".join(modules)).encode(), executable=True)

        python = _Python(root)
        self._file("usr/bin/python3", python.program.read_bytes(), executable=True)
        for name, file in (*python.library(), *python.shared_libraries()):
            self._file(name, file.read_bytes(), executable=".so" in name)
        self._entry("TRAILER!!!", 0)

    def _file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        self._directory(PurePosixPath(name).parent)
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def _link(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def _directory(self, path: PurePosixPath) -> None:
        for part in [*reversed(path.parents), path]:
            if part.name and part not in self._directories:
                self._directories.add(part)
                self._entry(str(part), stat.S_IFDIR | 0o755)

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


class _Python:
    """Debian's Python, unpacked: what of it goes into the guest, with the agent."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (self.program,) = (
            file for file in (root / "usr/bin").glob("python3.*") if file.name[8:].isdigit()
        )
        # Through its own loader and C library, it runs on any distribution.
        self._loader = _find(
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
        return _run([*loader, *arguments], environment=environment)


def _module_order(kernel_root: Path) -> dict[str, bytes]:
    """Return the kernel modules that the guest loads, each after those it depends on."""
    files = {re.sub(r"\.ko.*", "", file.name): file for file in kernel_root.rglob("*.ko*")}
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

    for name in MODULES:
        add(name)
    return ordered


def _find(root: Path, *names: str) -> Path:
    """Return the first of ``names`` that exists: distributions move files from /lib to /usr/lib."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise GuestMissing(f"no package of the guest has {names[-1]}")


def _not_found(detail: str) -> GuestMissing:
    full = "No space left" in detail
    return GuestMissing(
        f"apt cannot provide the guest's packages: {detail}",
        hint=_ROOM if full else "as root, `apt-get update` fetches the lists of packages anew",
    )


def _run(
    command: list[str], *, directory: str | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run ``command`` and return its output.

    Raises:
        GuestMissing: it is not there or failed; the message ends with what it said last.
    """
    everything = {**os.environ, "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(
            command, cwd=directory, env=everything, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise GuestMissing(
            f"{command[0]} not found", hint=f"install the package that has {command[0]}"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"]
        raise GuestMissing(
            f"{Path(command[0]).name} failed with status {done.returncode}: {said[-1]}"
        )
    return done.stdout


def _say(text: str) -> None:
    print(f"guest: {text}", file=sys.stderr, flush=True)


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
