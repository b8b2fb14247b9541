"""What ``pagekit demo`` prints: the figures as JSON or as a table, and what they say in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..sandbox.comparison import ARMS, TOUCHED_BYTES, Arm, Comparison, Sample

# Differences smaller than this are called none: medians of few runs are no better.
_NOISE = 0.05

_TITLES = {
    "cold": "cold boot",
    "eager": "eager",
    "map_private": "plain MAP_PRIVATE",
    "lazy": "pagekit, lazy",
    "warm": "pagekit, warm",
}


def as_json(result: Comparison) -> dict[str, Any]:
    """The figures as one JSON object. Times are in seconds, memory in KiB, per fork if not the
    host's.
    """
    return {
        "accelerator": result.accelerator.name,
        "accelerator_reason": result.accelerator.reason,
        "backend": result.backend,
        "cold_boot_s": median(sample.ready_s for sample in result.cold),
        "cold_boot": {
            "ready_s": _spread(result.cold, lambda sample: sample.ready_s),
            "samples": len(result.cold),
        },
        "forks": result.forks,
        "local": {name: _arm_as_json(arm, result.forks) for name, arm in result.arms.items()},
        f"host_kib_{result.forks}": {name: arm.host_kib_many for name, arm in result.arms.items()},
        "host_basis": result.host_basis,
        "ratios": ratios(result),
        "touched_bytes": TOUCHED_BYTES,
        "memory_bytes": result.memory_bytes,
        "image_bytes": result.image_bytes,
        "answers_checked": result.answers,
        "template_sha256": result.digest,
        "template_unchanged": True,  # anything else ends in an error
    }


def ratios(result: Comparison) -> dict[str, float]:
    """The ratios that the project makes promises about, of medians."""
    cold = median(sample.ready_s for sample in result.cold)
    lazy, warm, plain = (result.arms[name] for name in ("lazy", "warm", "map_private"))
    found = {
        "cold_boot_to_lazy_ready": cold / _median(lazy, "ready_s"),
        "cold_boot_to_warm_ready": cold / _median(warm, "ready_s"),
        "lazy_to_map_private_resume": (
            _median(lazy, "resume_to_answer_s") / _median(plain, "resume_to_answer_s")
        ),
        "warm_to_map_private_resume": (
            _median(warm, "resume_to_answer_s") / _median(plain, "resume_to_answer_s")
        ),
    }
    if warm.guest_kib_many and plain.guest_kib_many:
        found["warm_to_map_private_guest_kib"] = warm.guest_kib_many / plain.guest_kib_many
    return {name: round(ratio, 3) for name, ratio in found.items()}


def as_table(result: Comparison) -> RenderableType:
    """The figures as a table, with what they say below it."""
    many = result.forks
    table = Table(
        title=f"One guest, started in five ways (accelerator: {result.accelerator.name})",
        title_justify="left",
        caption=(
            f"medians (min to max); {_counts(result)}; the request touches "
            f"{TOUCHED_BYTES >> 20} MiB of the guest's memory"
        ),
        caption_justify="left",
    )
    table.add_column("")
    for title in _TITLES.values():
        table.add_column(title, justify="right")

    arms = [result.arms[name] for name in ARMS]
    every = [result.cold, *(arm.samples for arm in arms)]
    table.add_row("ready, ms", *(_times(samples, lambda s: s.ready_s) for samples in every))
    table.add_row(
        "resume to answer, ms",
        "",
        *(_times(arm.samples, lambda s: s.resume_to_answer_s) for arm in arms),
    )
    served = [result.arms[name].samples for name in ("lazy", "warm")]
    for title, value in (
        ("demand faults", lambda s: s.demand_faults),
        ("fetches", lambda s: s.fetches),
    ):
        counts: Sequence[str] = [f"{median(map(value, samples)):.0f}" for samples in served]
        table.add_row(title, "", "-", "-", *counts)
    table.add_row(
        "bytes read, MiB",
        "",
        *(
            "-" if name == "map_private" else _mib(median(s.bytes_read for s in arm.samples) / 1024)
            for name, arm in result.arms.items()
        ),
        end_section=True,
    )
    table.add_row(
        "guest RAM private to a fork, MiB: 1 fork",
        *(_mib(median(s.guest_kib for s in samples)) for samples in every),
    )
    table.add_row(f"  {many} forks", "", *(_mib(arm.guest_kib_many) for arm in arms))
    table.add_row(
        "VMM's own private memory, MiB: 1 fork",
        *(_mib(median(s.vmm_kib for s in samples)) for samples in every),
    )
    table.add_row(f"whole host, {many} forks, MiB", "", *(_mib(arm.host_kib_many) for arm in arms))
    lines = [
        Text(line, style="bold" if number == 0 else "") for number, line in enumerate(said(result))
    ]
    return Group(table, *lines)


def said(result: Comparison) -> list[str]:
    """What the figures say, in words; the first line is the headline."""
    found = ratios(result)
    sooner = f"{found['cold_boot_to_lazy_ready']:.0f} times sooner"
    cold, lazy = median(s.ready_s for s in result.cold), _median(result.arms["lazy"], "ready_s")
    lines = [
        f"With {result.accelerator.name}, a lazy fork is ready {sooner} than a cold boot: "
        f"{lazy * 1000:.0f} ms instead of {cold:.1f} s.",
        *_where_plain_wins(result),
        f"{result.answers} answers, all right; the template is what it was "
        f"(sha256 {result.digest[:16]}…).",
        f"Host memory is counted by {result.host_basis}; the source's cached pages are in it.",
    ]
    if result.accelerator.name == "tcg":
        lines.append(
            "Instructions are emulated: most of every fork's time is QEMU translating the guest's "
            f"code. ({result.accelerator.reason})"
        )
    lines += [
        f"{_TITLES[name]} was not counted with {result.forks} forks: {arm.skipped}."
        for name, arm in result.arms.items()
        if arm.skipped
    ]
    return lines


def _where_plain_wins(result: Comparison) -> list[str]:
    """Say of each figure where plain MAP_PRIVATE is better than pagekit, and where it is not."""
    plain = result.arms["map_private"]
    figures: list[tuple[str, Callable[[Arm], float | None]]] = [
        ("time to the first answer", lambda arm: _median(arm, "ready_s")),
        ("time from resume to answer", lambda arm: _median(arm, "resume_to_answer_s")),
        ("private guest memory per fork", lambda arm: arm.guest_kib_many),
        (f"host memory of {result.forks} forks", lambda arm: arm.host_kib_many),
    ]
    lines = []
    for name in ("lazy", "warm"):
        wins, ties, loses = [], [], []
        for what, value in figures:
            ours, its = value(result.arms[name]), value(plain)
            if ours is None or not its:
                continue
            ratio = ours / its
            if abs(ratio - 1) < _NOISE:
                ties.append(what)
            elif ratio > 1:
                wins.append(f"{what} ({ratio:.2f} times as much served)")
            else:
                loses.append(f"{what} ({ratio:.2f} times as much served)")
        title = f"plain MAP_PRIVATE of a local file against {_TITLES[name]}"
        parts = [
            f"{verdict}: {', '.join(which)}"
            for verdict, which in (
                ("it wins in", wins),
                ("no difference in", ties),
                ("it loses in", loses),
            )
            if which
        ]
        lines.append(f"{title[0].upper()}{title[1:]}: {'; '.join(parts)}.")
    return lines


def _arm_as_json(arm: Arm, forks: int) -> dict[str, Any]:
    return {
        "ready_s": _spread(arm.samples, lambda sample: sample.ready_s),
        "resume_to_answer_s": _spread(arm.samples, lambda sample: sample.resume_to_answer_s),
        "demand_faults": median(sample.demand_faults for sample in arm.samples),
        "fetches": median(sample.fetches for sample in arm.samples),
        "bytes_read": median(sample.bytes_read for sample in arm.samples),
        "guest_private_kib_1": median(sample.guest_kib for sample in arm.samples),
        f"guest_private_kib_{forks}": arm.guest_kib_many,
        "vmm_private_kib_1": median(sample.vmm_kib for sample in arm.samples),
        f"vmm_private_kib_{forks}": arm.vmm_kib_many,
        f"host_kib_{forks}": arm.host_kib_many,
        "samples": len(arm.samples),
    }


def _spread(samples: Sequence[Sample], value: Callable[[Sample], float]) -> dict[str, float]:
    values = [value(sample) for sample in samples]
    spread = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: round(number, 6) for name, number in spread.items()}


def _median(arm: Arm, name: str) -> float:
    return float(median(getattr(sample, name) for sample in arm.samples))


def _times(samples: Sequence[Sample], value: Callable[[Sample], float]) -> str:
    spread = _spread(samples, value)
    low, high = (f"{spread[name] * 1000:.0f}" for name in ("min", "max"))
    return f"{spread['median'] * 1000:.0f} ({low} to {high})"


def _counts(result: Comparison) -> str:
    each = min(len(arm.samples) for arm in result.arms.values())
    return f"{len(result.cold)} cold boots and {each} forks of each kind, in random order"


def _mib(kib: float | None) -> str:
    return "-" if kib is None else f"{kib / 1024:.1f}"
