"""What a page costs a restored Firecracker guest whose memory comes by userfaultfd, against
handlers that do what public examples do, in the same run.

One client (tests/programs/firecracker.c) touches one byte of each page of 128 MiB in two regions,
in random order, in sequence, and in random order by two threads, after its handshake was read. The
memory file lies on tmpfs.

page      one page per event: poll, read one event, copy one page (benchmarks/programs/handler.c)
all       the same, but the first fault is answered by copying every region whole
pagekit   `pagekitd --firecracker`, with a template that is empty when the client connects
warm      the same server, once more, with the template that the first client filled
NAME      with --handler: another handler, started as `PROGRAM SOCKET MEMORY`, one for each client

Prints for each arm and order pages per second and the seconds until every page was there; and from
other clients, which ask before each touch whether the page is there already, the microseconds of
the touches that waited (median and 99th percentile), and how many did. Under ``ratios``, each arm
against ``pagekit``: above 1, pagekit is better. All medians; the arms of one sample run in random
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
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pagekit.client import server_program

HERE = Path(__file__).parent
SIZE = 128 << 20
ORDERS = {"random": "random 1", "sequential": "sequential 1", "two threads": "random 2"}
MEASURES = ("throughput", "latency")
PATIENCE = 60.0

Results = defaultdict[str, list[float]]


def compiled(source: Path, place: Path) -> Path:
    binary = place / source.stem
    subprocess.run(["cc", "-O2", "-pthread", "-o", binary, source], check=True)
    return binary


def listens(socket: Path) -> bool:
    """Whether somebody listens there; connecting would use up a handler that takes one client."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    accepting = "00010000"
    return any(row[-1] == str(socket) and row[3] == accepting for row in rows)


@contextmanager
def handler(command: Sequence[object], socket: Path) -> Iterator[None]:
    """A handler that listens, until the context ends."""
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not listens(socket):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not listen at {socket}")
            time.sleep(0.001)
        yield
    finally:
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)


class Bench:
    """The client, the memory file, the arms, and what was measured."""

    def __init__(self, place: Path, handlers: Sequence[Path]) -> None:
        self.socket = place / "socket"
        self.memory = place / "memory"
        self.memory.write_bytes(random.randbytes(SIZE))
        self.client = compiled(HERE.parent / "tests/programs/firecracker.c", place)
        reference = compiled(HERE / "programs/handler.c", place)
        self.results: Results = defaultdict(list)
        commands: dict[str, list[object]] = {
            "page": [reference, self.socket, self.memory],
            "all": [reference, self.socket, self.memory, "all"],
            **{path.name: [path, self.socket, self.memory] for path in handlers},
        }
        self.arms: dict[str, Callable[[str, str], None]] = {
            name: partial(self.run_handler, name, command) for name, command in commands.items()
        }
        self.arms["pagekit"] = self.run_pagekit

    def run_handler(self, arm: str, command: Sequence[object], order: str, measure: str) -> None:
        with handler(command, self.socket):
            self.touch(arm, order, measure)

    def run_pagekit(self, order: str, measure: str) -> None:
        command = [server_program(), f"file:{self.memory}", "--firecracker", self.socket]
        with handler(command, self.socket):
            self.touch("pagekit", order, measure)
            self.touch("warm", order, measure)

    def touch(self, arm: str, order: str, measure: str) -> None:
        pages = SIZE // 4096
        below, above = pages // 4, pages - pages // 4
        answer = subprocess.run(
            [self.client, self.socket, self.memory, f"regions={below}+{above},0+{below}"],
            input=f"settle\nmeasure {ORDERS[order]} {measure}\n",
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=PATIENCE,
        ).stdout
        found = json.loads(answer.splitlines()[-1])
        assert found["pages"] == pages
        if measure == "throughput":
            self.results[f"{arm}_{order}_pages_per_s"].append(pages / found["seconds"])
            self.results[f"{arm}_{order}_all_s"].append(found["seconds"])
        else:
            for name in ("waits", "p50_us", "p99_us"):
                self.results[f"{arm}_{order}_{name}"].append(found[name])

    def sample(self) -> None:
        """Every arm in every order once."""
        runs = [(arm, order, what) for arm in self.arms for order in ORDERS for what in MEASURES]
        for arm, order, what in random.sample(runs, len(runs)):
            self.arms[arm](order, what)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(found) for name, found in sorted(self.results.items())}

    def ratios(self, medians: dict[str, float]) -> dict[str, float]:
        """Above 1: better than that arm."""
        found = {}
        for arm in [*(name for name in self.arms if name != "pagekit"), "warm"]:
            for order in ORDERS:
                for name in ("pages_per_s", "p50_us", "p99_us"):
                    ratio = medians[f"{arm}_{order}_{name}"] / medians[f"pagekit_{order}_{name}"]
                    found[f"{arm}_{order}_{name}"] = 1 / ratio if name == "pages_per_s" else ratio
        # All of the memory, in whatever way is the fastest for each.
        best = {
            arm: min(medians[f"{arm}_{order}_all_s"] for order in ORDERS)
            for arm in [*self.arms, "warm"]
        }
        for arm in best:
            if arm != "pagekit":
                found[f"{arm}_populate"] = best[arm] / best["pagekit"]
        return found


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
    medians = bench.medians()
    ratios = bench.ratios(medians)
    if options.json:
        print(json.dumps({"medians": medians, "ratios": ratios}))
        return
    print(f"{'':28} {'pages/s':>10} {'all, s':>8} {'waits':>7} {'p50 µs':>8} {'p99 µs':>8}")
    for arm in [*bench.arms, "warm"]:
        for order in ORDERS:
            row = f"{arm}_{order}"
            print(
                f"{arm:16} {order:11} {medians[f'{row}_pages_per_s']:10.0f} "
                f"{medians[f'{row}_all_s']:8.3f} {medians[f'{row}_waits']:7.0f} "
                f"{medians[f'{row}_p50_us']:8.2f} {medians[f'{row}_p99_us']:8.2f}"
            )
    print("\npagekit, so many times better than:")
    for name, value in ratios.items():
        print(f"  {name:44} {value:7.2f}")


if __name__ == "__main__":
    main()
