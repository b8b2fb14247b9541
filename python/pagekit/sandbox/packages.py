"""Debian's packages: looked up, downloaded, and their archives handed out; nothing is installed.

The machine's own apt is asked, as whoever runs this; root is not needed. It checks what it
downloads against the signatures of the archive.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

from ..errors import GuestMissing

WORK = "guest-"
"""How names of temporary directories begin; one still there was left by a process that died."""

ROOM = "PAGEKIT_CACHE names another directory; 300 MB are needed while the guest is made"


class Apt:
    """The machine's apt, asked as if no package were installed.

    Args:
        directory: where archives are kept.
        environment: what to add to ours for apt; APT_CONFIG, for other sources than the machine's.

    Raises:
        GuestMissing: there is no apt, or no packages for this architecture; so do all methods if
            apt fails, or does not know a package.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        if not shutil.which("apt-get"):
            raise GuestMissing(
                "apt-get not found: the guest is made of Debian's packages",
                hint="use Debian, or boot your own with `pagekit boot --kernel FILE --initrd FILE`",
            )
        architecture = run(["dpkg", "--print-architecture"]).strip()
        if architecture != "amd64":
            raise GuestMissing(
                f"the guest is made for amd64 machines, and this one is {architecture}"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._environment = environment
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

    def update(self) -> None:
        """Fetch the lists of packages, from every source that can be reached."""
        self._ask("apt-get", "--quiet", "update")

    def versions(self, package: str) -> list[str]:
        """Return the versions of ``package`` that there are, the newest first."""
        listed = self._ask("apt-cache", "madison", package)
        found = re.findall(r"^[^|]*\| *([^ |]+) *\|", listed, re.MULTILINE)
        return list(dict.fromkeys(found))

    def kernel(self, package: str) -> list[str]:
        """Return the packages with the files of the kernel that ``package`` (or NAME=VERSION) is.

        It names them, directly or not, in exactly its own version: one with the kernel, and since
        7.x others, of which one has the modules. What else a kernel depends on is for machines that
        install it.
        """
        told = self._ask("apt-cache", "show", "--no-all-versions", package)
        depends = re.search(r"^Depends: (.*)", told, re.MULTILINE)
        needed = re.findall(r"(linux-[^ ,|]+) \(= ([^)]+)\)", depends[1] if depends else "")
        found = [package]
        for name, version in needed:
            found += self.kernel(f"{name}={version}")
        return list(dict.fromkeys(found))

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
            say(f"downloading {len(missing)} packages through apt, to unpack: nothing is installed")
            with tempfile.TemporaryDirectory(prefix=WORK, dir=self._directory.parent) as fresh:
                names = ["=".join(unquote(archive.name).split("_")[:2]) for archive in missing]
                self._ask("apt-get", "--quiet", "download", *names, directory=fresh)
                for file in Path(fresh).iterdir():
                    file.rename(self._directory / file.name)
        for old in set(self._directory.glob("*.deb")) - set(wanted):
            old.unlink()
        return wanted

    def _ask(self, program: str, *arguments: str, directory: str | None = None) -> str:
        try:
            return run(
                [program, *self._options, *arguments],
                directory=directory,
                environment=self._environment,
            )
        except GuestMissing as error:
            raise _not_found(error.message) from error


def find(root: Path, *names: str) -> Path:
    """Return the first of ``names`` that exists: distributions move files from /lib to /usr/lib."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise GuestMissing(f"no package of the guest has {names[-1]}")


def _not_found(detail: str) -> GuestMissing:
    full = "No space left" in detail
    return GuestMissing(
        f"apt cannot provide the guest's packages: {detail}",
        hint=ROOM if full else "as root, `apt-get update` fetches the lists of packages anew",
    )


def run(
    command: list[str],
    *,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
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


def say(text: str) -> None:
    """Say on standard error what takes time."""
    print(f"guest: {text}", file=sys.stderr, flush=True)
