"""What a page costs a fork, against a plain private mapping of the same bytes in the same run.

A program maps a file of 64 MiB and touches one byte of each page, in random order and in sequence:

plain     a private mapping of a file on tmpfs in 4 KiB folios: the floor
first     a template that is empty when the program starts, backend share
second    the same template, which the first one filled, backend share
copy      the same template, filled, backend copy

Prints microseconds a page (medians) and, under ``ratios``, each arm against ``plain``.

    python benchmarks/share.py [--json] [--quick]
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
from pathlib import Path

import pagekit

SIZE = 64 << 20
ORDERS = ("random", "sequential")


def touch(program: Path, stub: Path, order: str, environment: dict[str, str]) -> float:
    """Microseconds a page."""
    answer = subprocess.run(
        [program, stub, order],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    nanoseconds, pages = map(int, answer.stdout.split())
    return nanoseconds / pages / 1000


def sample(place: Path, program: Path, order: str, results: dict[str, list[float]]) -> None:
    """One of each arm, in random order as far as they do not need each other."""
    memory, stub = place / "memory", place / "stub"

    def plain() -> None:
        environment = pagekit.plain_environment(stub, memory)
        results[f"plain_{order}"].append(touch(program, stub, order, environment))

    def served() -> None:
        with (
            pagekit.Template(f"file:{memory}") as template,
            pagekit.Server(template, place / "socket", backend="share") as server,
        ):
            for arm, backend in (("first", "share"), ("second", "share"), ("copy", "copy")):
                environment = server.environment(stub, backend=backend)
                results[f"{arm}_{order}"].append(touch(program, stub, order, environment))

    for arm in random.sample([plain, served], 2):
        arm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 15")
    options = parser.parse_args()
    results: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        place = Path(directory)
        program = place / "touch"
        source = Path(__file__).parent / "programs" / "touch.c"
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
        (place / "memory").write_bytes(random.randbytes(SIZE))
        with (place / "stub").open("wb") as stub:
            stub.truncate(SIZE)
        for number in range(3 if options.quick else 15):
            for order in ORDERS:
                sample(place, program, order, results)
            print(f"sample {number + 1}", end="\r", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in sorted(results.items())}
    ratios = {
        f"{arm}_vs_plain_{order}": medians[f"{arm}_{order}"] / medians[f"plain_{order}"]
        for arm in ("first", "second", "copy")
        for order in ORDERS
    }
    if options.json:
        print(json.dumps({"microseconds_a_page": medians, "ratios": ratios}))
        return
    for name, value in medians.items():
        print(f"{name:20} {value:7.2f} µs a page")
    for name, value in ratios.items():
        print(f"{name:28} {value:7.2f}")


if __name__ == "__main__":
    main()
