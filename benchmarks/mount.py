"""What a page of a mounted file costs, against plain private mappings of the same bytes, same run.

A program maps a file of 64 MiB and touches one byte of each page, in random order and in sequence:

plain        a private mapping of a file on tmpfs in 4 KiB folios: the floor
file         of a local file that the kernel has cached
first        of a mounted file, from an empty template whose source is that local file
second       the same again: the kernel has the pages
pushed       of a mounted file whose pages a replay has put into the kernel's cache
passthrough  of a mounted file that the kernel serves from the local file by itself
remote       as ``first``, the source 2 ms away, with 1 GB/s and 16 requests at once

Prints microseconds a page (medians), under ``ratios`` each arm against ``plain``, and under
``memory_mib`` what the pages take: in the template, and once more in the kernel's cache of the
mounted file. Needs root.

    python benchmarks/mount.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pagekit
from pagekit.sandbox.memory import cached_kib

SIZE = 64 << 20
ORDERS = ("random", "sequential")
REMOTE = "delay=2ms,1GB/s,16"

Results = dict[str, list[float]]


class Bench:
    """Files with the same bytes on tmpfs and on a disk, and the program that touches them."""

    def __init__(self, shared: Path, disk: Path) -> None:
        self.memory, self.file, self.mounted = shared / "memory", disk / "memory", disk / "mounted"
        self.mounted.mkdir()
        self._program = shared / "touch"
        source = Path(__file__).parent / "programs" / "touch.c"
        subprocess.run(["cc", "-O2", "-o", self._program, source], check=True)
        content = random.randbytes(SIZE)
        for path in (self.memory, self.file):
            path.write_bytes(content)
        self.everything = self._record_everything()

    def touch(self, path: Path | None, order: str) -> float:
        """Microseconds a page."""
        assert path is not None
        command = [self._program, path, order]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        nanoseconds, pages = map(int, answer.stdout.split())
        return nanoseconds / pages / 1000

    @contextlib.contextmanager
    def mount(self, *layers: str, passthrough: str = "never") -> Iterator[pagekit.Server]:
        mount = pagekit.Mount(self.mounted, passthrough=passthrough)
        with (
            pagekit.Template(f"file:{self.file}", layers=layers) as template,
            pagekit.Server(template, mount=mount) as server,
        ):
            yield server

    def _record_everything(self) -> pagekit.WorkingSet:
        with self.mount() as server:
            recording = server.template.record()
            self.touch(server.mount_path, "sequential")
            return recording.finish()


def sample(bench: Bench, order: str, results: Results, memory: Results) -> None:
    """One of each arm, in random order as far as they do not need each other."""

    def put(arm: str, path: Path | None) -> None:
        results[f"{arm}_{order}"].append(bench.touch(path, order))

    def plain() -> None:
        put("plain", bench.memory)

    def file() -> None:
        put("file", bench.file)

    def served() -> None:
        with bench.mount() as server:
            put("first", server.mount_path)
            put("second", server.mount_path)
            assert server.mount_path is not None
            present = server.statistics()["template"]["present_pages"] * 4096
            memory["template"].append(present / (1 << 20))
            memory["cache"].append(cached_kib(server.mount_path) / 1024)

    def pushed() -> None:
        with bench.mount() as server:
            server.template.replay(bench.everything)
            while server.statistics()["mount"]["pushed_pages"] < SIZE // 4096:
                time.sleep(0.001)
            put("pushed", server.mount_path)

    def passthrough() -> None:
        with bench.mount(passthrough="always") as server:
            put("passthrough", server.mount_path)

    def remote() -> None:
        with bench.mount(REMOTE) as server:
            put("remote", server.mount_path)

    arms: list[Callable[[], None]] = [plain, file, served, pushed, passthrough, remote]
    for arm in random.sample(arms, len(arms)):
        arm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 15")
    options = parser.parse_args()
    results: Results = defaultdict(list)
    memory: Results = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as shared,
        tempfile.TemporaryDirectory() as disk,
    ):
        bench = Bench(Path(shared), Path(disk))
        for number in range(3 if options.quick else 15):
            for order in ORDERS:
                sample(bench, order, results, memory)
            print(f"sample {number + 1}", end="\r", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in sorted(results.items())}
    ratios = {
        f"{arm}_vs_plain_{order}": medians[f"{arm}_{order}"] / medians[f"plain_{order}"]
        for arm in ("file", "first", "second", "pushed", "passthrough", "remote")
        for order in ORDERS
    }
    mib = {name: statistics.median(values) for name, values in memory.items()}
    if options.json:
        report = {"microseconds_a_page": medians, "ratios": ratios, "memory_mib": mib}
        print(json.dumps(report))
        return
    for name, value in medians.items():
        print(f"{name:24} {value:7.2f} µs a page")
    for name, value in ratios.items():
        print(f"{name:32} {value:7.2f}")
    for name, value in mib.items():
        print(f"{name:24} {value:7.1f} MiB")


if __name__ == "__main__":
    main()
