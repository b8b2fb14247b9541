"""The comparison over a store far away, as JSON and as a table, and what it says in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..sandbox.comparison.remote import (
    ARMS,
    CACHES_BYTES,
    RECORDED,
    STORE,
    TOUCHED_BYTES,
    Remote,
    Sample,
)
from .figures import MIB, medians, ms_range, spread


def as_json(result: Remote, forks: int) -> dict[str, Any]:
    """The figures, as parts of the JSON object."""
    return {
        "remote": {
            name: {
                **_samples_as_json(arm.one, result.needed_bytes),
                f"forks_{forks}": _samples_as_json(arm.many, result.needed_bytes_many),
            }
            for name, arm in result.arms.items()
        },
        "remote_store": {**dataclasses.asdict(STORE), "layer": STORE.layer},
        "remote_guest": {
            "memory_bytes": result.memory_bytes,
            "content_bytes": result.content_bytes,
            "caches_bytes": CACHES_BYTES,
            "touched_bytes": TOUCHED_BYTES,
            "needed_bytes": result.needed_bytes,
            f"needed_bytes_{forks}": result.needed_bytes_many,
            "working_set_bytes": result.working_set_bytes,
            "recordings": len(RECORDED),
            "template_sha256": result.digest,
        },
        "remote_eager_request_bytes": result.eager_request,
        "remote_eager_tried_s": {
            str(size): round(seconds, 6) for size, seconds in result.eager_tried.items()
        },
    }


def ratios(result: Remote) -> dict[str, float]:
    """The ratios that the project makes promises about, of medians."""
    ready = {name: _first_ready_s(arm.one) for name, arm in result.arms.items()}
    moved = median(sample.moved_bytes for sample in result.arms["replay"].one)
    return {
        "remote_lazy_to_replay_ready": ready["lazy"] / ready["replay"],
        "remote_eager_to_replay_ready": ready["eager"] / ready["replay"],
        "remote_replay_moved_to_needed": moved / result.needed_bytes,
    }


def as_table(result: Remote, forks: int) -> RenderableType:
    """The figures as a table, with what they say below it."""
    arms = [result.arms[name] for name in ARMS]
    counts = f"{len(arms[0].one)} starts of one fork and {len(arms[0].many)} of {forks} forks"
    table = Table(
        title=f"A larger guest, forked from a store far away: {_store()}",
        title_justify="left",
        caption=f"Medians of {counts} of each kind, in random order; of {forks}, "
        "as many are being started at a time as there are processors. eager: everything is "
        "fetched, then forks map it. lazy: pages are fetched when they are demanded. replay: "
        "those that other requests demanded are fetched ahead.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True, min_width=26)
    for name in ARMS:
        table.add_column(name, justify="right", min_width=11)

    one, many = [arm.one for arm in arms], [arm.many for arm in arms]
    table.add_row("ready, ms", *medians(one, lambda s: s.ready_s[0] * 1000))
    table.add_row("  from…to", *(ms_range([s.ready_s[0] for s in group]) for group in one))
    table.add_row("resume to answer, ms", *medians(one, lambda s: s.resume_to_answer_s[0] * 1000))
    moved_to_needed = _add_moved(table, one, result.needed_bytes)
    table.add_row("  moved / needed", *moved_to_needed, end_section=True)
    for which, position in (("first", _first), ("median", median), ("last", _last)):
        values = medians(many, lambda s, position=position: position(s.ready_s) * 1000)  # type: ignore[misc]
        table.add_row(f"{which} of {forks} ready, ms", *values)
    moved_to_needed = _add_moved(table, many, result.needed_bytes_many)
    table.add_row("  moved / needed", *moved_to_needed)
    headline, *rest = said(result)
    return Group(table, Text(headline, style="bold"), *map(Text, rest))


def said(result: Remote) -> list[str]:
    """What the figures say, in words; the first line is the headline."""
    eager, lazy, replay = (_first_ready_s(result.arms[name].one) for name in ARMS)
    content = result.content_bytes / MIB
    return [
        f"From afar, a fork whose pages are fetched ahead is ready in {replay * 1000:.0f} ms: "
        f"{lazy / replay:.1f} times sooner than lazily ({lazy * 1000:.0f} ms), "
        f"{eager / replay:.1f} times sooner than eagerly ({eager * 1000:.0f} ms).",
        f"Eager's time is proportional to what the guest holds, here {content:.0f} MiB of its "
        f"{result.memory_bytes >> 20}, {CACHES_BYTES >> 20} of them made for this table and "
        "touched by no request: half as much would take it half as long. It fetches in requests of "
        f"{result.eager_request >> 10} KiB, the best of {len(result.eager_tried)} sizes.",
        f"The request that is measured touches {TOUCHED_BYTES >> 20} MiB, and is none of the "
        f"{len(RECORDED)} that were recorded: other pages, another order, another computation. It "
        f"needs {result.needed_bytes / MIB:.0f} MiB; {result.working_set_bytes / MIB:.0f} MiB were "
        "recorded, and pages between them are fetched along where that saves requests.",
    ]


def _store() -> str:
    return (
        f"{STORE.latency_ms} ms a request, {STORE.bytes_per_s // 10**9} GB/s, "
        f"{STORE.in_flight} requests at once"
    )


def _add_moved(table: Table, groups: list[list[Sample]], needed: int) -> list[str]:
    """Add the rows about what was moved; return the last one's values."""
    table.add_row("requests", *medians(groups, lambda s: s.requests))
    table.add_row("demand faults", *medians(groups, lambda s: s.demand_faults))
    table.add_row("moved, MiB", *medians(groups, lambda s: s.moved_bytes / MIB))
    table.add_row("  not needed, MiB", *medians(groups, lambda s: s.wasted_bytes / MIB))
    return [f"{median(s.moved_bytes for s in group) / needed:.2f}" for group in groups]


def _samples_as_json(samples: list[Sample], needed: int) -> dict[str, Any]:
    def positioned(position: Callable[[tuple[float, ...]], float]) -> dict[str, float]:
        return spread([position(sample.ready_s) for sample in samples])

    moved = median(sample.moved_bytes for sample in samples)
    return {
        "ready_s": positioned(_first),
        "median_ready_s": positioned(median),
        "last_ready_s": positioned(_last),
        "resume_to_answer_s": spread([median(sample.resume_to_answer_s) for sample in samples]),
        "requests": median(sample.requests for sample in samples),
        "demand_faults": median(sample.demand_faults for sample in samples),
        "bytes_moved": moved,
        "bytes_needed": needed,
        "bytes_prefetched": median(sample.prefetched_bytes for sample in samples),
        "bytes_wasted": median(sample.wasted_bytes for sample in samples),
        "moved_to_needed": round(moved / needed, 3),
        "samples": len(samples),
    }


def _first(values: tuple[float, ...]) -> float:
    return values[0]


def _last(values: tuple[float, ...]) -> float:
    return values[-1]


def _first_ready_s(samples: list[Sample]) -> float:
    return median(sample.ready_s[0] for sample in samples)
