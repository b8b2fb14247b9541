"""The comparisons' parts: what guests are asked, and what is said of figures, which are made up."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

import pagekit
from pagekit.errors import IntegrityError
from pagekit.report import goals
from pagekit.report.comparison import as_json, as_tables, ratios
from pagekit.sandbox import Accelerator
from pagekit.sandbox.comparison import Comparison, local, remote
from pagekit.sandbox.comparison.requests import SOME_PAGES, Requests
from pagekit.sandbox.guest_agent import DATA_PAGES, PAGE_SIZE, data_page

MIB = 1 << 20


# Requests


@pytest.fixture(scope="module")
def requests() -> Requests:
    return Requests()


class Data:
    """The guest's data, and which places were touched."""

    def __init__(self) -> None:
        self.touched: list[int] = []

    def __getitem__(self, place: int) -> int:
        self.touched.append(place)
        return data_page(place // PAGE_SIZE)[place % PAGE_SIZE]


def touched(code: str) -> tuple[list[int], object]:
    namespace: dict[str, object] = {"data": (data := Data())}
    exec(code, namespace)
    return data.touched, namespace["result"]


def test_a_request_for_every_page(requests: Requests) -> None:
    for number in (0, 5, 40):
        request = requests.every_page(number)
        right = (number + 1) * sum(data_page(page)[number % 32] for page in range(DATA_PAGES))
        assert request.expected == str(right)
    assert len({requests.every_page(number).expected for number in range(20)}) == 20


def test_requests_for_some_pages(requests: Requests) -> None:
    """At least 32 MiB each, and nothing in common but most of the pages."""
    pages, offsets, computations = [], [], []
    for seed in (remote.MEASURED, *remote.RECORDED):
        request = requests.some_pages(seed)
        places, result = touched(request.code)
        assert str(result) == request.expected
        assert requests.some_pages(seed) == request
        pages.append([place // PAGE_SIZE for place in places])
        offsets.append({place % PAGE_SIZE for place in places})
        computations.append(request.code.splitlines()[-1])
        assert len(set(pages[-1])) == len(pages[-1]) == SOME_PAGES
        assert pages[-1] != sorted(pages[-1])
    assert remote.TOUCHED_BYTES == SOME_PAGES * PAGE_SIZE >= 32 * MIB
    assert all(len(offset) == 1 for offset in offsets)
    assert len(set(computations)) == len({*map(frozenset, offsets)}) == len(offsets)
    measured, *recorded = map(set, pages)
    assert measured not in recorded
    assert measured - set.union(*recorded)


def test_answers_are_checked() -> None:
    requests = Requests()
    request = requests.every_page(3)
    requests.check(request, request.expected)
    for wrong in (None, "0", request.expected + "0"):
        with pytest.raises(IntegrityError, match="is right"):
            requests.check(request, wrong)
    assert requests.checked == 1


def test_the_store_is_what_it_is_said_to_be() -> None:
    assert remote.STORE.layer == "delay=2ms,1GB/s,16"
    with pagekit.Template(f"zero:{MIB}", layers=[remote.STORE.layer]) as template:
        stack = template.statistics()["stack"]
    assert stack["delay.requests"] == stack["delay.bytes"] == 0


# Reports


def made_up_local() -> local.Local:
    result = local.Local(memory_bytes=512 * MIB, image_bytes=170 * MIB, digest="ab" * 32)
    result.host_basis = "guessing"
    result.cold = [local.Sample(5.0 + i, 4.0 + i, 200_000, 100_000) for i in range(3)]
    ready = {"eager": 0.27, "map_private": 0.14, "lazy": 0.22, "replay": 0.18}
    for name, arm in result.arms.items():
        seconds = ready.get(name, 0.16)
        arm.samples = [
            local.Sample(seconds + i / 1000, seconds / 2, 1100, 22_000, 300, 280, 59 * MIB, 12_000)
            for i in range(3)
        ]
        arm.guest_kib_many, arm.vmm_kib_many, arm.host_kib_many = 1200.0, 22_000.0, 650_000
    result.arms["eager"].guest_kib_many = result.arms["eager"].host_kib_many = None
    result.arms["eager"].skipped = "4000 MiB are needed and 3000 MiB available"
    return result


def made_up_remote(replay_s: float = 0.2, moved: int = 50 * MIB) -> remote.Remote:
    result = remote.Remote(
        needed_bytes=40 * MIB,
        needed_bytes_many=44 * MIB,
        working_set_bytes=45 * MIB,
        memory_bytes=1024 * MIB,
        content_bytes=832 * MIB,
        caches_s=1.5,
        eager_tried={128 << 10: 1.0, 512 << 10: 0.9, 2 << 20: 0.95},
        digest="cd" * 32,
    )
    for name, seconds in (("eager", 1.0), ("lazy", 2.4), ("replay", replay_s)):
        alone = remote.Sample((seconds,), (seconds / 2,), 900, moved, 7, 0, moved - 40 * MIB)
        many = dataclasses.replace(alone, ready_s=(seconds, seconds + 1, seconds + 2))
        result.arms[name] = remote.Arm([alone] * 3, [many])
    return result


def made_up(
    found_local: local.Local | None = None, found_remote: remote.Remote | None = None
) -> Comparison:
    accelerator = Accelerator("tcg", "kvm does not work here: no")
    return Comparison(accelerator, "share", 20, 123, found_local, found_remote)


def written(result: Comparison) -> str:
    page = Console(file=io.StringIO(), width=100, highlight=False)
    page.print(as_tables(result))
    assert isinstance(page.file, io.StringIO)
    text = page.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…│" not in text  # nothing was cut off
    return text


def row(text: str, name: str) -> list[str]:
    found = re.search(rf"│ +{re.escape(name)} +│(.*)│$", text, re.M)
    assert found, name
    return [cell.strip() for cell in found[1].split("│")]


def test_where_nothing_can_be_mounted() -> None:
    found = made_up_local()
    del found.arms["mount"]
    found.left_out["mount"] = "there is no /dev/fuse"
    result = made_up(found)
    assert "mount is left out: there is no /dev/fuse." in written(result)
    report = json.loads(json.dumps(as_json(result)))
    assert "mount" not in report["local"]
    assert report["local_left_out"] == {"mount": "there is no /dev/fuse"}
    assert not any("mount_to" in name for name in report["ratios"])


def test_both_tables() -> None:
    result = made_up(made_up_local(), made_up_remote())
    report = json.loads(json.dumps(as_json(result)))
    assert report["cold_boot_s"] == 6.0
    assert report["answers_checked"] == 123
    assert set(report["local"]) == set(local.ARMS)
    assert report["local"]["mount"]["ready_s"]["median"] == 0.161
    assert set(report["remote"]) == {"eager", "lazy", "replay"}
    replay = report["remote"]["replay"]
    assert replay["ready_s"] == {"median": 0.2, "min": 0.2, "max": 0.2}
    assert replay["forks_20"]["ready_s"]["median"] == 0.2
    assert replay["forks_20"]["median_ready_s"]["median"] == 1.2
    assert replay["forks_20"]["last_ready_s"]["median"] == 2.2
    assert replay["bytes_wasted"] == 10 * MIB
    assert replay["moved_to_needed"] == 1.25
    assert report["remote_store"]["layer"] == "delay=2ms,1GB/s,16"
    assert report["remote_eager_request_bytes"] == 512 << 10
    assert report["remote_guest"]["content_bytes"] == 832 * MIB

    text = written(result)
    assert row(text, "ready, ms")[-1] == "161"
    assert row(text, "each of 20 forks") == ["", "-", *["1.2"] * 5]
    assert row(text, "first of 20 ready, ms") == ["1000", "2400", "200"]
    assert row(text, "last of 20 ready, ms") == ["3000", "4400", "2200"]
    assert row(text, "moved / needed") == ["1.25"] * 3
    words = " ".join(text.split())
    assert "eager was not counted with 20 forks" in words
    assert "12.0 times sooner than lazily" in words
    assert "832 MiB of its 1024" in words
    assert "proportional" in words
    assert "123 answers, all right" in words
    assert "MISSED" not in words


def test_one_table_alone() -> None:
    report = as_json(made_up(made_up_local()))
    assert "remote" not in report and "local" in report
    assert "store far away" not in written(made_up(made_up_local()))
    report = as_json(made_up(None, made_up_remote()))
    assert "local" not in report and "cold_boot_s" not in report
    assert {goal["ratio"] for goal in report["goals"]} == {
        "remote_lazy_to_replay_ready",
        "remote_eager_to_replay_ready",
        "remote_replay_moved_to_needed",
    }
    assert "cold boot" not in written(made_up(None, made_up_remote()))


def test_goals_that_are_missed_are_said_to_be() -> None:
    result = made_up(made_up_local(), made_up_remote(replay_s=0.5, moved=53 * MIB))
    met = {goal["ratio"]: goal["met"] for goal in as_json(result)["goals"]}
    assert met == {
        "mount_to_map_private_resume": True,
        "mount_to_map_private_guest_kib": True,
        "remote_lazy_to_replay_ready": True,
        "remote_eager_to_replay_ready": False,
        "remote_replay_moved_to_needed": False,
    }
    said = goals.said(ratios(result))
    assert said.count("MISSED") == 2
    assert "2.00 times sooner than eager (the goal is at least 3: MISSED)" in said
    assert said in " ".join(written(result).split())
    assert {goal.ratio for goal in goals.GOALS} == set(met) <= set(ratios(result))
