"""The comparison over a local file, as JSON and as a table, and what it says in words."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..sandbox import Accelerator
from ..sandbox.comparison.local import SERVED, TOUCHED_BYTES, Arm, Local
from .figures import MIB, medians, ms_range, short, spread

# Differences smaller than this are called none: medians of few runs are no better.
_NOISE = 0.05

_TITLES = {
    "cold": "cold boot",
    "eager": "eager",
    "map_private": "plain",
    "lazy": "lazy",
    "replay": "replay",
    "warm": "warm",
    "mount": "mount",
}

_LEGEND = (
    "eager: all memory read before the start. plain: the kernel maps the local file (MAP_PRIVATE). "
    "lazy: served by pagekit from an empty template. replay: the same, while the pages of an "
    "earlier fork are fetched ahead. warm: from a template that a fork has used. mount: the same "
    "over the file that pagekit mounts, nothing preloaded."
)


def as_json(result: Local, forks: int) -> dict[str, Any]:
    """The figures, as parts of the JSON object."""
    return {
        "cold_boot_s": median(sample.ready_s for sample in result.cold),
        "cold_boot": {
            "ready_s": spread([sample.ready_s for sample in result.cold]),
            "samples": len(result.cold),
        },
        "local_left_out": result.left_out,
        "local": {name: _arm_as_json(arm, forks) for name, arm in result.arms.items()},
        f"host_kib_{forks}": {name: arm.host_kib_many for name, arm in result.arms.items()},
        "host_basis": result.host_basis,
        "touched_bytes": TOUCHED_BYTES,
        "memory_bytes": result.memory_bytes,
        "image_bytes": result.image_bytes,
        "template_sha256": result.digest,
        "template_unchanged": True,  # anything else ends in an error
    }


def ratios(result: Local) -> dict[str, float]:
    """The ratios that the project makes promises about, of medians."""
    cold = median(sample.ready_s for sample in result.cold)
    plain = result.arms["map_private"]
    found = {
        f"cold_boot_to_{name}_ready": cold / _median(result.arms[name], "ready_s")
        for name in ("lazy", "warm")
    }
    resume = "resume_to_answer_s"
    for name in _served(result):
        ratio = _median(result.arms[name], resume) / _median(plain, resume)
        found[f"{name}_to_map_private_resume"] = ratio
    for name in result.arms.keys() & {"warm", "mount"}:
        kib = result.arms[name].guest_kib_many
        if kib and plain.guest_kib_many:
            found[f"{name}_to_map_private_guest_kib"] = kib / plain.guest_kib_many
    return found


def as_table(result: Local, accelerator: Accelerator, forks: int) -> RenderableType:
    """The figures as a table, with what they say below it."""
    ways = len(result.arms) + 1
    table = Table(
        title=f"One guest, started in {ways} ways (accelerator: {accelerator.name})",
        title_justify="left",
        caption=f"Medians of {_counts(result)}. {_LEGEND}",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("cold", *result.arms):
        table.add_column(_TITLES[name], justify="right")

    arms = list(result.arms.values())
    forked = [arm.samples for arm in arms]
    every = [result.cold, *forked]
    served = [arm.samples if name in SERVED else [] for name, arm in result.arms.items()]
    read = [[] if name == "map_private" else arm.samples for name, arm in result.arms.items()]

    table.add_row("ready, ms", *medians(every, lambda s: s.ready_s * 1000))
    table.add_row("  from…to", *(ms_range([s.ready_s for s in group]) for group in every))
    table.add_row(
        "resume to answer, ms", "", *medians(forked, lambda s: s.resume_to_answer_s * 1000)
    )
    resumed = ([s.resume_to_answer_s for s in group] for group in forked)
    table.add_row("  from…to", "", *map(ms_range, resumed))
    table.add_row("demand faults", "", *medians(served, lambda s: s.demand_faults))
    table.add_row("fetches", "", *medians(served, lambda s: s.fetches))
    table.add_row("read, MiB", "", *medians(read, lambda s: s.bytes_read / MIB), end_section=True)
    table.add_row("private MiB, 1 fork", *medians(every, lambda s: s.guest_kib / 1024))
    table.add_row(f"  each of {forks} forks", "", *(_mib(arm.guest_kib_many) for arm in arms))
    table.add_row("VMM's private MiB", *medians(every, lambda s: s.vmm_kib / 1024))
    table.add_row(f"host MiB, {forks} forks", "", *(_mib(arm.host_kib_many) for arm in arms))
    headline, *rest = said(result, accelerator, forks)
    return Group(table, Text(headline, style="bold"), *map(Text, rest))


def said(result: Local, accelerator: Accelerator, forks: int) -> list[str]:
    """What the figures say, in words; the first line is the headline."""
    found = ratios(result)
    sooner = f"{found['cold_boot_to_lazy_ready']:.0f} times sooner"
    cold, lazy = median(s.ready_s for s in result.cold), _median(result.arms["lazy"], "ready_s")
    lines = [
        f"With {accelerator.name}, a lazy fork is ready {sooner} than a cold boot: "
        f"{lazy * 1000:.0f} ms instead of {cold:.1f} s.",
        *_where_plain_wins(result, forks),
        f"The template is what it was (sha256 {result.digest[:16]}…).",
        f"Host memory is counted by {result.host_basis}; cached pages of the source, and of the "
        "mount, are in it.",
    ]
    if accelerator.name == "tcg":
        lines.append(
            f"Instructions are emulated ({accelerator.reason}). Most of a fork's time goes "
            "into translating code of the guest's that its QEMU has not run yet: "
            f"{_translated(result):.0f} blocks until the first answer."
        )
    lines += [
        f"{_TITLES[name]} was not counted with {forks} forks: {arm.skipped}."
        for name, arm in result.arms.items()
        if arm.skipped
    ]
    lines += [f"{_TITLES[name]} is left out: {why}." for name, why in result.left_out.items()]
    return lines


def _served(result: Local) -> list[str]:
    return [name for name in SERVED if name in result.arms]


def _where_plain_wins(result: Local, forks: int) -> list[str]:
    """Say of each figure where plain MAP_PRIVATE is better than pagekit, and where it is not."""
    plain = result.arms["map_private"]
    figures: list[tuple[str, Callable[[Arm], float | None]]] = [
        ("time to the first answer", lambda arm: _median(arm, "ready_s")),
        ("time from resume to answer", lambda arm: _median(arm, "resume_to_answer_s")),
        ("private guest memory per fork", lambda arm: arm.guest_kib_many),
        (f"host memory of {forks} forks", lambda arm: arm.host_kib_many),
    ]
    lines = []
    for name in _served(result):
        wins, ties, loses = [], [], []
        for what, value in figures:
            ours, its = value(result.arms[name]), value(plain)
            if ours is None or not its:
                continue
            ratio = ours / its
            if abs(ratio - 1) < _NOISE:
                ties.append(what)
            elif ratio > 1:
                wins.append(f"{what} (1 : {ratio:.2f})")
            else:
                loses.append(f"{what} (1 : {ratio:.2f})")
        parts = [
            f"{verdict} {', '.join(which)}"
            for verdict, which in (
                ("wins in", wins),
                ("is no different in", ties),
                ("loses in", loses),
            )
            if which
        ]
        against = f"Against {_TITLES[name]}, plain MAP_PRIVATE of the local file"
        lines.append(f"{against} {'; '.join(parts)}.")
    return lines


def _arm_as_json(arm: Arm, forks: int) -> dict[str, Any]:
    return {
        "ready_s": spread([sample.ready_s for sample in arm.samples]),
        "resume_to_answer_s": spread([sample.resume_to_answer_s for sample in arm.samples]),
        "demand_faults": median(sample.demand_faults for sample in arm.samples),
        "fetches": median(sample.fetches for sample in arm.samples),
        "bytes_read": median(sample.bytes_read for sample in arm.samples),
        "guest_private_kib_1": median(sample.guest_kib for sample in arm.samples),
        f"guest_private_kib_{forks}": arm.guest_kib_many,
        "translated_blocks": median(sample.translated_blocks for sample in arm.samples),
        "vmm_private_kib_1": median(sample.vmm_kib for sample in arm.samples),
        f"vmm_private_kib_{forks}": arm.vmm_kib_many,
        f"host_kib_{forks}": arm.host_kib_many,
        "samples": len(arm.samples),
    }


def _median(arm: Arm, name: str) -> float:
    return float(median(getattr(sample, name) for sample in arm.samples))


def _translated(result: Local) -> float:
    return median(
        sample.translated_blocks for arm in result.arms.values() for sample in arm.samples
    )


def _counts(result: Local) -> str:
    each = min(len(arm.samples) for arm in result.arms.values())
    return (
        f"{len(result.cold)} cold boots and {each} forks of each kind, in random order; each "
        f"answers a request that touches {TOUCHED_BYTES >> 20} MiB of the guest's memory"
    )


def _mib(kib: float | None) -> str:
    return "-" if kib is None else short(kib / 1024)
