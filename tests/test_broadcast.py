"""Pages that one client demanded, put into its siblings: each still reads its own truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from support import Daemon, Memory, need_userfaultfd
from vmm import Vmm

import pagekit
from pagekit.errors import UsageError

PAGES = 1024


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    need_userfaultfd()
    with support.reachable_directory() as directory:
        memory = support.make_memory(directory, PAGES, [(300, 500)])
        before = memory.digest()
        yield memory
        assert memory.digest() == before


def serve(memory: Memory, *options: object) -> Daemon:
    return Daemon(memory.spec, None, "--firecracker", memory.path.with_name("fc"), *options)


@pytest.mark.parametrize("layers", [[], ["--layer", "delay=200us"]], ids=["near", "far"])
def test_what_one_gives_back_no_other_brings_back(memory: Memory, layers: list[str]) -> None:
    """Four clients read, write and give back the same pages at once; content never comes back."""
    with serve(memory, "--broadcast", "all", *layers) as daemon, ExitStack() as stack:
        path = Path(daemon.ready["firecracker"][0])
        vmms = [
            stack.enter_context(Vmm(path, memory, f"split={1 + i}", f"place={i + 1}"))
            for i in range(4)
        ]
        for number, vmm in enumerate(vmms):
            vmm.right(f"remove {100 * number} 50")
        for number, vmm in enumerate(vmms):
            vmm.tell(f"storm 2000 2 {number}")
        for vmm in vmms:
            assert vmm.was_right()["removed"] > 0
        for vmm in vmms:
            vmm.right(f"read 0 {vmm.pages} random 2 both")
            vmm.quit()
        statistics, _ = daemon.stop()
        assert statistics["broadcast_pages"] > 0
        assert statistics["ahead_pages"] == statistics["broadcast_pages"]
        assert statistics["reports"] == []


def test_who_comes_behind_does_not_fault(memory: Memory) -> None:
    with serve(memory, "--broadcast", "all") as daemon:
        path = Path(daemon.ready["firecracker"][0])
        with Vmm(path, memory) as first, Vmm(path, memory) as second:
            second.ask("settle")
            first.right(f"read 0 {PAGES} random")
            # Whatever is on its way for the first one is there for the second.
            second.right(f"read 0 {PAGES} random")
            first.quit()
            second.quit()
        statistics, _ = daemon.stop()
        # Together no more faults than one alone: two for each block of sixteen, at worst.
        assert statistics["demand_faults"] <= 2 * PAGES // 16


def test_off_is_off(memory: Memory) -> None:
    with serve(memory) as daemon:
        path = Path(daemon.ready["firecracker"][0])
        with Vmm(path, memory) as first, Vmm(path, memory) as second:
            for vmm in (first, second):
                vmm.right(f"read 0 {PAGES}")
                vmm.quit()
        statistics, _ = daemon.stop()
        assert statistics["broadcast_pages"] == 0


def test_no_such_policy(memory: Memory, tmp_path: Path) -> None:
    status, err = support.refused(memory.spec, "--socket", tmp_path / "s", "--broadcast", "some")
    assert status == 2 and "'some' is no way to broadcast" in err.replace('"', "'")
    with (
        pagekit.Template(memory.spec) as template,
        pytest.raises(UsageError, match="no way to broadcast") as raised,
    ):
        pagekit.Server(template, tmp_path / "s", broadcast="some")  # type: ignore[arg-type]
    assert raised.value.hint == "give off, working-set or all"
