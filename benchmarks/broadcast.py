"""Whether it pays to put a page that one fork demanded into its siblings at once (`--broadcast`).

Twenty clients (tests/programs/firecracker.c) of one `pagekitd --firecracker` touch one byte of each
page of 32 MiB, all in the same random order, each beginning a little after the one before. The
memory file lies on tmpfs, and the template is empty in the beginning.

off          every client's pages come by its own faults (and what comes along with each)
working-set  `--broadcast working-set`, of a set that has all pages, none of them critical: by
             itself, its replay brings nothing into the clients
all          `--broadcast all`

Prints for each arm and stagger medians of:
faults       demand faults a client, as the server counted them
time         milliseconds a client takes for its pages: median and slowest of the twenty
whole        milliseconds from the first order to the last answer
cpu          CPU milliseconds of the server and of the twenty, until the last answer
Under ``ratios``, off against each other arm: above 1, broadcast is better. The arms of a sample run
in random order.

    python benchmarks/broadcast.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pagekit
from pagekit.client import server_program

HERE = Path(__file__).parent
SIZE = 32 << 20
CLIENTS = 20
STAGGERS = {"at once": 0.0, "2 ms": 0.002, "20 ms": 0.02}
SOURCES: dict[str, list[str]] = {"near": [], "far": ["--layer", "delay=1ms,1GB/s,16"]}
WHAT = ["faults", "time_ms", "slowest_ms", "whole_ms", "server_cpu_ms", "clients_cpu_ms"]
TICK = os.sysconf("SC_CLK_TCK")


class Bench:
    """The client, the memory file, the arms, and what was measured."""

    def __init__(self, place: Path) -> None:
        self.socket = place / "socket"
        self.memory = place / "memory"
        self.memory.write_bytes(random.randbytes(SIZE))
        self.client = place / "firecracker"
        source = HERE.parent / "tests/programs/firecracker.c"
        subprocess.run(["cc", "-O2", "-pthread", "-o", self.client, source], check=True)
        known = self.record(place / "all.pkws")
        self.arms: dict[str, list[object]] = {
            "off": [],
            "working-set": ["--broadcast", "working-set", "--working-set", known],
            "all": ["--broadcast", "all"],
        }
        self.results: defaultdict[tuple[str, str, str, str], list[float]] = defaultdict(list)
        """By source, stagger, arm and what was measured."""

    def record(self, path: Path) -> Path:
        """A working set of all pages, all of them demanded after "ready"."""
        with pagekit.Template(f"file:{self.memory}") as template:
            recording = template.record()
            recording.ready()
            with pagekit.Server(template, firecracker=self.socket):
                client = self.start()
                client.communicate("measure sequential 1\n")
            recording.finish().save(path)
        return path

    def start(self) -> Any:
        client = subprocess.Popen(
            [self.client, self.socket, self.memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdout is not None
        assert client.stdout.readline().startswith("ready")
        return client

    def run(self, source: str, stagger: str, arm: str) -> None:
        command = [
            *(server_program(), f"file:{self.memory}", "--firecracker", self.socket, "--json"),
            *SOURCES[source],
            *self.arms[arm],
        ]
        server = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdout is not None
        server.stdout.readline()
        clients = [self.start() for _ in range(CLIENTS)]
        for client in clients:
            client.stdin.write("settle\n")
            client.stdin.flush()
            client.stdout.readline()
        before, began = self.cpu(server.pid), time.perf_counter()
        for number, client in enumerate(clients):
            due = began + number * STAGGERS[stagger]
            time.sleep(max(0.0, due - time.perf_counter()))
            client.stdin.write("measure random 1\n")
            client.stdin.flush()
        times = [json.loads(client.stdout.readline())["seconds"] * 1000 for client in clients]
        whole = (time.perf_counter() - began) * 1000
        server_cpu = self.cpu(server.pid) - before
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        for client in clients:
            client.communicate()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        clients_cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        server.terminate()
        found = json.loads(server.communicate()[0])
        values = [
            found["demand_faults"] / CLIENTS,
            statistics.median(times),
            max(times),
            whole,
            server_cpu * 1000,
            clients_cpu * 1000,
        ]
        for what, value in zip(WHAT, values, strict=True):
            self.results[source, stagger, arm, what].append(value)

    @staticmethod
    def cpu(pid: int) -> float:
        """CPU seconds of a process so far."""
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def sample(self) -> None:
        """Every arm of everything once."""
        runs = [(s, t, arm) for s in SOURCES for t in STAGGERS for arm in self.arms]
        for source, stagger, arm in random.sample(runs, len(runs)):
            self.run(source, stagger, arm)

    def medians(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """By source, stagger, arm and what was measured."""
        found: dict[str, dict[str, dict[str, dict[str, float]]]] = {
            source: {stagger: {arm: {} for arm in self.arms} for stagger in STAGGERS}
            for source in SOURCES
        }
        for (source, stagger, arm, what), values in self.results.items():
            found[source][stagger][arm][what] = statistics.median(values)
        return found

    def ratios(self) -> dict[str, float]:
        """Above 1: broadcast is better."""
        found = {}
        for source, staggers in self.medians().items():
            for stagger, arms in staggers.items():
                for arm in list(arms)[1:]:
                    for what in WHAT:
                        ratio = arms["off"][what] / max(arms[arm][what], 0.01)
                        found[f"{source}, {stagger}, {arm}, {what}"] = ratio
        return found


def show(bench: Bench) -> None:
    print(
        f"{'':30} {'faults':>8} {'time':>8} {'slowest':>8} {'whole':>8} {'cpu':>8} {'clients':>8}"
    )
    for source, staggers in bench.medians().items():
        for stagger, arms in staggers.items():
            for arm, found in arms.items():
                values = " ".join(f"{found[what]:8.1f}" for what in WHAT)
                print(f"{source:5} {stagger:10} {arm:13} {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="3 samples instead of 9")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pk-bench-") as directory:
        bench = Bench(Path(directory))
        for number in range(3 if options.quick else 9):
            bench.sample()
            print(f"sample {number + 1}", end="\r", file=sys.stderr)
    if options.json:
        print(json.dumps({"medians": bench.medians(), "ratios": bench.ratios()}))
    else:
        show(bench)


if __name__ == "__main__":
    main()
