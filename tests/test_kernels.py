"""The parts of `make kernels`, without booting anything: what is booted, and what is made of what a
guest says, of one that hangs or talks nonsense above all."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import console
import kernels
import pytest
import support

from pagekit.errors import GuestMissing
from pagekit.sandbox.initramfs import Initramfs
from pagekit.sandbox.program import Program as Qemu

SAID = """
@@ kernel 6.1.0-56-cloud-amd64

@@ begin features 2.60
PAGEFAULT_FLAG_WP    5.7   Have
POISON               6.6   Lacking
a newer one          newer Have

@@ end features 0 2.70

@@ begin uffd/resolve 3.00

running 6 tests
test copies ... ok
test poisons ... skipped: poisons: POISON: since Linux 6.6
ok
test huge ... skipped: huge pages: there is room for 0 of 4
ok
test kept_its_words ... ok
test left_alone ... ignored, takes hours
test with_a_child ... 
running 1 test
test role ... FAILED

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.08s

ok

successes:

---- kept_its_words stdout ----
skipped: MOVE: since Linux 6.8

test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.50s

@@ end uffd/resolve 0 5.25

@@ begin pagekit/engine 5.30

running 2 tests
test serves ... ok
test is_right ... FAILED

failures:

---- is_right stdout ----

thread 'is_right' (12) panicked at crates/pagekit/tests/engine.rs:32:5:
assertion `left == right` failed
  left: 1
 right: 2
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace

failures:
    is_right

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.50s

@@ end pagekit/engine 101 7.00

@@ bye
"""
PROGRAMS = ("features", "uffd/resolve", "pagekit/engine")


def kernel(place: Path = Path("/nowhere")) -> kernels.Kernel:
    return kernels.Kernel("6.1", "6.1.192-2", place / "vmlinuz", {})


def judged(said: str, console_said: str = "", hung: str = "") -> kernels.Result:
    return kernels.judge(kernel(), PROGRAMS, said.encode(), console_said, hung=hung, seconds=1.0)


def verdicts(said: str, name: str) -> dict[str, tuple[str, str]]:
    run = console.read(said.encode()).run(name)
    assert run is not None
    return {test.name: (test.verdict, test.why) for test in run.tests()}


# What a guest says


def test_what_tests_say_is_understood() -> None:
    assert verdicts(SAID, "uffd/resolve") == {
        "copies": ("ok", ""),
        "poisons": ("skipped", "POISON: since Linux 6.6"),
        "huge": ("skipped", "huge pages: there is room for 0 of 4"),
        "kept_its_words": ("skipped", "MOVE: since Linux 6.8"),
        "left_alone": ("skipped", "ignored: takes hours"),
        "with_a_child": ("ok", ""),
    }
    engine = verdicts(SAID, "pagekit/engine")
    assert engine["serves"] == ("ok", "")
    verdict, why = engine["is_right"]
    assert verdict == "failed"
    assert why.endswith("engine.rs:32:5: assertion `left == right` failed left: 1 right: 2"), why
    heard = console.read(SAID.encode())
    assert (heard.kernel, heard.whole) == ("6.1.0-56-cloud-amd64", True)
    assert [(run.name, run.status) for run in heard.runs] == [
        *zip(PROGRAMS, (0, 0, 101), strict=True)
    ]
    assert heard.runs[1].seconds == 2.25
    assert console.features(heard.runs[0])["POISON"] == ("6.6", "Lacking")


def test_a_console_with_carriage_returns_says_the_same() -> None:
    assert console.read(SAID.replace("\n", "\r\n").encode()) == console.read(SAID.encode())


def test_a_guest_that_stops_anywhere_has_failed_and_its_tests_are_not_ok() -> None:
    whole = judged(
        SAID.replace("FAILED", "ok").replace("@@ end pagekit/engine 101", "@@ end pagekit/engine 0")
    )
    assert not whole.failed()
    # One is told to have lacked something only at the end of its program.
    good = [*judged(SAID).tests("ok"), *judged(SAID).tests("skipped")]
    passed = {(name, test.name) for name, test in good}
    for end in range(len(SAID.rstrip())):
        part = judged(SAID[:end])
        assert part.problems, SAID[:end][-40:]
        assert part.failed()
        assert {(name, test.name) for name, test in part.tests("ok")} <= passed
        last = part.heard.runs[-1] if part.heard.runs else None
        if last and last.status is None and last.name != "features":
            assert ("(ends)", "failed") in [(test.name, test.verdict) for test in last.tests()]
        kernels.as_json(part)


def test_nonsense_is_no_error_and_nothing_good() -> None:
    dice = random.Random(4)
    marks = [
        b"@@ begin x\n",
        b"@@ end uffd/resolve x y\n",
        b"@@ end a 0 1\n",
        b"@@ begin a 1e9 2\n",
    ]
    for _ in range(400):
        said = bytearray(SAID.encode())
        for _ in range(dice.randrange(1, 40)):
            at = dice.randrange(len(said))
            if dice.random() < 0.2:
                said[at:at] = b"\n" + dice.choice(marks)
            else:
                said[at] = dice.randrange(256)
        heard = console.read(bytes(said))
        for run in heard.runs:
            assert all(test.verdict in ("ok", "failed", "skipped") for test in run.tests())
    assert judged("\x00\xff" * 100).failed()
    assert judged("").problems == ["the guest did not get as far as running anything"]


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ("test copies ... ok\n", "5 of 6 tests were heard of"),
        ("test copies ... ok", "5 of 6 tests were heard of"),
        ("@@ end uffd/resolve 0 5.25", "the guest was gone before it ended"),
    ],
)
def test_a_line_that_is_lost_is_missed(lost: str, why: str) -> None:
    assert lost in SAID
    assert ("failed", why) in verdicts(SAID.replace(lost, ""), "uffd/resolve").values()


def test_a_program_that_crashes_or_takes_too_long_has_failed() -> None:
    dies = SAID[: SAID.index("test left_alone")] + "Aborted\n@@ end uffd/resolve 134 4\n"
    ends = verdicts(
        dies.replace("test kept_its_words ... ok", "test kept_its_words ... "), "uffd/resolve"
    )
    assert ends["copies"] == ("ok", "")
    assert ends["kept_its_words"] == ("failed", "it did not end")
    late = SAID.replace("@@ end uffd/resolve 0", f"@@ end uffd/resolve {console.TIMED_OUT}")
    assert verdicts(late, "uffd/resolve")["(ends)"] == ("failed", "killed: out of time")
    silent = "@@ kernel 6.1\n@@ begin a 1\nno such library\n@@ end a 127 2\n"
    assert verdicts(silent, "a")["(ends)"] == ("failed", "exit status 127: no such library")
    nothing = verdicts("@@ begin a 1\n@@ end a 0 2\n", "a")
    assert nothing == {"(all of them)": ("failed", "0 of an unknown number of tests were heard of")}


def test_words_of_a_kernel_about_itself_are_a_failure() -> None:
    said = "[    1.0] x\n[ 9.1] BUG: unable to handle page fault\n[ 9.2] Oops: 0000 [#1]\n"
    result = judged(SAID, said)
    assert result.problems[0] == "kernel: BUG: unable to handle page fault"
    assert "[ 9.2] Oops: 0000 [#1]" in result.ends


def test_a_kernel_and_the_table_must_agree() -> None:
    assert judged(SAID).problems == []
    had = judged(SAID.replace("6.6   Lacking", "6.6   Have"))
    assert had.problems == ["POISON is there since 6.6, and on 6.1.0-56-cloud-amd64 it is: Have"]
    for state in ("Lacking", "Forbidden"):
        [problem] = judged(SAID.replace("5.7   Have", f"5.7   {state}")).problems
        assert problem.startswith("PAGEFAULT_FLAG_WP is there since 5.7")
    assert list(kernels.misjudged({"A": ("6.10", "Lacking")}, "6.9.3")) == []
    assert list(kernels.misjudged({"A": ("6.9", "Lacking")}, "6.10.0"))


# Kernels


def test_suites_come_from_what_the_machine_has() -> None:
    targets = """\
http://a.example/debian/|bookworm|oldstable|bookworm|Debian|main
http://a.example/debian/|bookworm|oldstable|bookworm|Debian|contrib
http://a.example/debian/|bookworm-updates|oldstable-updates|bookworm-updates|Debian|main
http://a.example/debian-security/|bookworm-security|oldstable-security|bookworm-security|Debian|main
http://b.example/|nodistro|nodistro|nodistro|Somebody|main
"""
    lines = kernels.sources(targets)
    assert [line.split()[-3:] for line in lines] == [
        [f"http://a.example/{archive}/", suite, "main"]
        for archive, suite in (
            ("debian", "bookworm"),
            ("debian", "bookworm-updates"),
            ("debian-security", "bookworm-security"),
            ("debian", "stable"),
            ("debian", "unstable"),
            ("debian", "bookworm-backports"),
        )
    ]
    # Once the name of the current release is known:
    more = "http://a.example/debian/|stable|stable|trixie|Debian|main\n"
    more += "http://a.example/debian/|unstable|unstable|sid|Debian|main\n"
    again = kernels.sources(targets + more)
    assert set(lines) < set(again)
    assert [line.split()[-2] for line in again if line not in lines] == ["trixie-backports"]
    assert kernels.sources("") == []


def test_the_newest_of_each_series_counts() -> None:
    versions = ["7.3~rc7-1~exp1", "6.12.107-1", "6.12.95-1~bpo12+1", "6.1.192-2", "6.10.1-1"]
    known = kernels.newest_of_each(versions)
    assert list(known.items()) == [
        ("6.1", "6.1.192-2"),
        ("6.10", "6.10.1-1"),
        ("6.12", "6.12.107-1"),
    ]
    assert kernels.chosen(known, ["newest", "6.1", "6.1"]) == ["6.1", "6.12"]
    assert kernels.chosen(known, ["all"]) == list(known)
    for wanted, names in (("5.10", known), ("newest", {})):
        with pytest.raises(GuestMissing):
            kernels.chosen(names, [wanted])


def test_what_cargo_built_is_what_is_run() -> None:
    def message(crate: str, kind: str, name: str, test: bool = True) -> str:
        return json.dumps(
            {
                "reason": "compiler-artifact",
                "manifest_path": f"/x/crates/{crate}/Cargo.toml",
                "target": {"kind": [kind], "name": name},
                "profile": {"test": test},
                "executable": f"/x/target/{name}",
            }
        )

    messages = [
        '{"reason": "build-finished"}',
        '{"reason": "compiler-artifact", "executable": null}',
        message("uffd", "lib", "uffd"),
        message("uffd", "test", "resolve"),
        message("uffd", "example", "table", test=False),
        message("uffd", "example", "other", test=False),
        message("pagekit", "test", "any_bytes"),
    ]
    built = {program.name: program.command for program in kernels.programs_of("\n".join(messages))}
    assert list(built) == ["uffd/unit", "uffd/resolve", "features"]
    assert built["uffd/unit"].startswith("/tests/uffd-unit ")


# What is booted


def entries(archive: bytes, at: int = 0) -> tuple[dict[str, tuple[int, bytes]], int]:
    """Modes and contents of a cpio archive, by name, and where it ends."""
    found: dict[str, tuple[int, bytes]] = {}
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        content = (at + 110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return found, content
        assert name not in found
        found[name] = (mode, archive[content : content + size])
        at = (content + size + 3) & ~3


def fake(place: Path, script: str) -> Path:
    place.write_text(f"#!/bin/sh\n{script}\n")
    place.chmod(0o755)
    return place


def test_the_initramfs_has_all_that_is_run(tmp_path: Path) -> None:
    busybox = fake(tmp_path / "busybox", "echo busybox; echo sh; echo timeout")
    program = kernels.Program("uffd/unit", Path(sys.executable), "/tests/uffd-unit --quiet")
    modules = {"second": b"2", "first": b"1"}
    with (tmp_path / "guest").open("wb") as output:
        guest = Initramfs(output)
        guest.base(busybox)
        guest.end()
    names = kernels.pack(tmp_path / "initrd", tmp_path / "guest", modules, [program])
    assert names == ["shim/share", "shim/copy", "uffd/unit"]
    whole = (tmp_path / "initrd").read_bytes()
    found, end = entries(whole)
    assert found["bin/timeout"] == (0o120777, b"busybox")
    assert found["dev/console"][0] == 0o020600
    found, end = entries(whole, end)
    assert end == len(whole)
    for name in ("init", "usr/bin/serve", "usr/bin/pagekitd", "usr/bin/toucher", "tests/uffd-unit"):
        assert found[name][0] == 0o100755, name
    assert found["modules/first.ko"][1] == b"1"
    init = found["init"][1].decode()
    assert "for module in second first; do" in init
    assert "\nperform uffd/unit /tests/uffd-unit --quiet\n" in init
    for script in ("init", "usr/bin/serve"):
        subprocess.run(["sh", "-n"], input=found[script][1], check=True)
    # Every library, under the name by which it is looked for.
    for name in re.findall(r"/\S+(?= \(0x)", ldd(support.program("toucher"))):
        assert found[name[1:]][1] == Path(name).read_bytes()
    seen = {"."}
    for name in found:
        assert str(Path(name).parent) in seen, name
        seen.add(name)


def ldd(program: Path) -> str:
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout


def test_a_program_that_lacks_a_library_is_told(tmp_path: Path) -> None:
    fake(tmp_path / "ldd", "echo 'libgone.so.1 => not found'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(GuestMissing, match=r"libgone\.so\.1"):
            kernels.libraries([Path("/bin/sh")])


# Booting


def booted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> tuple[kernels.Result, list[str]]:
    """With a program in QEMU's place, for which $out is the port for results."""
    find = "for word; do case $word in file:*/results) out=${word#file:};; esac; done"
    program = fake(tmp_path / "qemu", f"echo $$ >{tmp_path}/pid\n{find}\n{script}")
    (tmp_path / "said.txt").write_text(SAID)
    monkeypatch.setattr(kernels, "find_qemu", lambda: Qemu(str(program), "1"))
    told: list[str] = []
    result = kernels.boot(kernel(tmp_path), tmp_path / "initrd", PROGRAMS, "tcg", told.append)
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
    return result, told


def test_a_guest_that_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, told = booted(tmp_path, monkeypatch, f"cat {tmp_path}/said.txt >$out")
    assert result.problems == []
    assert told == [
        "features: 2 of 3",
        "uffd/resolve: 2 ok, 4 skipped (2.2 s)",
        "pagekit/engine: 1 ok, 1 failed (1.7 s)",
    ]
    assert "@@ bye" in (tmp_path / "said").read_text()


def test_a_guest_that_hangs_is_ended_and_its_last_words_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SILENCE", 1.0)
    until = SAID.index("test role ... FAILED")
    script = f"head -c {until} {tmp_path}/said.txt >$out; exec sleep 1000"
    result, _ = booted(tmp_path, monkeypatch, script)
    assert "the guest hangs: it has said nothing for 1 s" in result.problems
    assert any("with_a_child" in line for line in result.ends)
    failed = {(name, test.name): test.why for name, test in result.tests("failed")}
    assert failed["uffd/resolve", "with_a_child"] == "it did not end"
    kernels.show([result])


def test_a_guest_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, told = booted(tmp_path, monkeypatch, "echo no such machine >&2; exit 1")
    assert "QEMU ended with status 1: no such machine" in result.problems
    assert told == []
    assert result.failed()


def test_the_report_names_what_failed_and_what_was_skipped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results: Sequence[kernels.Result] = [judged(SAID)]
    kernels.show(results)
    said = capsys.readouterr().out
    assert "6.1: skipped 1: POISON: since Linux 6.6 (uffd/resolve::poisons)" in said
    assert "6.1: FAILED pagekit/engine::is_right: thread" in said
    assert re.search(r"6\.1\.0-56-cloud-amd64 │ +3 │ +1 │ +4 │", said)
    whole = json.dumps(kernels.as_json(results[0]))
    assert '"passed": 3' in whole
