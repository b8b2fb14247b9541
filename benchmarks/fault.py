"""What a fault costs: this engine, the handler that everybody writes first, the kernel alone.

*Handlers.* A program hands over its userfaultfd as Firecracker does, and touches one page of each
64 KiB in random order: *single* faults, for which this engine brings the one page, as the other
handler does. (With a second page of such a block it would bring the rest.) The memory is at hand
for both.

engine     `pagekitd --firecracker`, its template filled
minimal    poll, read one event, copy one page (benchmarks/programs/handler.c)
read       the same, but asleep in read, without poll

Each of them *pinned*: the handler and the thread that faults on the same processor, *bound*: only
the thread, and *unpinned*: everybody where the scheduler likes; with one thread that faults, and
with two.

*Maps.* The same touches of a `pagekit.map` in this process, whose template is empty: with each page
come the fifteen beside it, from the file. *thread*: a thread of ours brings them; *signal*: the
thread that faults, in a signal handler.

*Paths.* What each way to resolve a fault costs at best: a few lines of C, by run length, order,
threads, and by where the handler is and how it waits (benchmarks/programs/fault.c says it all).
`sigbus` is resolved by the thread itself, in a signal handler; `anonymous` (zero pages) and
`private` (a private mapping of a cached file on tmpfs) are the kernel alone; so is what a second
fork does with `share`, and would do if the template was in huge pages: `second` and `folded`. For
the last three the time is that of a page.

*Share.* What a page costs the second fork that maps a template, against plain private mappings of
a file (benchmarks/share.py says how).

Prints medians: faults a second, microseconds of a fault (median and 99th percentile), and
microseconds of the processors that handler and program took for it. Under ``ratios``:

copy_vs_minimal_pinned      faults/s of engine against read, both pinned; wanted: >= 0.95
copy_vs_minimal_unpinned    faults/s of engine against minimal, both unpinned; wanted: >= 2
…_p50                       the same two by the median fault, which other work disturbs less
share_second_vs_private     time of the second fork against the private mapping; wanted: <= 1.2
share_second_vs_disk        the same against a file on disk in large folios
map_signal_vs_thread        faults/s of the two kinds of maps

    python benchmarks/fault.py [--json] [--quick] [--disk DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import share
from common import PATIENCE, PROGRAMS, compiled, handler

import pagekit
from pagekit.client import server_program

BLOCK = 64 << 10
FAULTS = 4096
MEMORY = FAULTS * BLOCK
PLACES = ("pinned", "bound", "unpinned")
PATHS = ("copy", "share", "continue", "zeropage")
EVERY = ("private", "second", "folded")
"""Those of which every page is touched."""
ALONE = ("anonymous", *EVERY)
HANDLERS = ("same-read", "same-poll", "other-read", "other-spin", "free-poll")
RUNS = {"4 KiB": (4 << 10, 4096), "64 KiB": (64 << 10, 1024), "2 MiB": (2 << 20, 64)}
"""Bytes of a run, and faults."""
ORDERS = ("random", "sequential")
Arm = tuple[str, ...]


class Bench:
    """The programs, the memory file, and what was measured."""

    def __init__(self, place: Path, others: share.Bench) -> None:
        self.place = place
        self.share = others
        self.fault = compiled(PROGRAMS / "fault.c", place)
        self.minimal = compiled(PROGRAMS / "handler.c", place)
        self.memory = place / "memory"
        with self.memory.open("wb") as file:
            for _ in range(MEMORY >> 20):
                file.write(random.randbytes(1 << 20))
        self.results: defaultdict[Arm, list[dict[str, float]]] = defaultdict(list)

    def touch(
        self, path: str, where: str, threads: str, run: str, order: str, *more: object
    ) -> None:
        """Measures one arm once."""
        length, count = RUNS[run]
        if path == "socket":
            count = FAULTS
        answer = subprocess.run(
            list(map(str, [self.fault, path, where, threads, length, order, count, *more])),
            stdout=subprocess.PIPE,
            check=True,
            timeout=PATIENCE,
        ).stdout
        found: dict[str, float] = json.loads(answer)
        cpu = found["touching_cpu_s"] + found["handling_cpu_s"]
        result = {
            "faults_per_s": found["faults"] / found["seconds"],
            "p50_us": found["seconds"] / found["faults"] * 1e6
            if path in EVERY
            else found["p50_us"],
            "p99_us": found["p99_us"],
            "cpu_us": cpu / found["faults"] * 1e6,
        }
        arm = more[2:] if path == "socket" else (path, where, threads, run, order)
        self.results[tuple(map(str, arm))].append(result)

    def ask(self, who: str, place: str, threads: str, socket: Path) -> None:
        where = "free" if place == "unpinned" else "here"
        arm = (who, place, threads)
        self.touch("socket", where, threads, "4 KiB", "random", socket, self.memory, *arm)

    @contextmanager
    def engine(self, place: str) -> Iterator[Path]:
        """A server with a filled template."""
        socket = self.place / f"engine-{place}"
        command = [server_program(), f"file:{self.memory}", "--firecracker", socket]
        with handler(command, socket, pinned=place == "pinned"):
            self.ask("warming", place, "1", socket)
            yield socket

    def handlers(self, engines: dict[str, Path]) -> None:
        """One of each handler, in random order."""
        arms = list(itertools.product(("engine", "minimal", "read"), PLACES, ("1", "2")))
        for who, place, threads in random.sample(arms, len(arms)):
            if who == "engine":
                self.ask(who, place, threads, engines[place])
            elif place != "bound":
                socket = self.place / "minimal"
                command = [self.minimal, socket, self.memory, *["read"] * (who == "read")]
                with handler(command, socket, pinned=place == "pinned"):
                    self.ask(who, place, threads, socket)

    def maps(self) -> None:
        """One of each kind of map, in random order."""
        kinds: list[Literal["thread", "signal"]] = ["thread", "signal"]
        for kind in random.sample(kinds, len(kinds)):
            order = random.sample(range(0, MEMORY, BLOCK), FAULTS)
            with (
                pagekit.Template(f"file:{self.memory}") as template,
                pagekit.map(template, faults=kind) as memory,
                memoryview(memory) as view,
            ):
                cpu = -time.process_time()
                times = [time.perf_counter()]
                for at in order:
                    _ = view[at]
                    times.append(time.perf_counter())
                cpu += time.process_time()
            took = sorted((after - before) * 1e6 for before, after in itertools.pairwise(times))
            result = {
                "faults_per_s": FAULTS / (times[-1] - times[0]),
                "p50_us": took[FAULTS // 2],
                "p99_us": took[FAULTS * 99 // 100],
                "cpu_us": cpu / FAULTS * 1e6,
            }
            self.results["map", kind, "1"].append(result)

    def paths(self) -> None:
        """One of each path, in random order."""
        ways = [*itertools.product(PATHS, HANDLERS, ("1", "2")), ("sigbus", "here", "1")]
        ways += [("sigbus", "here", "2"), *((path, "here", "1") for path in ALONE)]
        arms = list(itertools.product(ways, RUNS, ORDERS))
        for way, run, order in random.sample(arms, len(arms)):
            if way[0] in ALONE and run != "4 KiB":
                continue
            self.touch(*way, run, order, "", self.memory)

    def medians(self) -> dict[Arm, dict[str, float]]:
        return {
            arm: {name: statistics.median(one[name] for one in found) for name in found[0]}
            for arm, found in sorted(self.results.items())
            if arm[0] != "warming"
        }

    def ratios(self) -> dict[str, float]:
        medians, pages = self.medians(), self.share.medians()

        def rate(*arm: str) -> float:
            return medians[*arm, "1"]["faults_per_s"]

        def p50(*arm: str) -> float:
            return medians[*arm, "1"]["p50_us"]

        return {
            "copy_vs_minimal_pinned": rate("engine", "pinned") / rate("read", "pinned"),
            "copy_vs_minimal_unpinned": rate("engine", "unpinned") / rate("minimal", "unpinned"),
            "copy_vs_minimal_pinned_p50": p50("read", "pinned") / p50("engine", "pinned"),
            "copy_vs_minimal_unpinned_p50": p50("minimal", "unpinned") / p50("engine", "unpinned"),
            "share_second_vs_private": pages["second_random"] / pages["plain_random"],
            "share_second_vs_disk": pages["second_random"] / pages["disk_random"],
            "map_signal_vs_thread": rate("map", "signal") / rate("map", "thread"),
        }


def show(bench: Bench) -> None:
    medians = bench.medians()
    print(f"{'random single faults':28} {'faults/s':>9} {'p50 µs':>7} {'p99 µs':>7} {'cpu µs':>7}")
    for arm, found in medians.items():
        if len(arm) == 3:
            name = f"{arm[0]}, {arm[1]}, {arm[2]} thread{'s'[: arm[2] != '1']}"
            print(
                f"{name:28} {found['faults_per_s']:9.0f} {found['p50_us']:7.2f} "
                f"{found['p99_us']:7.2f} {found['cpu_us']:7.2f}"
            )
    columns = list(itertools.product(RUNS, ORDERS))
    print(f"\n{'median µs a fault':28}", end="")
    print("".join(f" {run:>8} {order[:4]}" for run, order in columns))
    for way in dict.fromkeys(arm[:3] for arm in medians if len(arm) == 5):
        print(f"{' '.join(way):28}", end="")
        for column in columns:
            cell = medians.get((*way, *column))
            print(f" {cell['p50_us']:13.2f}" if cell else f" {'':13}", end="")
        print()
    print("\nµs a page, touched in random order")
    for name, value in bench.share.medians().items():
        print(f"{name.removesuffix('_random'):28} {value:9.2f}")
    print()
    for name, value in bench.ratios().items():
        print(f"{name:28} {value:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--disk", type=Path, default=share.DISK, help="for a file in large folios")
    options = parser.parse_args()
    samples = (5, 1) if options.quick else (25, 5)
    with ExitStack() as stack:
        directory = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pk-bench-")
        place = Path(stack.enter_context(directory))
        bench = Bench(place, stack.enter_context(share.prepared(place, options.disk)))
        engines = {place: stack.enter_context(bench.engine(place)) for place in PLACES}
        for number in range(samples[0]):
            bench.handlers(engines)
            bench.maps()
            bench.share.sample("random")
            if number < samples[1]:
                bench.paths()
            print(f"sample {number + 1} of {samples[0]}", end="\r", file=sys.stderr)
    if options.json:
        named = {", ".join(arm): found for arm, found in bench.medians().items()}
        pages = bench.share.medians()
        print(json.dumps({"medians": named, "pages": pages, "ratios": bench.ratios()}))
    else:
        show(bench)


if __name__ == "__main__":
    main()
