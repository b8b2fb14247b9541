"""`pagekit doctor`: what it finds for root and for others, with each knob turned, and says then."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
from support import Nobody, need, program, sysctl

import pagekit
from pagekit import doctor, uffd
from pagekit.uffd import table

PAGEKIT = [Path(sys.executable).with_name("pagekit")]
PAGE = Path(__file__).parent.parent / "docs" / "userfaultfd.md"
DEVICE = Path("/dev/userfaultfd")
PACKAGE = Path(pagekit.__file__).parent

# What doctor finds out, without the command line's dependencies, which others may not reach.
LOOK = """
import dataclasses, json
from pagekit import doctor, errors, uffd
if doctor.userfaultfd().has("USER_MODE_ONLY"):
    uffd.Userfaultfd(user_mode_only=True).close()
try:
    with uffd.Userfaultfd() as faults:
        opened = sorted(faults.features)
except errors.PermissionDenied as error:
    opened = [str(error), error.hint]
checks = doctor.examine()
print(json.dumps({
    "can_serve": doctor.can_serve(checks),
    "checks": [dataclasses.asdict(check) for check in checks],
    "userfaultfd": dataclasses.asdict(doctor.userfaultfd()),
    "opened": opened,
}))
"""


class Findings:
    """What was found, by name."""

    def __init__(self, text: str) -> None:
        report = json.loads(text)
        self.can_serve: bool = report["can_serve"]
        self.checks: dict[str, Any] = {check["name"]: check for check in report["checks"]}
        rows = report["userfaultfd"]["features"]
        self.states: dict[str, str] = {row["name"]: row["state"] for row in rows}
        self.remedies: dict[str, str] = {row["name"]: row["remedy"] for row in rows}
        self.opened: list[str] = report.get("opened")

    def refused(self) -> set[str]:
        return {name for name, state in self.states.items() if state == "not permitted"}


class Other:
    """Looks as another user, with a copy of the package that it can read."""

    def __init__(self, directory: Path) -> None:
        self.nobody = Nobody(directory)
        leave = shutil.ignore_patterns("__pycache__", "pagekitd", "_shim*")
        shutil.copytree(PACKAGE, directory / "pagekit", ignore=leave)
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o755)
        self.directory = directory

    def looks(self, prefix: Sequence[object] = (), **who: Any) -> Findings:
        command = [*map(str, prefix), self.nobody.python, "-c", LOOK]
        process = support.start(
            command,
            {"PYTHONPATH": str(self.directory), "HOME": str(self.directory)},
            cwd=self.directory,
            **(who or self.nobody.who),
        )
        with support.stopping(process):
            return Findings(support.ended(process)[0])


@pytest.fixture
def other() -> Iterator[Other]:
    support.need_root()
    with support.reachable_directory() as directory:
        yield Other(directory)


@pytest.fixture
def closed_device() -> Iterator[None]:
    """The device as a machine has it at first: for root alone."""
    support.need_root()
    need("userfaultfd", DEVICE.exists(), "there is no /dev/userfaultfd (Linux 6.1)")
    with device_of(0, 0o600):
        yield


@contextmanager
def device_of(user: int, mode: int) -> Iterator[None]:
    before = DEVICE.stat()
    os.chown(DEVICE, user, -1)
    DEVICE.chmod(mode)
    try:
        yield
    finally:
        os.chown(DEVICE, before.st_uid, -1)
        DEVICE.chmod(stat.S_IMODE(before.st_mode))


def test_root_has_what_the_kernel_has(closed_device: None) -> None:
    found = subprocess.run([*PAGEKIT, "doctor", "--json"], capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    findings = Findings(found.stdout)
    assert not findings.refused()
    assert findings.checks["userfaultfd"]["state"] == "yes"
    release = table._release(os.uname().release)
    for row in uffd.features():
        has = findings.states[row.name] == "yes"
        # A distribution may bring things back to older kernels, and leave out what it likes.
        assert has or row.remedy, row
        assert has or release >= table._release(row.since) or "or newer" in row.remedy, row
    for name in ("SIGBUS", "EVENT_FORK", "KERNEL_FAULTS", "USER_MODE_ONLY"):
        need("userfaultfd", findings.states[name] == "yes", f"this kernel lacks {name}")


def test_an_unprivileged_user_has_user_mode_only(other: Other, closed_device: None) -> None:
    with sysctl("vm.unprivileged_userfaultfd", "0"):
        found = other.looks()
    assert found.refused() == {"EVENT_FORK", "KERNEL_FAULTS", "DEVICE"}
    assert found.states["USER_MODE_ONLY"] == found.states["THREAD_ID"] == "yes"
    assert "sysctl vm.unprivileged_userfaultfd=1" in found.remedies["KERNEL_FAULTS"]
    assert "setfacl -m u:$USER:rw /dev/userfaultfd" in found.remedies["DEVICE"]
    assert "setcap cap_sys_ptrace+ep" in found.remedies["EVENT_FORK"]
    check = found.checks["userfaultfd"]
    assert check["state"] == "limited" and not found.can_serve
    assert "user_mode_only=True" in check["found"] and "EFAULT" in check["found"]
    assert "fork events" not in found.checks
    reason, hint = found.opened
    assert "not permitted to this user" in reason and "/dev/userfaultfd" in reason
    assert "user_mode_only=True" in hint and "sysctl" in hint


def test_an_unprivileged_user_with_the_sysctl(other: Other, closed_device: None) -> None:
    with sysctl("vm.unprivileged_userfaultfd", "1"):
        found = other.looks()
    assert found.refused() == {"EVENT_FORK", "DEVICE"}
    assert found.states["KERNEL_FAULTS"] == "yes" and found.remedies["KERNEL_FAULTS"] == ""
    assert found.checks["userfaultfd"]["state"] == "yes"
    assert found.checks["fork events"]["state"] == "limited"
    assert found.opened == []


def test_an_unprivileged_user_with_the_device(other: Other, closed_device: None) -> None:
    with sysctl("vm.unprivileged_userfaultfd", "0"), device_of(support.NOBODY, 0o600):
        found = other.looks()
    assert found.refused() == {"EVENT_FORK"}
    assert found.states["DEVICE"] == found.states["KERNEL_FAULTS"] == "yes"
    assert found.checks["userfaultfd"]["state"] == "yes"
    assert "by device" in found.checks["userfaultfd"]["found"]


def test_an_unprivileged_user_with_the_capability(other: Other, closed_device: None) -> None:
    need("setpriv", shutil.which("setpriv"), "no setpriv")
    who = ["setpriv", f"--reuid={support.NOBODY}", f"--regid={support.NOBODY}", "--clear-groups"]
    capable = [*who, "--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]
    with sysctl("vm.unprivileged_userfaultfd", "0"):
        found = other.looks(capable, user=0)
    assert found.refused() == {"DEVICE"}
    assert found.checks["fork events"]["state"] == "yes"


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_a_seccomp_filter_is_named(error: str, other: Other, closed_device: None) -> None:
    """It refuses even what everybody may have, and only the device goes around it."""
    found = other.looks([program("filter"), error])
    bits = {row.name for row in uffd.features() if row.bit is not None}
    here = {row.name for row in uffd.features() if row.state == "yes"}
    tried = {"KERNEL_FAULTS", "USER_MODE_ONLY", "DEVICE", "CONTINUE_MODE_WP"}
    assert bits | tried == found.refused() and here - bits - tried <= {"PAGEMAP_SCAN"}
    for name in (bits | tried) - {"DEVICE"}:
        assert "seccomp" in found.remedies[name], name
        assert "setfacl" in found.remedies[name], name
    assert found.checks["userfaultfd"]["state"] == "no"
    assert "seccomp" in found.opened[0] and "seccomp" in found.opened[1]
    assert "seccomp" in found.checks["userfaultfd"]["found"]

    with device_of(support.NOBODY, 0o600):
        found = other.looks([program("filter"), error])
    assert found.refused() == {"USER_MODE_ONLY", "EVENT_FORK"}
    assert found.checks["userfaultfd"]["state"] == "yes"


def test_an_empty_pool_of_huge_pages_is_told() -> None:
    with sysctl("vm.nr_hugepages", "0"):
        rows = {row.name: row for row in uffd.features()}
        need("hugetlbfs", rows["MISSING_HUGETLBFS"].state == "yes", "no hugetlbfs in this kernel")
        assert "sysctl vm.nr_hugepages=" in rows["MISSING_HUGETLBFS"].remedy
    with sysctl("vm.nr_hugepages", "2"):
        pool = int(Path("/proc/sys/vm/nr_hugepages").read_text())
        need("huge pages", pool, "no memory for huge pages")
        assert {row.name: row for row in uffd.features()}["MISSING_HUGETLBFS"].remedy == ""


def test_newer_features_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer:
        @staticmethod
        def uffd_table() -> Any:
            return real.uffd_table()

        @staticmethod
        def uffd_kernel() -> Any:
            return real.uffd_kernel()[0], ["bit 40"]

    real = table.core()
    monkeypatch.setattr(table, "core", lambda: Newer)
    assert uffd.support().unknown == ("bit 40",)
    assert uffd.support().has("bit 40") is False


def test_an_older_kernel_is_told_which_is_new_enough() -> None:
    names = [row.name for row in uffd.features()]
    found: dict[str, table.State] = dict.fromkeys(names, "no")
    for row in uffd.features():
        remedy = table._remedy(uffd.Feature(**{**vars(row), "since": "99.1", "state": "no"}), found)
        assert remedy == "use Linux 99.1 or newer", row.name
    old = next(row for row in uffd.features() if row.name == "POISON")
    built = table._remedy(uffd.Feature(**{**vars(old), "state": "no"}), found)
    assert built == "use a kernel that is built with it (Linux can have it since 6.6)"


def test_what_a_person_reads() -> None:
    process = subprocess.run(
        [*PAGEKIT, "doctor"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    said = process.stdout
    assert process.returncode in (0, 1), process.stderr
    verdict = said.splitlines()[0]
    assert verdict.startswith("sandboxes can") and doctor.examine()[0].name in said
    table_of_features = said.split("What userfaultfd has here")[1].splitlines()
    for row in uffd.features():
        line = next(line for line in table_of_features if f" {row.name} " in line)
        assert f" {row.state} " in line and f" {row.since} " in line
    for remedy, names in uffd.lacking(uffd.features()).items():
        assert f"hint: {', '.join(names)}: " in said and remedy.split(" ")[0] in said


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """`python -m pagekit.uffd docs/userfaultfd.md` writes it."""
    committed = PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(committed.replace("`POISON`", "`POTION`"))
    subprocess.run([sys.executable, "-m", "pagekit.uffd", copy], check=True)
    assert copy.read_text() == committed
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    for row in uffd.features():
        assert committed.count(f"`{row.name}`") >= 2, row.name
