"""Firecracker's clients under load for a while, every byte checked (tests/programs/firecracker.c
says how): several at once, each with regions in a new order, with threads that read, write and give
memory back at random, in user mode and in the kernel. A client lives for one storm and a last look
at all of its memory; every tenth is killed instead. One server answers at once, another one's
source is slow, a third one's clients have pages of 2 MiB, where the machine has such pages.

Beside them live targets that do to their memory all that userfaultfd has events for (events.py).

    make soak                            one minute
    make soak ARGS='--seconds 600 --seed 7'

Prints what was done, as JSON; fails at the first wrong byte, at the first page that cannot be had,
when a server complains, and when it keeps descriptors or memory of clients that are gone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import events
import support
from support import Daemon, Memory
from vmm import HUGE, Vmm, descriptors, given_back, huge_pages

PAGES = 16384
CLIENTS = 3
"""At once, of each server."""
MEMORY_LEFT = 16 << 20
"""Bytes that a server may have of its own at the end, beyond what it had after a few clients."""


@dataclass
class Post:
    """A server under load."""

    name: str
    daemon: Daemon
    memory: Memory
    page: int
    operations: int
    done: Counter[str] = field(default_factory=Counter)

    def options(self, draw: random.Random) -> list[str]:
        """How the next client maps its memory."""
        total = self.memory.size // self.page
        cuts = sorted(draw.sample(range(1, total), draw.randrange(min(total - 1, 12))))
        regions = [(start, end - start) for start, end in pairwise([0, *cuts, total])]
        draw.shuffle(regions)
        options = [
            "regions=" + ",".join(f"{start}+{count}" for start, count in regions),
            f"page={self.page}",
            f"place={draw.choice(['gaps', 'adjacent', draw.randrange(1, 1000)])}",
            f"size={draw.choice(['page_size', 'page_size_kib', 'both'])}",
            f"send={draw.choice(['whole', 'whole', 'first', 'last', 'after'])}",
            f"scratch={self.memory.path.with_name(f'scratch-{self.name}-{draw.random()}')}",
        ]
        if draw.random() < 0.2:
            options.append("memory=shared")
        return options

    def one_client(self, draw: random.Random) -> None:
        options = self.options(draw)
        path = Path(self.daemon.ready["firecracker"][0])
        scratch = Path(options[5].partition("=")[2])
        pages, seed = self.memory.size // self.page, draw.randrange(1 << 30)
        try:
            with Vmm(path, self.memory, *options) as vmm:
                vmm.tell(f"storm {self.operations} {draw.randrange(1, 5)} {seed}")
                if draw.random() < 0.1:
                    vmm.kill()
                    self.done["killed"] += 1
                    return
                self.done.update(counts(vmm.was_right()))
                self.done.update(counts(vmm.right(f"read 0 {pages} random 2 both")))
                self.done["clients"] += 1
        except AssertionError as error:
            what = f"{self.name}, {' '.join(options)}, storm {seed}"
            raise AssertionError(f"{what}: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    def own_memory(self) -> int:
        """Bytes that the server has beside its template's file."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        [found] = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found) << 10


def counts(answer: dict[str, int]) -> dict[str, int]:
    return {name: answer[name] for name in ("reads", "kernel_reads", "writes", "raced", "removed")}


def post(
    stack: ExitStack, place: Path, pages: int, page: int, operations: int, *layers: str
) -> Post:
    place.mkdir()
    memory = support.make_memory(place, pages, [(pages // 4, pages // 3), (pages - 700, pages - 3)])
    socket = place / "firecracker"
    daemon = stack.enter_context(Daemon(memory.spec, None, "--firecracker", socket, *layers))
    return Post(place.name, daemon, memory, page, operations)


def soak(seconds: float, seed: int, clients: int = CLIENTS) -> dict[str, dict[str, int]]:
    """Loads all servers for so long: what was done, by server."""
    support.program("firecracker")  # compiled before threads want it
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pk-soak-")))
        posts = [
            post(stack, directory / "quick", PAGES, support.PAGE, 6_000),
            post(stack, directory / "slow", 4096, support.PAGE, 3_000, "--layer", "delay=300us"),
        ]
        huge = 16
        if stack.enter_context(huge_pages(huge * clients, or_none=True)):
            pages = huge * HUGE // support.PAGE
            posts.append(post(stack, directory / "huge", pages, HUGE, 150))
        before = {one.name: one.memory.digest() for one in posts}
        held = {one.name: descriptors(one.daemon.process.pid) for one in posts}
        own: dict[str, int] = {}
        end = time.monotonic() + seconds
        errors: list[BaseException] = []

        def keep_busy(one: Post, number: int) -> None:
            draw = random.Random(f"{seed} {one.name} {number}")
            try:
                while time.monotonic() < end and not errors:
                    one.one_client(draw)
                    if number == 0 and time.monotonic() > end - seconds * 0.8:
                        own.setdefault(one.name, one.own_memory())
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=keep_busy, args=(one, number))
            for one in posts
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        done = {}
        for one in posts:
            given_back(one.daemon.process.pid, held[one.name])
            assert one.own_memory() - own.get(one.name, 1 << 40) < MEMORY_LEFT, one.name
            statistics, err = one.daemon.stop()
            assert statistics["targets"] == [], err
            # All there may be to say is that a client was killed before it could be served.
            assert all("has ended" in report for report in statistics["reports"]), err
            assert "error" not in err, err
            assert one.memory.digest() == before[one.name]
            done[one.name] = dict(one.done) | {"faults": statistics["demand_faults"]}
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(json.dumps({"seconds": options.seconds, "seed": options.seed}), flush=True)
    with ThreadPoolExecutor() as pool:
        wild = pool.submit(events.soak, options.seconds, options.seed)
        for name, done in soak(options.seconds, options.seed).items():
            print(json.dumps({"server": name, **done}))
        for name, done in wild.result().items():
            print(json.dumps({"events": name, **done}))


if __name__ == "__main__":
    main()
