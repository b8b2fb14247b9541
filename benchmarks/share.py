"""What a page costs a fork, against a plain private mapping of the same bytes in the same run.

A program maps a file of 64 MiB and touches one byte of each page, in random order and in sequence:

plain     a private mapping of a file on tmpfs in 4 KiB folios: the floor
disk      a private mapping of a cached file on disk, written in pieces of 1 MiB: in large folios,
          where the file system has them
first     a template that is empty when the program starts, backend share
second    the same template, which the first one filled, backend share
copy      the same template, filled, backend copy

Prints microseconds a page (medians) and, under ``ratios``, each arm against ``plain``.

    python benchmarks/share.py [--json] [--quick] [--disk DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import PROGRAMS, compiled

import pagekit

SIZE = 64 << 20
PIECE = 1 << 20
ORDERS = ("random", "sequential")
DISK = Path("/var/tmp")


class Bench:
    """The files, the program, and what was measured."""

    def __init__(self, place: Path, disk: Path) -> None:
        self.place = place
        self.program = compiled(PROGRAMS / "touch.c", place)
        self.stub = place / "stub"
        with self.stub.open("wb") as stub:
            stub.truncate(SIZE)
        self.memory = place / "share-memory"
        self.memory.write_bytes(random.randbytes(SIZE))
        self.disk = disk
        with disk.open("wb", buffering=0) as file, self.memory.open("rb") as memory:
            while piece := memory.read(PIECE):
                file.write(piece)
        self.results: defaultdict[str, list[float]] = defaultdict(list)
        """Microseconds a page, by arm and order."""

    def touch(self, arm: str, order: str, environment: dict[str, str]) -> None:
        answer = subprocess.run(
            [self.program, self.stub, order],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        nanoseconds, pages = map(int, answer.stdout.split())
        self.results[f"{arm}_{order}"].append(nanoseconds / pages / 1000)

    def served(self, order: str) -> None:
        with (
            pagekit.Template(f"file:{self.memory}") as template,
            pagekit.Server(template, self.place / "share-socket", backend="share") as server,
        ):
            for arm, backend in (("first", "share"), ("second", "share"), ("copy", "copy")):
                self.touch(arm, order, server.environment(self.stub, backend=backend))

    def sample(self, order: str) -> None:
        """One of each arm, in random order as far as they do not need each other."""
        for arm in random.sample(["plain", "disk", "served"], 3):
            if arm == "served":
                self.served(order)
            else:
                file = self.memory if arm == "plain" else self.disk
                self.touch(arm, order, pagekit.plain_environment(self.stub, file))

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in sorted(self.results.items())}

    def ratios(self) -> dict[str, float]:
        medians = self.medians()
        return {
            f"{arm}_vs_plain_{order}": medians[f"{arm}_{order}"] / medians[f"plain_{order}"]
            for arm in ("disk", "first", "second", "copy")
            for order in ORDERS
            if f"{arm}_{order}" in medians
        }


@contextmanager
def prepared(place: Path, disk: Path) -> Iterator[Bench]:
    """A benchmark with its files in ``place``, and one in ``disk`` as long as the context lasts."""
    with tempfile.NamedTemporaryFile(dir=disk, prefix="pk-bench-") as file:
        yield Bench(place, Path(file.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 15")
    parser.add_argument("--disk", type=Path, default=DISK, help="where the file on disk is made")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pk-bench-") as directory,
        prepared(Path(directory), options.disk) as bench,
    ):
        for number in range(3 if options.quick else 15):
            for order in ORDERS:
                bench.sample(order)
            print(f"sample {number + 1}", end="\r", file=sys.stderr)
    if options.json:
        print(json.dumps({"microseconds_a_page": bench.medians(), "ratios": bench.ratios()}))
        return
    for name, value in bench.medians().items():
        print(f"{name:20} {value:7.2f} µs a page")
    for name, value in bench.ratios().items():
        print(f"{name:28} {value:7.2f}")


if __name__ == "__main__":
    main()
