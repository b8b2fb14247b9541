"""What a page costs a restored Firecracker guest whose memory comes by userfaultfd, against
handlers that do what public examples do, in the same run.

One client (tests/programs/firecracker.c) touches one byte of each page of 128 MiB in two regions,
in random order, in sequence, and in random order by two threads. The memory file lies on tmpfs.

page      one page per event: poll, read one event, copy one page (benchmarks/programs/handler.c)
all       the same, but the first fault is answered by copying every region whole
cold      `pagekitd --firecracker`, with a template that is empty when the client connects
warm      the same server, once more, with the template that the first client filled: comparable to
          the handlers above, which populate their mapping of the file before they take a client
replay    as cold, with a working set of all pages: the server fills ahead
again     the same server, once more
NAME      with --handler: another handler, started as `PROGRAM SOCKET MEMORY`, one for each client

Prints for each arm and order medians of:
pages/s   pages touched per second
all       milliseconds from the handshake until every page was there
waits     touches of pages that were not there yet, and microseconds of their median and 99th
          percentile
touches   the same of all touches
The last two come from other clients, which ask before each touch whether the page is there. Under
``ratios``, each handler against warm, and in bringing all of the memory, the best of each handler
against the best of each of ours: above 1, pagekit is better. The arms of a sample run in random
order.

    python benchmarks/firecracker.py [--json] [--quick] [--handler PROGRAM]...
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common import PATIENCE, PROGRAMS, compiled, handler

import pagekit
from pagekit.client import server_program

TESTS = Path(__file__).parent.parent / "tests"
SIZE = 128 << 20
ORDERS = {"random": "random 1", "sequential": "sequential 1", "two threads": "random 2"}
TIMES = ["waits_p50_us", "waits_p99_us", "touches_p50_us", "touches_p99_us"]


class Bench:
    """The client, the memory file, the handlers, and what was measured."""

    def __init__(self, place: Path, others: Sequence[Path]) -> None:
        self.socket = place / "socket"
        self.memory = place / "memory"
        self.memory.write_bytes(random.randbytes(SIZE))
        self.client = compiled(TESTS / "programs/firecracker.c", place)
        reference = compiled(PROGRAMS / "handler.c", place)
        given = [self.socket, self.memory]
        pagekitd = [server_program(), f"file:{self.memory}", "--firecracker", self.socket]
        self.theirs: dict[str, Sequence[object]] = {
            "page": [reference, *given],
            "all": [reference, *given, "all"],
            **{path.name: [path, *given] for path in others},
        }
        self.commands: dict[tuple[str, ...], Sequence[object]] = {
            **{(arm,): command for arm, command in self.theirs.items()},
            ("cold", "warm"): pagekitd,
            ("replay", "again"): [*pagekitd, "--working-set", self.record(place / "all.pkws")],
        }
        """What to start, by the arms of the clients that it gets one after the other."""
        self.results: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        """By arm, order and what was measured."""

    def record(self, path: Path) -> Path:
        """A working set of all pages."""
        with pagekit.Template(f"file:{self.memory}") as template:
            recording = template.record()
            with pagekit.Server(template, firecracker=self.socket):
                self.ask("measure sequential 1")
            recording.finish().save(path)
        return path

    def ask(self, order: str) -> dict[str, float]:
        """What a new client answers."""
        quarter = SIZE // 4096 // 4
        answer = subprocess.run(
            [self.client, self.socket, self.memory, f"regions={quarter}+{3 * quarter},0+{quarter}"],
            input=f"settle\n{order}\n",
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=PATIENCE,
        ).stdout
        found: dict[str, float] = json.loads(answer.splitlines()[-1])
        return found

    def sample(self) -> None:
        """Every arm in every order once."""
        runs = [
            (arms, order, what)
            for arms in self.commands
            for order in ORDERS
            for what in ("", "latency")
        ]
        for arms, order, what in random.sample(runs, len(runs)):
            with handler(self.commands[arms], self.socket):
                for arm in arms:
                    found = self.ask(f"measure {ORDERS[order]} {what}")
                    if not what:
                        found["pages_per_s"] = found["pages"] / found["seconds"]
                        found["all_ms"] = found["since_message_s"] * 1000
                    for name in [*TIMES, "waits"] if what else ["pages_per_s", "all_ms"]:
                        self.results[arm, order, name].append(found[name])

    def medians(self) -> dict[str, dict[str, dict[str, float]]]:
        """By arm, order and what was measured."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for arms in self.commands:
            for arm in arms:
                found[arm] = {order: {} for order in ORDERS}
        for (arm, order, name), values in self.results.items():
            found[arm][order][name] = statistics.median(values)
        return found

    def ratios(self) -> dict[str, float]:
        """Above 1: pagekit is better."""
        medians = self.medians()
        found = {}
        for arm in self.theirs:
            for order in ORDERS:
                theirs, ours = medians[arm][order], medians["warm"][order]
                ratio = ours["pages_per_s"] / theirs["pages_per_s"]
                found[f"{arm}, {order}, pages_per_s"] = ratio
                for name in TIMES:
                    found[f"{arm}, {order}, {name}"] = theirs[name] / ours[name]
        best = {
            arm: min(results["all_ms"] for results in orders.values())
            for arm, orders in medians.items()
        }
        for arm in self.theirs:
            for our in sorted(best.keys() - self.theirs.keys()):
                found[f"{arm}, all_ms, {our}"] = best[arm] / best[our]
        return found


def show(bench: Bench) -> None:
    print(f"{'':36} {'pages/s':>9} {'all':>7} {'waits':>7} {'p50':>9} {'p99':>9}", end="")
    print(f" {'touches p50':>11} {'p99':>8}")
    for arm, orders in bench.medians().items():
        for order, found in orders.items():
            print(
                f"{arm:24} {order:11} {found['pages_per_s']:9.0f} {found['all_ms']:7.1f} "
                f"{found['waits']:7.0f} {found['waits_p50_us']:9.2f} {found['waits_p99_us']:9.2f} "
                f"{found['touches_p50_us']:11.2f} {found['touches_p99_us']:8.2f}"
            )
    print("\npagekit, so many times better than:")
    for name, value in bench.ratios().items():
        print(f"  {name:48} {value:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 11")
    parser.add_argument(
        "--handler",
        type=Path,
        action="append",
        default=[],
        metavar="PROGRAM",
        help="a further arm: a handler started as PROGRAM SOCKET MEMORY (repeatable)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pk-bench-") as directory:
        bench = Bench(Path(directory), [path.resolve() for path in options.handler])
        for number in range(3 if options.quick else 11):
            bench.sample()
            print(f"sample {number + 1}", end="\r", file=sys.stderr)
    if options.json:
        print(json.dumps({"medians": bench.medians(), "ratios": bench.ratios()}))
    else:
        show(bench)


if __name__ == "__main__":
    main()
