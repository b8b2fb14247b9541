"""The QEMU program: finding it, and the accelerator that works with it here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import QemuMissing, Unsupported, UsageError
from .guest import default_cache
from .process import Child
from .rundir import RunDirectory

NAME = "qemu-system-x86_64"
_INSTALL = "apt-get install -y --no-install-recommends qemu-system-x86"

# A kernel without an initramfs gets this far and no further. What comes before proves nothing:
# where /dev/kvm is emulated, a kernel may print its first line and then stop at an instruction.
_WORKED = b"Unable to mount root fs"
_PROBE_TIMEOUT = 20.0


@dataclass(frozen=True)
class Program:
    """A QEMU program."""

    path: str
    version: str


@dataclass(frozen=True)
class Accelerator:
    """How QEMU runs the guest's instructions, ``kvm`` or ``tcg`` (emulated), and why so."""

    name: str
    reason: str


def find_qemu(name: str = NAME) -> Program:
    """Find QEMU on PATH, or at the path given, and ask for its version.

    Raises:
        QemuMissing: there is none, or it does not start.
    """
    path = shutil.which(name)
    if path is None:
        raise QemuMissing(f"{name} not found", hint=f"as root: {_INSTALL}")
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise QemuMissing(f"{path} does not start: {error}", hint=f"as root: {_INSTALL}") from error
    found = re.search(r"version (\S+)", said)
    if not found:
        raise QemuMissing(f"{path} is not QEMU", hint=f"as root: {_INSTALL}")
    return Program(path, found[1])


def pick_accelerator(
    program: Program, kernel: Path, *, wanted: str = "auto", cache: Path | None = None
) -> Accelerator:
    """Return the accelerator to use: KVM if a kernel really boots with it, else TCG.

    The presence of /dev/kvm says little: it may be emulated, incomplete or forbidden. So a kernel
    is booted, up to the point where it misses its root file system. The verdict is remembered for
    this kernel, this QEMU and this boot of the host.

    Args:
        program: the QEMU to use.
        kernel: what to boot.
        wanted: ``auto``, ``kvm`` or ``tcg``.
        cache: where to remember; the cache directory of the guest if None.

    Raises:
        Unsupported: ``kvm`` is wanted and does not work here.
        UsageError: ``wanted`` is none of the three.
    """
    if wanted == "tcg":
        return Accelerator("tcg", "as asked for")
    if wanted not in ("auto", "kvm"):
        raise UsageError(f"no accelerator is called {wanted}", hint="auto, kvm or tcg")
    memory = _memory(cache)
    question = _question(program, kernel)
    refused = _remembered(memory, question)
    if refused is None:
        refused = _try_kvm(program, kernel)
        _remember(memory, question, refused)
    if not refused:
        return Accelerator("kvm", "it boots a kernel here")
    if wanted == "kvm":
        raise Unsupported(
            f"kvm does not work here: {refused}", hint="`--accelerator tcg` emulates instead"
        )
    return Accelerator("tcg", f"kvm does not work here: {refused}")


def why_not_kvm(program: Program, kernel: Path, *, cache: Path | None = None) -> str | None:
    """Return why KVM does not work here, "" if it does, None if nobody has tried yet."""
    return _remembered(_memory(cache), _question(program, kernel))


def _memory(cache: Path | None) -> Path:
    return (cache or default_cache()) / "accelerator.json"


def _try_kvm(program: Program, kernel: Path) -> str:
    """Boot a kernel with KVM; return why it did not work, or nothing."""
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no permission for /dev/kvm"
    with RunDirectory() as run:
        console = run.path / "console"
        child = Child(
            [
                *(program.path, "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "256M"),
                *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
                *("-serial", f"file:{console}", "-kernel", str(kernel)),
                *("-append", "console=ttyS0 panic=-1"),
            ],
            environment={},
            fds=(),
            log=run.path / "stderr",
        )
        try:
            status = child.wait(_PROBE_TIMEOUT)
        finally:
            child.kill()
        if console.exists() and _WORKED in console.read_bytes():
            return ""
        if status is None:
            return f"a kernel did not boot within {_PROBE_TIMEOUT:.0f} s"
        said = child.log().splitlines()
        return said[0].removeprefix(f"{NAME}: ") if said else f"QEMU ended with status {status}"


def _question(program: Program, kernel: Path) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file = kernel.stat()
    access = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return f"{boot} {program.version} {kernel.resolve()} {file.st_size} {file.st_mtime_ns} {access}"


def _remembered(memory: Path, question: str) -> str | None:
    try:
        known = json.loads(memory.read_text())
        return str(known["refused"]) if known["question"] == question else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(memory: Path, question: str, refused: str) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
            json.dump({"question": question, "refused": refused}, file)
        Path(file.name).rename(memory)
    except OSError:
        pass  # a cache that cannot be written only costs the next one some seconds
