"""``pagekit boot`` and ``pagekit demo``, as programs: what they print, and what they leave behind
however they end: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import support

from pagekit import Template, WorkingSet
from pagekit.errors import ForkDied
from pagekit.sandbox import Qemu, Snapshot, memory
from pagekit.sandbox.rundir import sweep

PAGEKIT = [sys.executable, "-c", "from pagekit.cli import main; main()"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where a program puts its run directories. At the end nothing may be there."""
    directory = tmp_path / "place"
    directory.mkdir()
    yield directory
    assert not list(directory.iterdir())
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()


def pagekit(
    place: Path, *arguments: object, status: int = 0, patience: float = support.PATIENCE
) -> tuple[str, str]:
    """Run a verb to its end."""
    process = support.start([*PAGEKIT, *arguments], {"TMPDIR": str(place)})
    with support.stopping(process):
        return support.ended(process, status, patience)


def need(backend: str) -> None:
    """Skip a test on a machine that does not have what a backend needs."""
    if backend in ("share", "copy"):
        support.need_userfaultfd()
    if backend == "mount":
        support.need_fuse()


def children(owner: int, place: Path) -> list[int]:
    """The processes that must end with ``owner``, which runs in ``place``, and have not."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if f"TMPDIR={place}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return [pid for pid in found if pid != owner]


def test_boot_forks(snapshot: Snapshot, place: Path) -> None:
    code = "print('hello'); result = os.environ['PAGEKIT_FORK_ID']"
    arguments = ("boot", snapshot.directory, "--forks", 3, "--exec", code, "--json")
    out, err = pagekit(place, *arguments)
    report = json.loads(out)
    assert report["backend"] == "plain"
    assert report["accelerator"] == snapshot.accelerator
    assert len(report["forks"]) == 3
    for fork in report["forks"]:
        assert fork["output"] == "hello\n"
        assert fork["result"] == fork["fork_id"]
        assert fork["error"] is None
        assert fork["ready_s"] > fork["resume_to_answer_s"] > 0
    assert len({fork["fork_id"] for fork in report["forks"]}) == 3
    assert "backend: plain" in err


def test_boot_for_people(snapshot: Snapshot, place: Path) -> None:
    support.need_userfaultfd()
    out, err = pagekit(
        place, "boot", snapshot.directory, "--backend", "share", "--exec", "result = 6 * 7"
    )
    assert "42" in out
    assert snapshot.accelerator in out
    assert "backend: share" in err


@pytest.mark.parametrize("backend", ["auto", "mount"])
def test_working_sets(backend: str, snapshot: Snapshot, place: Path, tmp_path: Path) -> None:
    """Recorded once and again in one file, and replayed."""
    support.need_userfaultfd()
    need(backend)
    file = tmp_path / "working-set"
    boot = ("boot", snapshot.directory, "--exec", "result = sum(data[::4096])", "--json")
    answers = set()
    for recordings in (1, 2):
        out, err = pagekit(place, *boot, "--record", file)
        recorded = WorkingSet.load(file)
        assert recorded.recordings == recordings
        assert recorded.critical_pages == recorded.pages > 10240
        assert f"{recorded.pages} of {recordings} recordings" in err
        answers.add(json.loads(out)["forks"][0]["result"])
    out, err = pagekit(place, *boot, "--backend", backend, "--working-set", file, "--forks", 3)
    report = json.loads(out)
    assert report["backend"] == ("share" if backend == "auto" else backend)
    answers |= {fork["result"] for fork in report["forks"]}
    assert len(answers) == 1


def test_working_sets_that_do_not_fit(snapshot: Snapshot, place: Path, tmp_path: Path) -> None:
    support.need_userfaultfd()
    boot = ("boot", snapshot.directory)
    file = tmp_path / "working-set"
    for option in ("--record", "--working-set"):
        if option == "--working-set":
            file.write_bytes(b"nonsense")
            _, err = pagekit(place, *boot, option, file, status=7)
            assert "working set" in err
            record_another(file)
        _, err = pagekit(place, *boot, option, file, "--backend", "plain", status=2)
        assert "no pages are served" in err
        if option == "--record":
            record_another(file)
        before = file.read_bytes()
        _, err = pagekit(place, *boot, option, file, "--exec", "pass", status=7)
        assert "record it anew" in err
        assert file.read_bytes() == before


def record_another(file: Path) -> None:
    """A working set of another template."""
    with Template("zero:1048576") as template:
        template.record().finish().save(file)


def test_code_that_raises(snapshot: Snapshot, place: Path) -> None:
    out, err = pagekit(place, "boot", snapshot.directory, "--exec", "1 / 0", "--json", status=9)
    assert "raised" in json.loads(out)["forks"][0]["error"]
    assert "ZeroDivisionError" in err
    assert "error: the code raised in the sandbox" in err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("boot",), 2, "give the DIR"),
        (("boot", "{}/nothing"), 9, "is not a snapshot"),
        (("demo", "--local-only", "--remote-only"), 2, "nothing to compare"),
        (("boot", "--save", "{}/new", "--kernel", "{}/none", "--initrd", "{}/no"), 9, "no kernel"),
        (("boot", "--save", "{}/new", "--qmp", "{}/nothing"), 9, "cannot connect"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], status: int, said: str, tmp_path: Path, place: Path
) -> None:
    given = [argument.format(tmp_path) for argument in arguments]
    out, err = pagekit(place, *given, status=status)
    assert not out
    assert said.lower() in err.lower()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("backend", ["plain", "share", "mount"])
def test_interrupted(number: int, backend: str, snapshot: Snapshot, place: Path) -> None:
    need(backend)
    process = support.start(
        [
            *(*PAGEKIT, "boot", snapshot.directory, "--forks", 3, "--backend", backend),
            *("--exec", "time.sleep(600)"),
        ],
        {"TMPDIR": str(place)},
    )
    with support.stopping(process):
        # As many run at once as there are processors.
        support.until(lambda: children(process.pid, place), "forks run")
        process.send_signal(number)
        started = time.monotonic()
        out, err = support.ended(process, 128 + number)
        assert time.monotonic() - started < 20
        assert not out
        assert "Traceback" not in err
        assert not children(process.pid, place)


def test_interrupted_while_a_guest_boots(tmp_path: Path, guest: Any, place: Path) -> None:
    process = support.start([*PAGEKIT, "boot", "--save", tmp_path / "new"], {"TMPDIR": str(place)})
    with support.stopping(process):
        support.until(lambda: children(process.pid, place), "the guest boots")
        process.send_signal(signal.SIGINT)
        support.ended(process, 130)
        assert not children(process.pid, place)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("backend", ["plain", "share", "mount"])
def test_killed(backend: str, snapshot: Snapshot, place: Path) -> None:
    """Its forks end with it; its run directory is swept away by the next that comes along."""
    need(backend)
    process = support.start(
        [*PAGEKIT, "boot", snapshot.directory, "--backend", backend, "--exec", "time.sleep(600)"],
        {"TMPDIR": str(place)},
    )
    with support.stopping(process):
        support.until(lambda: children(process.pid, place), "a fork runs")
        process.kill()
        process.wait()
        support.until(lambda: not children(process.pid, place), "it ended")
    left = list(place.iterdir())
    assert left
    assert sorted(sweep(place)) == sorted(left)


def demo(place: Path, *arguments: str) -> Any:
    support.need_userfaultfd()
    support.need_fuse()
    out, err = pagekit(place, "demo", "--quick", "--json", *arguments, patience=240)
    assert err
    report = json.loads(out)
    assert report["accelerator"] in ("tcg", "kvm")
    assert report["forks"] == 20
    assert all(goal["value"] > 0 for goal in report["goals"])
    return report


def test_demo_of_a_local_file(guest: Any, place: Path) -> None:
    report = demo(place, "--local-only")
    assert report["cold_boot_s"] > 0
    assert report["template_unchanged"]
    assert report["answers_checked"] >= 6 * 20
    assert set(report["local"]) == {"eager", "map_private", "lazy", "replay", "warm", "mount"}
    for name, arm in report["local"].items():
        for what in ("ready_s", "resume_to_answer_s"):
            assert 0 < arm[what]["min"] <= arm[what]["median"] <= arm[what]["max"]
        assert arm["guest_private_kib_1"] > 0
        assert arm["guest_private_kib_20"] > 0
        if name != "replay":  # which runs a race with the fork
            assert (arm["demand_faults"] > 100) == (name == "lazy")
        assert (arm["bytes_read"] > 32 << 20) == (name in ("lazy", "replay", "eager"))
    assert report["host_kib_20"]["map_private"] > 0
    shared, mounted, plain = (
        report["local"][name]["guest_private_kib_20"] for name in ("warm", "mount", "map_private")
    )
    assert shared < 1.1 * plain
    assert mounted < 1.1 * plain
    assert report["local"]["warm"]["fetches"] < 30
    assert "remote" not in report


def test_demo_of_a_store_far_away(guest: Any, place: Path) -> None:
    report = demo(place, "--remote-only")
    assert report["answers_checked"] >= 3 * 20
    assert "local" not in report
    assert set(report["remote"]) == {"eager", "lazy", "replay"}
    for name, arm in report["remote"].items():
        for figures in (arm, arm["forks_20"]):
            ready = [figures[f"{which}ready_s"]["median"] for which in ("", "median_", "last_")]
            assert 0 < ready[0] <= ready[1] <= ready[2]
            assert figures["bytes_needed"] > 34 << 20
            assert figures["bytes_moved"] >= 0.98 * figures["bytes_needed"]
            assert (figures["bytes_moved"] > 640 << 20) == (name == "eager")
            assert (figures["bytes_prefetched"] > 34 << 20) == (name == "replay")
            if name != "replay":
                assert (figures["demand_faults"] > 100) == (name == "lazy")
            assert figures["requests"] > 0


def test_memory_limit(snapshot: Snapshot) -> None:
    """A VMM that the kernel kills for want of memory is named so."""
    support.need_root()
    for version, _, parent in memory._places():
        group = parent / f"pagekit-limit-{os.getpid()}"
        limit = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
        try:
            group.mkdir()
            (group / limit).write_text(str(64 << 20))
            break
        except OSError:
            with suppress(OSError):
                group.rmdir()
    else:
        pytest.skip("memory group: none can be made here")
    try:
        with Qemu.fork(snapshot) as fork:
            fork.exec("pass")
            (group / "cgroup.procs").write_text(str(fork.pid))
            with pytest.raises(ForkDied, match="signal 9") as died:
                fork.exec("x = b'x' * (200 << 20)")
            assert "out of memory" in (died.value.hint or "")
    finally:
        group.rmdir()


def test_help_has_examples() -> None:
    for verb in ("boot", "demo"):
        said = subprocess.run(
            [*PAGEKIT, verb, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert f"pagekit {verb} " in said
        assert "Examples" in said
