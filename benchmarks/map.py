"""What a touch of a missing page of a map costs, by who brings it, in the same run.

One thread touches pages of maps in random order, one of each map in turn:

thread    pagekit.map(..., faults="thread"): the engine of this process brings the page
signal    pagekit.map(..., faults="signal"): the thread itself does, in its handler of SIGBUS
zero      anonymous memory: the kernel's own fault, for comparison
file      a private mapping of the same file, cached

by *single* pages (each brings itself alone), and by *windows* (each brings the 15 pages around it,
as is usual). The file is cached, so nobody waits for it.

Prints microseconds (median, 99th percentile) with what Python takes for a subscript, and under
``ratios`` the time of ``signal`` against ``thread``.

    python benchmarks/map.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pagekit

PAGE = 4096
WINDOW = 16
ARMS = ("thread", "signal", "zero", "file")


def measure(path: Path, kind: str, times: dict[str, list[float]]) -> None:
    """One round: every arm touches the same pages, in the same order."""
    size = path.stat().st_size
    with ExitStack() as stack:
        views = {}
        for faults in ("thread", "signal"):
            template = stack.enter_context(pagekit.Template(f"file:{path}"))
            if kind == "single":
                # While demands are recorded nothing comes along with a page.
                template.record()
            found = stack.enter_context(pagekit.map(template, faults=faults))
            views[faults] = stack.enter_context(memoryview(found))
        anonymous = stack.enter_context(mmap.mmap(-1, size))
        anonymous.madvise(mmap.MADV_NOHUGEPAGE)
        file = stack.enter_context(path.open("rb"))
        plain = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        views["zero"] = stack.enter_context(memoryview(anonymous))
        views["file"] = stack.enter_context(memoryview(stack.enter_context(plain)))
        for page in random.sample(range(0, size // PAGE, WINDOW), size // PAGE // WINDOW):
            for arm in random.sample(ARMS, len(ARMS)):
                view, at = views[arm], page * PAGE
                before = time.perf_counter_ns()
                view[at]
                times[arm].append((time.perf_counter_ns() - before) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one round, of a quarter of the size")
    options = parser.parse_args()
    size, rounds = (32 << 20, 1) if options.quick else (128 << 20, 3)
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "memory"
        path.write_bytes(random.randbytes(size))
        for kind in ("single", "windows"):
            results[kind] = defaultdict(list)
            for _ in range(rounds):
                measure(path, kind, results[kind])
    medians = {
        kind: {arm: statistics.median(times[arm]) for arm in ARMS}
        for kind, times in results.items()
    }
    ratios = {
        f"signal_vs_thread_{kind}": found["signal"] / found["thread"]
        for kind, found in medians.items()
    }
    if options.json:
        print(json.dumps({"microseconds": medians, "ratios": ratios}))
        return
    for kind, times in results.items():
        print(f"{kind} (µs)")
        for arm in ARMS:
            worst = statistics.quantiles(times[arm], n=100)[98]
            print(f"  {arm:8} {medians[kind][arm]:8.2f}   p99 {worst:8.2f}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
