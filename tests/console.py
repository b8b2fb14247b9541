"""What a guest that runs tests says on its second serial port, and what it means.

The guest (``kernels.INIT``) writes lines that begin with ``@@``, and between them whatever the
programs that it runs write; nothing else is on that port, the kernel has the first one::

    @@ kernel 6.1.0-56-cloud-amd64
    @@ begin uffd/resolve 3.27           seconds since the kernel was started
    …
    @@ end uffd/resolve 0 5.81           exit status, as a shell has it
    @@ bye

A port carries bytes and promises nothing: a guest may hang, be killed, or write half a line. What
is missing is told then: a program without its end, a test without its verdict, no bye at the end.

Tests write as Rust's do when they run one after the other. One that lacks something on this kernel
passes, and says ``skipped: NAME: why``, by itself or in what was kept of its output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TIMED_OUT = 137
"""Exit status of a program that was killed because it took too long."""

_MARK = re.compile(r"@@ (kernel|begin|end|bye)\b ?(.*)")
_TEST = re.compile(r"test (\S+)(?: - should panic)? \.\.\. ?(.*)")
_VERDICT = re.compile(r"(ok|FAILED|ignored)(?:, (.*))?")
_KEPT = re.compile(r"---- (\S+) std(?:out|err) ----")
_SKIP = re.compile(r"skipped: (.+)")
_COUNT = re.compile(r"running (\d+) tests?")
_RESULT = re.compile(r"test result: .*")
_FEATURE = re.compile(r"(\S.*?) {2,}(\S+) +(Have|Forbidden|Lacking)")


@dataclass
class Test:
    """One test: ``ok``, ``failed`` or ``skipped``, and why."""

    name: str
    verdict: str
    why: str = ""


@dataclass
class Run:
    """One program's run in the guest.

    Attributes:
        status: None if its end was not seen.
        seconds: how long it took; None if its end was not seen.
    """

    name: str
    began: float
    status: int | None = None
    seconds: float | None = None
    lines: list[str] = field(default_factory=list)

    def tests(self) -> list[Test]:
        """Its tests, and one more that failed if it did not end as it should have."""
        found = _tests(self.lines)
        counts = (_COUNT.fullmatch(line) for line in self.lines)
        expected = next((count[1] for count in counts if count), "an unknown number of")
        missed = f"{len(found)} of {expected} tests were heard of"
        ended = {None: "the guest was gone before it ended", TIMED_OUT: "killed: out of time"}
        problems = []
        if self.status in ended:
            problems.append(Test("(ends)", "failed", ended[self.status]))
        elif self.status != 0 and not any(test.verdict == "failed" for test in found):
            why = f"exit status {self.status}: {self.tail()}"
            problems.append(Test("(ends)", "failed", why))
        if self.status is not None and str(len(found)) != expected:
            problems.append(Test("(all of them)", "failed", missed))
        return found + problems

    def tail(self) -> str:
        """The last line that says something."""
        return next((line.strip() for line in reversed(self.lines) if line.strip()), "")


@dataclass
class Heard:
    """All that was heard from a guest.

    Attributes:
        kernel: the kernel's release; empty if it did not get that far.
        whole: whether it said goodbye.
    """

    kernel: str = ""
    runs: list[Run] = field(default_factory=list)
    whole: bool = False

    def run(self, name: str) -> Run | None:
        """The run of that program, if it began."""
        return next((run for run in self.runs if run.name == name), None)


def read(said: bytes) -> Heard:
    """Understand what was said so far."""
    heard = Heard()
    for line in said.decode(errors="replace").replace("\r", "").split("\n"):
        found = _MARK.fullmatch(line)
        run = heard.runs[-1] if heard.runs else None
        words = found[2].split() if found else []
        match found[1] if found else None, words:
            case "kernel", [release]:
                heard.kernel = release
            case "begin", [name, began] if _number(began):
                heard.runs.append(Run(name, float(began)))
            case "end", [name, status, ended] if (
                run and run.name == name and _number(ended) and status.isdigit()
            ):
                run.status, run.seconds = int(status), float(ended) - run.began
            case "bye", []:
                heard.whole = True
            case _ if run and run.status is None:
                run.lines.append(line)
    return heard


def features(run: Run) -> dict[str, tuple[str, str]]:
    """The table of features: for each name since which kernel, and how it stands here."""
    rows = (_FEATURE.fullmatch(line.rstrip()) for line in run.lines)
    return {row[1]: (row[2], row[3]) for row in rows if row}


def _tests(lines: list[str]) -> list[Test]:
    found: dict[str, Test] = {}
    running: Test | None = None  # has begun; what comes is its output, and then its verdict
    about: Test | None = None  # whose kept output this is
    panic: Test | None = None  # whose last words these are
    within = False  # the output of a child that is a run of tests too, and has its own verdicts
    for line in lines:
        if running and (_COUNT.fullmatch(line) or _RESULT.fullmatch(line)):
            within = not _RESULT.fullmatch(line)
        if within and not _SKIP.search(line):
            continue
        if begun := _TEST.fullmatch(line):
            running = found[begun[1]] = Test(begun[1], "failed", "it did not end")
            line = begun[2]
        elif kept := _KEPT.fullmatch(line):
            about, panic = found.get(kept[1]), None
        if running and (verdict := _VERDICT.fullmatch(line.strip())):
            _judge(running, verdict[1], verdict[2] or "")
            running = None
        elif skip := _SKIP.search(line):
            if test := running or about:
                # Some say which test they are, too.
                test.verdict, test.why = "skipped", skip[1].strip().removeprefix(f"{test.name}: ")
        elif about and not about.why and "panicked at" in line:
            about.why, panic = line.strip(), about
        elif panic and line.strip() and not line.startswith("note:"):
            panic.why += f" {line.strip()}"
        else:
            panic = None
    if running:
        running.verdict, running.why = "failed", "it did not end"
    return list(found.values())


def _judge(test: Test, verdict: str, why: str) -> None:
    """What a test said of itself counts only if it did not fail."""
    if verdict == "FAILED":
        test.verdict, test.why = "failed", ""
    elif verdict == "ignored":
        test.verdict, test.why = "skipped", f"ignored: {why}" if why else "ignored"
    elif test.verdict != "skipped":
        test.verdict, test.why = "ok", ""


def _number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None
