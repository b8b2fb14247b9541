"""Working sets from Python and from the command line: recorded, saved, united, replayed."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import Daemon, Memory, need_userfaultfd, start, stopping

import pagekit
from pagekit import WorkingSet
from pagekit.errors import IntegrityError, Missing, SourceError, UsageError

TOUCH = "start = map_file()\nfor number in ARGUMENTS: check(start, [int(number)])\nsay('right')"


@pytest.fixture
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


def recorded(memory: Memory, *pages: int, backend: str = "share") -> WorkingSet:
    """The working set of a program that touches these pages."""
    with support.serving(memory, backend) as served:
        recording = served.template.record()
        served.run(TOUCH, *pages)
        return recording.finish()


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_what_a_program_demands_is_recorded_and_nothing_else(memory: Memory, backend: str) -> None:
    found = recorded(memory, 5, 6, 200, 1, 70, backend=backend)
    # 70 is in a hole: nobody has to fetch it.
    assert found.page_numbers() == {1, 5, 6, 200}
    assert (found.pages, found.critical_pages, found.bytes) == (4, 4, 4 * 4096)
    assert found.phases == ([[(1, 1), (5, 2), (200, 1)]], [])
    assert found.recordings == 1


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_a_replayed_set_is_there_before_it_is_asked_for(memory: Memory, backend: str) -> None:
    pages = [*range(10, 40), 200, 210, 499]
    found = recorded(memory, *pages)
    with support.serving(memory, backend, layers=["stats"]) as served:
        replay = served.template.replay(found)
        assert replay.wait(60)
        before = served.server.statistics()
        served.run(TOUCH, *pages)
        after = served.server.statistics()
        assert after["fetches"] == before["fetches"], "nothing had to be fetched for the program"
        if backend == "share":
            assert after["demand_faults"] == before["demand_faults"]
        statistics = replay.statistics()
        assert statistics["done"] and statistics["failure"] is None
        assert statistics["fetched_pages"] == len(pages)
        assert statistics == after["template"]["replay"]


def test_ready_settling_and_time_divide_a_recording(memory: Memory) -> None:
    with support.serving(memory) as served:
        recording = served.template.record()
        served.run(TOUCH, 1, 2)
        recording.ready()
        served.run(TOUCH, 3)
        found = recording.finish()
        assert (found.critical_pages, found.pages) == (2, 3)
        assert recording.finish(settle=60) == found, "what was said counts"
    with support.serving(memory) as served:
        recording = served.template.record()
        served.run(TOUCH, 1, 2)
        served.run(TOUCH, 3)
        # Starting another program takes longer than touching a page.
        assert recording.finish(settle=60).critical_pages == 3
        assert recording.finish(time=60).critical_pages == 3
        assert recording.finish(settle=0.0).critical_pages == 1
        assert recording.finish(time=0.0).critical_pages == 1
        with pytest.raises(ValueError):
            recording.finish(settle=-1)


def test_sets_are_united_saved_and_loaded(memory: Memory, tmp_path: Path) -> None:
    one, other = recorded(memory, 1, 2), recorded(memory, 2, 9)
    both = one | other
    assert both.page_numbers() == {1, 2, 9} and both.recordings == 2
    assert both == other | one and both != one
    path = tmp_path / "set"
    both.save(path)
    assert WorkingSet.load(path) == both
    assert "3 critical pages of 3, 2 recordings" in repr(both)
    with pytest.raises(TypeError):
        both | 7  # type: ignore[operator]
    with pytest.raises(Missing, match="cannot read working set"):
        WorkingSet.load(tmp_path / "none")
    with pytest.raises(Missing, match="cannot write working set"):
        both.save(tmp_path / "none" / "set")


def test_a_set_of_another_template_or_none_is_refused(memory: Memory, tmp_path: Path) -> None:
    found = recorded(memory, 1)
    other = support.make_memory(tmp_path, pages=512, holes=())
    with pagekit.Template(other.spec) as template:
        with pytest.raises(IntegrityError, match="another template"):
            template.replay(found)
        with pytest.raises(IntegrityError, match="another template"):
            found.check(template)
    with pytest.raises(IntegrityError, match="another template"):
        found | recorded(other, 1)
    with pagekit.Template("zero:8K") as template, pytest.raises(IntegrityError, match="2"):
        template.replay(found)
    path = tmp_path / "set"
    found.save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"x", content[:70] + b"y" + content[71:]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="is no working set"):
            WorkingSet.load(path)


def test_a_copy_of_the_file_is_the_same_template(memory: Memory, tmp_path: Path) -> None:
    found = recorded(memory, 1)
    copy = tmp_path / "copy"
    copy.write_bytes(memory.path.read_bytes())  # dense, where the first has holes
    with pagekit.Template(f"file:{copy}") as template:
        assert template.replay(found).wait(60)


def test_a_source_that_fails_ends_a_replay_and_no_demand(memory: Memory) -> None:
    found = recorded(memory, *range(150, 200))
    with support.serving(memory, layers=["fail=page:170"], deadline=0.05) as served:
        replay = served.template.replay(found)
        with pytest.raises((SourceError, IntegrityError), match="page:170"):
            replay.wait(60)
        served.run(TOUCH, 150, 199, 3)


def test_loading_takes_a_request_size(memory: Memory) -> None:
    data = 512 - sum(end - start for start, end in memory.holes)
    with pagekit.Template(memory.spec, layers=["stats"]) as template:
        template.load(request=16384, parallel=2)
        assert template.statistics()["present_pages"] == data
        assert template.statistics()["stack"]["stats.reads"] == data // 4


def test_closing_a_template_ends_its_replay(memory: Memory) -> None:
    found = recorded(memory, *range(400, 512))
    template = pagekit.Template(memory.spec, layers=["delay=100ms,1MB/s,1"])
    replay = template.replay(found, parallel=1)
    template.close()
    assert replay.wait(60)
    assert replay.statistics()["fetched_pages"] <= 112


# The server program


def touch(daemon: Daemon, memory: Memory, *pages: int) -> None:
    stub = memory.stub()
    command = support.target_command(TOUCH, stub, memory, *pages)
    process = start(command, daemon.environment(stub))
    with stopping(process):
        assert support.ended(process)[0] == "right\n"


def test_the_server_records_and_unites(memory: Memory) -> None:
    need_userfaultfd()
    path, socket = memory.path.with_name("set"), memory.path.with_name("socket")
    options = ["--backend", "share", "--record", path, "--ready", "exit"]
    for pages, known in (([1, 2, 3], {1, 2, 3}), ([3, 77, 150], {1, 2, 3, 150})):
        with Daemon(memory.spec, socket, *options) as daemon:
            touch(daemon, memory, *pages)
            _, said = daemon.stop()
        assert WorkingSet.load(path).page_numbers() == known
        assert f"set: {len(known)} pages, {len(known)} of them critical" in said
    with Daemon(memory.spec, socket, "--backend", "share", "--working-set", path) as daemon:
        touch(daemon, memory, 1, 2, 3, 150)
        statistics, _ = daemon.stop()
    assert statistics["template"]["replay"]["planned_pages"] == 4


def test_a_signal_says_that_the_sandbox_is_ready(memory: Memory) -> None:
    need_userfaultfd()
    path, socket = memory.path.with_name("set"), memory.path.with_name("socket")
    options = ["--backend", "share", "--record", path, "--ready", "exit"]
    with Daemon(memory.spec, socket, *options) as daemon:
        touch(daemon, memory, 1, 2)
        daemon.process.send_signal(signal.SIGUSR1)
        support.until(path.exists, "the set was saved")
        touch(daemon, memory, 1, 2, 3)
        daemon.stop()
    found = WorkingSet.load(path)
    assert (found.critical_pages, found.page_numbers()) == (2, {1, 2, 3})


@pytest.mark.parametrize("option", ["--record", "--working-set"])
def test_the_server_refuses_wrong_files_at_once(memory: Memory, option: str) -> None:
    path, socket = memory.path.with_name("set"), memory.path.with_name("socket")
    path.write_text("#!/bin/sh\n")
    before = hashlib.sha256(path.read_bytes()).digest()
    status, said = support.refused(memory.spec, "--socket", socket, option, path)
    assert status == IntegrityError.exit_code and "is no working set: it begins otherwise" in said
    assert hashlib.sha256(path.read_bytes()).digest() == before
    recorded(memory, 1).save(path)
    status, said = support.refused("zero:64K", "--socket", socket, option, path)
    assert status == IntegrityError.exit_code and "record it anew" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ready", "soon"], "settle=500ms, time=10s or exit"),
        (["--rate", "100M"], "is no rate"),
        (["--allow", "root"], "is no user id"),
    ],
)
def test_the_server_explains_its_options(memory: Memory, arguments: list[str], said: str) -> None:
    socket = memory.path.with_name("socket")
    status, text = support.refused(memory.spec, "--socket", socket, *arguments)
    assert status == UsageError.exit_code and said in text


def test_the_rate_is_kept(memory: Memory) -> None:
    path, socket = memory.path.with_name("set"), memory.path.with_name("socket")
    recorded(memory, *range(400, 512)).save(path)
    need_userfaultfd()
    options = ["--backend", "copy", "--working-set", path, "--rate", "500kB/s", "--rest"]
    with Daemon(memory.spec, socket, *options) as daemon:
        # At that rate it is not done yet, and a program does not wait for it.
        touch(daemon, memory, 511, 3)
        statistics, _ = daemon.stop()
    json.dumps(statistics["template"]["replay"])
    assert statistics["template"]["replay"]["planned_pages"] == 112
