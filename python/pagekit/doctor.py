"""Can this machine serve memory, and if not, what would mend it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import PagekitError

if TYPE_CHECKING:
    from . import uffd

State = Literal["yes", "limited", "no"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that pagekit needs or can use.

    ``remedy`` is the command that mends it; empty where there is nothing to mend.
    ``needed_for`` says what does not work without it.
    """

    name: str
    state: State
    found: str
    needed_for: str
    remedy: str = ""


def examine() -> list[Check]:
    """Looks at this machine; changes nothing, and needs no privilege. Takes well under a second."""
    checks = [_system()]
    if checks[0].state == "no":
        return checks
    core = _core()
    checks.append(core)
    if core.state == "yes":
        checks += [*_userfaultfd(), _template_file(), _fuse()]
    return [*checks, _qemu(), _kvm(), _guest(), _memory(), _mappings()]


def userfaultfd() -> uffd.Support | None:
    """Every feature of userfaultfd, and whether it can be used; None without a core to look."""
    try:
        from . import uffd

        return uffd.support()
    except PagekitError:
        return None


def can_serve(checks: list[Check]) -> bool:
    """Whether the main job works: served forks, not only plain mappings."""
    served = {check.name: check.state for check in checks}
    return served.get("userfaultfd") == "yes" and served.get("qemu") == "yes"


def _system() -> Check:
    found = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform != "linux":
        remedy = "run pagekit on Linux, or in a Linux virtual machine"
        return Check("system", "no", found, "everything", remedy)
    return Check("system", "yes", found, "everything")


def _core() -> Check:
    try:
        from ._native import core

        core()
    except PagekitError as error:
        return Check("core", "no", str(error), "everything", error.hint or "")
    return Check("core", "yes", "the compiled core is installed", "everything")


def _userfaultfd() -> list[Check]:
    from . import uffd
    from ._native import core

    way, features, fork_events, reason, hint = core().probe()
    served = "serving memory on demand (without: plain mappings, loaded whole where they must be)"
    if way is None and uffd.support().has("USER_MODE_ONLY"):
        found = (
            f"{reason}; what works is pagekit.uffd with user_mode_only=True: faults of the program"
            " itself, while system calls that meet a missing page fail with EFAULT"
        )
        return [Check("userfaultfd", "limited", found, served, hint or "")]
    if way is None:
        return [Check("userfaultfd", "no", reason or "", served, hint or "")]
    checks = [Check("userfaultfd", "yes", f"by {way}, {len(features)} features", served)]
    children = "children of served programs (without: they get SIGSEGV on served memory)"
    if fork_events:
        checks.append(Check("fork events", "yes", "this user may have them", children))
    else:
        remedy = "run the server as root, or: sudo setcap cap_sys_ptrace+ep on the server program"
        checks.append(
            Check("fork events", "limited", "CAP_SYS_PTRACE is missing", children, remedy)
        )
    failing = "a page that cannot be had (without: the program is killed)"
    if "POISON" in features:
        checks.append(Check("poison", "yes", "it raises SIGBUS where it is touched", failing))
    else:
        remedy = "use Linux 6.6 or newer"
        checks.append(Check("poison", "limited", "this kernel lacks it", failing, remedy))
    return checks


def _template_file() -> Check:
    from .template import Template

    purpose = "keeping programs from writing what all share"
    with Template("zero:64K") as template:
        protection = str(template.statistics()["protection"])
    if protection == "read-only mount":
        return Check("template file", "yes", "on a detached tmpfs, read-only for programs", purpose)
    return Check(
        "template file",
        "limited",
        "a sealed memfd (trimming it is not possible)",
        purpose,
        "run the server with CAP_SYS_ADMIN",
    )


def _fuse() -> Check:
    purpose = "pagekit mount (without: Firecracker and QEMU by their sockets)"
    if not Path("/dev/fuse").exists():
        remedy = "sudo modprobe fuse, or hand /dev/fuse to the container"
        return Check("fuse", "limited", "there is no /dev/fuse", purpose, remedy)
    if os.geteuid() == 0:
        return Check("fuse", "yes", "this user may mount", purpose)
    if shutil.which("fusermount3") is None:
        remedy = "sudo apt-get install -y --no-install-recommends fuse3"
        found = "fusermount3, by which users mount, is not on PATH"
        return Check("fuse", "limited", found, purpose, remedy)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        remedy = "sudo chmod a+rw /dev/fuse"
        return Check("fuse", "limited", "/dev/fuse may not be opened", purpose, remedy)
    return Check("fuse", "yes", "by fusermount3; files for this user alone", purpose)


def _qemu() -> Check:
    purpose = "pagekit demo, pagekit boot"
    program = shutil.which("qemu-system-x86_64")
    remedy = "sudo apt-get install -y --no-install-recommends qemu-system-x86"
    if program is None:
        return Check("qemu", "no", "qemu-system-x86_64 is not on PATH", purpose, remedy)
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("qemu", "no", f"{program} does not start: {error}", purpose, remedy)
    return Check("qemu", "yes", answer.stdout.splitlines()[0], purpose)


def _kvm() -> Check:
    purpose = "fast guests (without: TCG, an emulator)"
    if not Path("/dev/kvm").exists():
        return Check("kvm", "limited", "there is no /dev/kvm", purpose, "enable virtualization")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        remedy = "sudo usermod -aG kvm $USER, then log in again"
        return Check("kvm", "limited", "/dev/kvm may not be opened", purpose, remedy)
    refused = _why_not_kvm()
    if refused is None:
        found = "/dev/kvm can be opened; nobody has tried yet whether it boots Linux"
        return Check("kvm", "limited", found, purpose, "pagekit demo")
    if refused:
        return Check("kvm", "limited", f"it does not boot Linux here: {refused}", purpose)
    return Check("kvm", "yes", "it boots Linux here", purpose)


def _why_not_kvm() -> str | None:
    from .sandbox import guest, program

    try:
        kernel = guest.default_cache() / "guest" / "vmlinuz"
        return program.why_not_kvm(program.find_qemu(), kernel)
    except (OSError, PagekitError):
        return None


def _guest() -> Check:
    from .sandbox import guest

    purpose = "pagekit demo"
    kernel = guest.default_cache() / "guest" / "vmlinuz"
    if not kernel.exists():
        return Check("guest", "limited", f"{kernel} is not there", purpose, "make setup")
    return Check("guest", "yes", str(kernel.parent), purpose)


def _memory() -> Check:
    purpose = "room for templates and forks"
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) // 1024
    limit = _cgroup_room()
    room = available if limit is None else min(available, limit)
    found = f"{room} MiB available"
    if limit is not None and limit < available:
        found += " below this process's memory limit"
    if room < 1024:
        return Check("memory", "limited", found, purpose, "free memory, or raise the limit")
    return Check("memory", "yes", found, purpose)


def _cgroup_room() -> int | None:
    """MiB that the tightest memory cgroup above this process leaves; None without a limit."""
    room: int | None = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            mount, files = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes memory.usage_in_bytes",
            )
        elif controllers == "":
            mount, files = Path("/sys/fs/cgroup"), "memory.max memory.current"
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount.parent:
            try:
                limit, usage = ((group / name).read_text().strip() for name in files.split())
            except OSError:
                limit = usage = "max"
            if limit != "max" and int(limit) < 1 << 60:
                left = (int(limit) - int(usage)) >> 20
                room = left if room is None else min(room, left)
            group = group.parent
    return room


def _mappings() -> Check:
    purpose = "zero runs that never trap"
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    found = f"vm.max_map_count is {limit}"
    if limit < 32768:
        remedy = "sudo sysctl vm.max_map_count=65530"
        return Check("mappings", "limited", found, purpose, remedy)
    return Check("mappings", "yes", found, purpose)
