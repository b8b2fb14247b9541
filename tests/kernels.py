"""The binding's and the engine's tests, inside guests with kernels from the distribution's archive.

    make kernels                         the oldest that is served, and the newest there is
    make kernels ARGS='--kernel 6.12'    another one (repeatable; "all", "newest")
    make kernels ARGS=--list             what there is

The kernels are those of the suites that this machine's apt has, and of others of the same archive;
packages are checked by their signatures, unpacked and never installed, and sources are added to a
configuration of our own only (.cache/kernels/apt). Each kernel is booted with the demo's guest, the
tests' programs and the libraries they need; a few minutes each where instructions are emulated.

Failed is: a test that failed, did not end, or was not heard of; a guest that hangs; words of a
kernel about its own bugs; a feature that is not there though the table says since when it is, or
is there before that. What a test lacks on a kernel it says itself, and the table at the end
repeats.

Exit status 1 if anything failed. --json prints all of it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import console
import support
from rich.table import Table

from pagekit import report
from pagekit.client import server_program, shim_path
from pagekit.errors import GuestMissing, PagekitError
from pagekit.sandbox.guest import default_cache
from pagekit.sandbox.guest import ensure as ensure_guest
from pagekit.sandbox.initramfs import Initramfs, kernel_image, kernel_modules
from pagekit.sandbox.packages import Apt, run
from pagekit.sandbox.process import Child
from pagekit.sandbox.program import find_qemu, pick_accelerator

ROOT = Path(__file__).parent.parent
OLDEST = "6.1"
"""Series of the oldest kernel that is served: Debian 12's, the first with /dev/userfaultfd."""

META = "linux-image-cloud-amd64"
"""The package that stands for the newest kernel of a suite."""

CRATES = ("pagekit-uffd", "pagekit")
"""Packages whose tests are run."""

WITHOUT_A_KERNEL = {"pagekit/any_bytes"}
"""Tests of mere bytes, which take long where instructions are emulated."""

MODULES = ("fuse", "loop", "ext4")
"""Kernel modules for the tests: mounts, and a file system on something like a disk."""

LIMIT = 600
"""Seconds that one program may take, on the guest's clock."""

SILENCE = 660.0
"""Seconds without a word after which a guest hangs; more than LIMIT."""

BAD_WORDS = re.compile(
    r"\b(BUG|Oops|WARNING|general protection fault|Kernel panic|rcu: INFO|blocked for more)\b.*"
)
"""What kernels say of their own mistakes."""

INIT = """\
#!/bin/busybox sh
# PID 1. Prepares what the tests need, runs them one by one, and says what came of it (console.py).
# If it cannot prepare that, it ends, and the kernel panics.
set -e
export PATH=/usr/bin:/bin HOME=/root TMPDIR=/disk/tmp PAGEKIT_TEST_SECONDS={limit}
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /disk
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tmpfs run /run
for module in {modules}; do insmod /modules/$module.ko; done
ip link set lo up
# A file system as people have it: neither tmpfs nor the root, which is ramfs.
truncate -s 512M /run/disk
mke2fs -F /run/disk >/dev/null
losetup /dev/loop0 /run/disk
mount -t ext4 /dev/loop0 /disk
mkdir -m 1777 $TMPDIR
set +e
exec >/dev/ttyS1 2>&1
stty raw </dev/ttyS1
now() {{ cut -d' ' -f1 /proc/uptime; }}
perform() {{
    name=$1
    shift
    printf '\\n@@ begin %s %s\\n' "$name" "$(now)"
    timeout -s KILL {limit} "$@" </dev/null
    status=$?
    # What it left behind; this shell is spared.
    kill -KILL -1
    printf '\\n@@ end %s %s %s\\n' "$name" "$status" "$(now)"
}}
printf '\\n@@ kernel %s\\n' "$(uname -r)"
{programs}
printf '\\n@@ bye\\n'
poweroff -f
"""

SERVED = """\
#!/bin/busybox sh
# serve BACKEND: an unmodified program over a server, and every byte of it.
echo 'running 1 test'
printf 'test reads_and_writes ... '
cd $TMPDIR
dd if=/dev/urandom of=memory bs=1M count=6 2>/dev/null
dd if=/dev/urandom of=memory bs=1M count=4 seek=8 2>/dev/null
if pagekitd file:memory --socket /run/pagekit --backend "$1" --json --shim /usr/lib/shim.so \\
    --run toucher '{file}' memory 2 random both write >said 2>&1 &&
    grep -q 'pages 3072 wrong 0' said &&
    grep -Eq '"demand_faults": ?[1-9]' said
then echo ok
else echo FAILED; printf '\\n---- reads_and_writes stdout ----\\n'; cat said; exit 1
fi
"""


def say(text: str) -> None:
    print(f"kernels: {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ kernels


FIELDS = "$(REPO_URI)|$(RELEASE)|$(SUITE)|$(CODENAME)|$(ORIGIN)|$(COMPONENT)"
"""What apt is asked about each of its sources."""


def sources(targets: str) -> list[str]:
    """Lines of sources.list: Debian's suites that are known already, and others of the same place.

    Args:
        targets: what apt says of the sources it has, in FIELDS.
    """
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f"[signed-by={keyring}] " if keyring.exists() else ""
    lines, names = [], set()
    for line in targets.splitlines():
        place, release, suite, codename, origin, component = line.split("|")
        if (origin, component) == ("Debian", "main"):
            lines.append((place, release))
            names |= {(place, release), (place, suite), (place, codename)}
    for place, name in sorted(names):
        if (
            "-" not in place.rstrip("/").rpartition("/")[2] + name
        ):  # no archive, no suite of updates
            others = ["stable", "unstable"]
            if name not in ("stable", "oldstable", "testing", "unstable", "sid"):
                others.append(f"{name}-backports")
            for other in others:
                if (place, other) not in names | set(lines):
                    lines.append((place, other))
    return [f"deb {signed}{place} {name} main" for place, name in lines]


def archive(cache: Path) -> Apt:
    """apt with more sources than the machine's, with nothing of it outside ``cache``.

    Lists are fetched once a day, and twice then: what the current release is called, and so its
    backports, is known after the first time.

    Raises:
        GuestMissing: there is no apt.
    """
    home = cache / "apt"
    for directory in ("lists/partial", "cache/archives/partial"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    # How the machine gets at archives (proxies) counts here too. Not what it does after an update:
    # that is about its own lists.
    dump = run(["apt-config", "dump"]).splitlines()
    ways = [line for line in dump if re.match(r"Acquire::(?!IndexTargets|Languages)", line)]
    settings = {
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::sourcelist": home / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": home / "lists",
        "Dir::Cache": home / "cache",
        "Acquire::Languages": "none",
    }
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    (home / "apt.conf").write_text("\n".join([*ways, *lines]) + "\n")
    ours = {"APT_CONFIG": str(home / "apt.conf")}
    apt = Apt(cache / "packages", ours)
    ask = ["apt-get", "indextargets", "--format", FIELDS, "Created-By: Packages"]
    targets, stamp = run(ask), home / "updated"
    fresh = stamp.exists() and time.time() - stamp.stat().st_mtime < 24 * 3600
    if not fresh or stamp.read_text() != targets:
        say("fetching lists of packages, into .cache")
        known = targets
        for _ in range(2):
            (home / "sources.list").write_text("\n".join(sources(known)) + "\n")
            try:
                apt.update()
            except GuestMissing as error:
                say(f"going on without some of them: {error}")
            known = run(ask, environment=ours)
        stamp.write_text(targets)
    return apt


def series(version: str) -> str:
    """``6.1`` of ``6.1.192-2``."""
    return ".".join(re.findall(r"\d+", version)[:2])


def by_number(series: str) -> tuple[int, ...]:
    return tuple(map(int, series.split(".")))


def newest_of_each(versions: Sequence[str]) -> dict[str, str]:
    """Series and versions, oldest series first; ``versions`` are newest first, and those of release
    candidates do not count."""
    found: dict[str, str] = {}
    for version in versions:
        if "~rc" not in version:
            found.setdefault(series(version), version)
    return dict(sorted(found.items(), key=lambda item: by_number(item[0])))


def chosen(known: dict[str, str], wanted: Sequence[str]) -> list[str]:
    """The series meant by ``wanted``.

    Raises:
        GuestMissing: one is not there.
    """
    names: list[str] = []
    for name in wanted:
        names += known if name == "all" else list(known)[-1:] if name == "newest" else [name]
    if not names:
        raise GuestMissing("there are no kernels in the archive", hint="is there a network?")
    for name in names:
        if name not in known:
            raise GuestMissing(
                f"there is no kernel {name} in the archive", hint=f"there are {', '.join(known)}"
            )
    return sorted(dict.fromkeys(names), key=by_number)


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot.

    Attributes:
        version: of its package.
        image: the file to boot.
        modules: those that are needed, in the order to load them.
    """

    series: str
    version: str
    image: Path
    modules: dict[str, bytes]


def kernel(apt: Apt, cache: Path, version: str) -> Kernel:
    """Unpack a kernel; once for each version."""
    home = cache / series(version)
    stamp, wanted = home / "stamp.json", {"version": version, "modules": list(MODULES)}
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        shutil.rmtree(home, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            work = Path(name)
            for package in apt.download(apt.kernel(f"{META}={version}")):
                run(["dpkg-deb", "-x", str(package), str(work / "root")])
                package.unlink()
            home.mkdir()
            shutil.copyfile(kernel_image(work / "root"), home / "vmlinuz")
            loaded = kernel_modules(work / "root", MODULES)
            for at, (module, content) in enumerate(loaded.items()):
                (home / f"{at:02}-{module}.ko").write_bytes(content)
        stamp.write_text(json.dumps(wanted))
    modules = {file.stem[3:]: file.read_bytes() for file in sorted(home.glob("*.ko"))}
    return Kernel(series(version), version, home / "vmlinuz", modules)


# --------------------------------------------------------------------------------------- initramfs


@dataclass(frozen=True)
class Program:
    """Something to run in the guest: its name in the results, its file, the command."""

    name: str
    file: Path
    command: str


def test_programs() -> list[Program]:
    """The tests of CRATES, built."""
    packages = [word for package in CRATES for word in ("-p", package)]
    built = subprocess.run(
        ["cargo", "test", "--quiet", "--locked", "--no-run", "--message-format=json", *packages],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if built.returncode:
        raise SystemExit("kernels: the tests cannot be built")
    found = programs_of(built.stdout)
    # What says most about a kernel, and soonest, comes first.
    return sorted(found, key=lambda one: (one.name.startswith("pagekit/"), one.name))


def programs_of(messages: str) -> Iterator[Program]:
    """The programs that cargo says it built: tests, and the example that prints the features."""
    for line in messages.splitlines():
        message = json.loads(line)
        if message["reason"] != "compiler-artifact" or not message["executable"]:
            continue
        target, file = message["target"], Path(message["executable"])
        crate = Path(message["manifest_path"]).parent.name
        if target["kind"] == ["example"]:
            if (crate, target["name"]) == ("uffd", "table"):
                yield Program("features", file, "/tests/features")
        elif message["profile"]["test"]:
            name = "unit" if "lib" in target["kind"] else target["name"]
            file_name = f"/tests/{crate}-{name}"
            arguments = "--test-threads=1 --show-output"
            if f"{crate}/{name}" not in WITHOUT_A_KERNEL:
                yield Program(f"{crate}/{name}", file, f"{file_name} {arguments}")


def libraries(programs: Sequence[Path]) -> dict[str, Path]:
    """Shared libraries that programs need, by the name under which they are looked for."""
    needed: dict[str, Path] = {}
    for program in programs:
        for line in run(["ldd", str(program)]).splitlines():
            # "libc.so.6 => /lib/…/libc.so.6 (0x…)", or the loader alone
            if found := re.search(r"(?:=> )?(/\S+) \(0x", line):
                needed[found[1].lstrip("/")] = Path(found[1]).resolve()
            elif missing := re.search(r"(\S+) => not found", line):
                raise GuestMissing(f"{program.name} needs {missing[1]}, which is not here")
    return needed


def stripped(file: Path, work: Path) -> bytes:
    """The content of a program without what only debuggers need, nine tenths of it."""
    if not shutil.which("strip"):
        return file.read_bytes()
    result = work / "stripped"
    run(["strip", "--strip-debug", "-o", str(result), str(file)])
    return result.read_bytes()


def pack(
    path: Path, guest: Path, modules: dict[str, bytes], programs: Sequence[Program]
) -> list[str]:
    """Write the initramfs; return what it runs, in this order.

    Args:
        guest: the demo's, which it begins with: busybox and Python. A kernel unpacks one archive
            after the other, and a later file replaces an earlier one.
    """
    served = {
        "usr/bin/pagekitd": server_program(),
        "usr/bin/toucher": support.program("toucher"),
        "usr/lib/shim.so": shim_path(),
    }
    commands = {f"shim/{name}": f"/usr/bin/serve {name}" for name in ("share", "copy")}
    commands |= {program.name: program.command for program in programs}
    lines = [f"perform {name} {command}" for name, command in commands.items()]
    init = INIT.format(modules=" ".join(modules), limit=LIMIT, programs="\n".join(lines))
    with path.open("wb") as output, tempfile.TemporaryDirectory() as work:
        output.write(guest.read_bytes())
        initramfs = Initramfs(output)
        initramfs.file("init", init.encode(), executable=True)
        initramfs.file("usr/bin/serve", SERVED.encode(), executable=True)
        initramfs.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        # Callbacks in Python are found beside the crate, by where that was when it was built.
        initramfs.directory(PurePosixPath(str(ROOT / "crates/pagekit")).relative_to("/"))
        for module in (ROOT / "python").rglob("*.py"):
            initramfs.file(str(module.relative_to("/")), module.read_bytes())
        for name, content in modules.items():
            initramfs.file(f"modules/{name}.ko", content)
        for program in programs:
            content = stripped(program.file, Path(work))
            initramfs.file(program.command.split()[0][1:], content, executable=True)
        for name, file in served.items():
            initramfs.file(name, file.read_bytes(), executable=True)
        everything = [program.file for program in programs] + list(served.values())
        for name, library in libraries(everything).items():
            initramfs.file(name, library.read_bytes(), executable=True)
        initramfs.end()
    return list(commands)


# ------------------------------------------------------------------------------------------ results


@dataclass
class Result:
    """What came of a kernel.

    Attributes:
        problems: what went wrong beside tests.
        seconds: on our clock, from start to end of QEMU.
        ends: the last lines of both consoles, if there is a problem.
    """

    kernel: Kernel
    heard: console.Heard
    problems: list[str]
    seconds: float
    ends: list[str] = field(default_factory=list)

    def tests(self, verdict: str) -> list[tuple[str, console.Test]]:
        """Tests with this verdict, and the programs they are of."""
        return [
            (run.name, test)
            for run in self.heard.runs
            if run.name != "features"
            for test in run.tests()
            if test.verdict == verdict
        ]

    def features(self) -> dict[str, tuple[str, str]]:
        """The table of features, if the guest printed it."""
        found = self.heard.run("features")
        return console.features(found) if found else {}

    def failed(self) -> bool:
        return bool(self.problems or self.tests("failed"))


def misjudged(features: dict[str, tuple[str, str]], release: str) -> Iterator[str]:
    """Where a kernel and the table disagree about what it has. (Tests run as root: nothing that a
    kernel has is forbidden.)"""
    for name, (since, state) in features.items():
        if since == "newer":
            continue
        expected = "Have" if by_number(series(release)) >= by_number(since) else "Lacking"
        if state != expected:
            yield f"{name} is there since {since}, and on {release} it is: {state}"


def judge(
    kernel: Kernel,
    programs: Sequence[str],
    results: bytes,
    console_said: str,
    *,
    hung: str,
    seconds: float,
) -> Result:
    """What the two ports of a guest that has ended amount to.

    Args:
        programs: what it was to run.
        results: what it said on the port for results.
        console_said: what its kernel said.
        hung: why it was ended, if it did not end by itself.
    """
    heard = console.read(results)
    problems = [hung] if hung else []
    if not heard.kernel:
        problems.append("the guest did not get as far as running anything")
    elif not heard.whole:
        problems.append("the guest ended too soon")
    missing = [name for name in programs if heard.run(name) is None]
    if heard.kernel and missing:
        problems.append(f"not run: {', '.join(missing)}")
    problems += [f"kernel: {found[0]}" for found in BAD_WORDS.finditer(console_said)][:5]
    result = Result(kernel, heard, problems, seconds)
    if heard.run("features"):
        problems += misjudged(result.features(), heard.kernel)
        if not result.features():
            problems.append("the table of features was not printed")
    if problems:
        ends = (console_said, results.decode(errors="replace"))
        result.ends = [line for text in ends for line in text.splitlines()[-8:] if line.strip()]
    return result


def boot(
    kernel: Kernel,
    initrd: Path,
    programs: Sequence[str],
    accelerator: str,
    told: Callable[[str], None],
) -> Result:
    """Boot a guest, and listen until it is gone or silent.

    All that it said is left in a file beside the kernel.
    """
    qemu = find_qemu()
    with tempfile.TemporaryDirectory(prefix="pk-kernels-") as name:
        place = Path(name)
        said, results = place / "console", place / "results"
        kind = pick_accelerator(qemu, kernel.image, wanted=accelerator).name
        command = [
            *("nice", "-n", "10", qemu.path, "-accel", kind, "-smp", "2", "-m", "3072"),
            *("-cpu", "host" if kind == "kvm" else "max"),
            *("-machine", "q35,sata=off,smbus=off,usb=off,vmport=off,hpet=off,smm=off"),
            *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-serial", f"file:{said}", "-serial", f"file:{results}"),
            *("-kernel", str(kernel.image), "-initrd", str(initrd)),
            *("-append", "console=ttyS0 panic=-1 loglevel=5 rootfstype=ramfs"),
        ]
        started = last_word = time.monotonic()
        child = Child(command, environment={}, fds=(), log=place / "stderr")
        heard, shown, hung = b"", 0, ""
        try:
            ended = False
            while not ended and not hung:
                ended = child.wait(1.0) is not None
                before, heard = heard, results.read_bytes() if results.exists() else b""
                if len(heard) > len(before):
                    last_word = time.monotonic()
                elif not ended and time.monotonic() - last_word > SILENCE:
                    hung = f"the guest hangs: it has said nothing for {SILENCE:.0f} s"
                runs = [run for run in console.read(heard).runs if run.status is not None]
                for one in runs[shown:]:
                    told(progress(one))
                shown = len(runs)
        finally:
            child.kill()
        if child.status and not hung:
            hung = f"QEMU ended with status {child.status}: {child.log()}"
        text = said.read_bytes().decode(errors="replace") if said.exists() else ""
        seconds = time.monotonic() - started
        log = kernel.image.with_name("said")
        log.write_bytes(text.encode() + b"\n" + heard)
        return judge(kernel, programs, heard, text, hung=hung, seconds=seconds)


def progress(run: console.Run) -> str:
    """One line about a program that has ended."""
    if run.name == "features":
        table = console.features(run)
        had = sum(state == "Have" for _, state in table.values())
        return f"features: {had} of {len(table)}"
    verdicts = [test.verdict for test in run.tests()]
    counts = [
        f"{verdicts.count(name)} {name}"
        for name in ("ok", "failed", "skipped")
        if name in verdicts or name == "ok"
    ]
    return f"{run.name}: {', '.join(counts)} ({run.seconds:.1f} s)"


# ------------------------------------------------------------------------------------------- report


def as_json(result: Result) -> dict[str, Any]:
    """Everything about one kernel."""
    return {
        "series": result.kernel.series,
        "package": result.kernel.version,
        "release": result.heard.kernel,
        "seconds": round(result.seconds, 1),
        "passed": len(result.tests("ok")),
        "failed": [
            {"program": name, "test": test.name, "why": test.why}
            for name, test in result.tests("failed")
        ],
        "skipped": [
            {"program": name, "test": test.name, "why": test.why}
            for name, test in result.tests("skipped")
        ],
        "problems": result.problems,
        "features": {name: state for name, (_, state) in result.features().items()},
        "programs": {run.name: run.seconds for run in result.heard.runs},
        "console": result.ends,
    }


def show(results: Sequence[Result]) -> None:
    """Two tables, and what failed."""
    console_ = report.console()
    table = Table(title="tests of the binding and the engine")
    for name in ("kernel", "ok", "failed", "skipped", "time"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for result in results:
        counts = [str(len(result.tests(name))) for name in ("ok", "failed", "skipped")]
        name = result.heard.kernel or result.kernel.version
        table.add_row(name, *counts, f"{result.seconds:.0f} s")
    console_.print(table)
    table = Table(title="features")
    table.add_column("feature")
    table.add_column("since", justify="right")
    for result in results:
        table.add_column(result.kernel.series)
    rows = {name: since for result in results for name, (since, _) in result.features().items()}
    for name, since in rows.items():
        states = [result.features().get(name, ("", "?"))[1].lower() for result in results]
        if set(states) != {"have"}:
            table.add_row(name, since, *states)
    if table.row_count:
        console_.print(table)
    if rows:
        console_.print(f"Every kernel has the other {len(rows) - table.row_count} features.")
    for result in results:
        name = result.kernel.series
        reasons: dict[str, list[str]] = {}
        for program, test in result.tests("skipped"):
            reasons.setdefault(test.why, []).append(f"{program}::{test.name}")
        for why, tests in reasons.items():
            print(f"{name}: skipped {len(tests)}: {why} ({', '.join(tests)})")
        for program, test in result.tests("failed"):
            print(f"{name}: FAILED {program}::{test.name}: {test.why}")
        for problem in result.problems:
            print(f"{name}: FAILED: {problem}")
        for line in result.ends:
            print(f"{name}: | {line}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", action="append", help="a series (6.12), newest, or all")
    parser.add_argument("--list", action="store_true", help="print which kernels there are")
    parser.add_argument("--only", default="", help="run only programs whose name matches this")
    parser.add_argument("--accelerator", default="auto", help="auto, kvm or tcg")
    parser.add_argument("--json", action="store_true", help="print everything, for programs")
    options = parser.parse_args()
    # So that what was made for a guest goes, and the guest, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    cache = default_cache()
    home = cache / "kernels"
    home.mkdir(parents=True, exist_ok=True)
    alone = (home / "lock").open("w")
    fcntl.flock(alone, fcntl.LOCK_EX)  # until this ends: another run here waits for it
    try:
        apt = archive(home)
        known = newest_of_each(apt.versions(META))
        if options.list:
            print("\n".join(f"{name:6} {version}" for name, version in known.items()))
            return 0
        wanted = chosen(known, options.kernel or [OLDEST, "newest"])
        programs = [one for one in test_programs() if re.search(options.only, one.name)]
        results = []
        for name in wanted:
            one = kernel(apt, home, known[name])
            with tempfile.NamedTemporaryFile(dir=home, suffix=".initrd") as initrd:
                file = Path(initrd.name)
                names = pack(file, ensure_guest(cache).initrd, one.modules, programs)
                say(f"{name}: booting {one.version}, {file.stat().st_size >> 20} MiB of tests")
                told = lambda text, name=name: say(f"{name}: {text}")  # noqa: E731
                results.append(boot(one, file, names, options.accelerator, told))
            for problem in results[-1].problems:
                say(f"{name}: {problem}")
    except PagekitError as error:
        say(f"error: {error}")
        if error.hint:
            say(f"hint: {error.hint}")
        return error.exit_code
    if options.json:
        print(json.dumps({"kernels": [as_json(result) for result in results]}, indent=1))
    else:
        show(results)
    return int(any(result.failed() for result in results))


if __name__ == "__main__":
    sys.exit(main())
