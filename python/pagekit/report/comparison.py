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
    "map_private": "plain",
    "lazy": "lazy",
    "warm": "warm",
}

_LEGEND = (
    "eager: all memory read before the start. plain: the kernel maps the local file (MAP_PRIVATE). "
    "lazy: served by pagekit from an empty template. warm: from one that a fork has used."
)


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
        caption=f"Medians of {_counts(result)}. {_LEGEND}",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for title in _TITLES.values():
        table.add_column(title, justify="right")

    arms = [result.arms[name] for name in ARMS]
    every = [result.cold, *(arm.samples for arm in arms)]

    def medians(of: Sequence[Sequence[Sample]], value: Callable[[Sample], float]) -> list[str]:
        return [_short(median(map(value, samples))) for samples in of]

    served = [result.arms[name].samples for name in ("lazy", "warm")]
    read = [result.arms[name].samples for name in ("eager", "lazy", "warm")]
    eager, lazy, warm = medians(read, lambda sample: sample.bytes_read / (1 << 20))
    table.add_row("ready, ms", *medians(every, lambda s: s.ready_s * 1000))
    table.add_row("  from … to", *(_range(samples, lambda s: s.ready_s) for samples in every))
    forked = every[1:]
    table.add_row("resume to answer, ms", "", *medians(forked, _resume_to_answer_ms))
    table.add_row("  from … to", "", *(_range(x, lambda s: s.resume_to_answer_s) for x in forked))
    table.add_row("demand faults", "", "", "", *medians(served, lambda s: s.demand_faults))
    table.add_row("fetches", "", "", "", *medians(served, lambda s: s.fetches))
    table.add_row("read, MiB", "", eager, "", lazy, warm, end_section=True)
    table.add_row("guest's private MiB, 1 fork", *medians(every, lambda s: s.guest_kib / 1024))
    table.add_row(
        f"the same per fork, {many} forks", "", *(_mib(arm.guest_kib_many) for arm in arms)
    )
    table.add_row("VMM's private MiB", *medians(every, lambda s: s.vmm_kib / 1024))
    table.add_row(f"whole host, {many} forks, MiB", "", *(_mib(arm.host_kib_many) for arm in arms))
    headline, *rest = said(result)
    return Group(table, Text(headline, style="bold"), *map(Text, rest))


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
            f"Instructions are emulated ({result.accelerator.reason}). Most of a fork's time goes "
            "into translating code of the guest's that its QEMU has not run yet: "
            f"{_translated(result):.0f} blocks until the first answer."
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
        "ready_s": _spread(arm.samples, lambda sample: sample.ready_s),
        "resume_to_answer_s": _spread(arm.samples, lambda sample: sample.resume_to_answer_s),
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


def _spread(samples: Sequence[Sample], value: Callable[[Sample], float]) -> dict[str, float]:
    values = [value(sample) for sample in samples]
    spread = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: round(number, 6) for name, number in spread.items()}


def _median(arm: Arm, name: str) -> float:
    return float(median(getattr(sample, name) for sample in arm.samples))


def _resume_to_answer_ms(sample: Sample) -> float:
    return sample.resume_to_answer_s * 1000


def _range(samples: Sequence[Sample], seconds: Callable[[Sample], float]) -> str:
    values = [seconds(sample) * 1000 for sample in samples]
    return f"{min(values):.0f} … {max(values):.0f}"


def _translated(result: Comparison) -> float:
    return median(
        sample.translated_blocks for arm in result.arms.values() for sample in arm.samples
    )


def _counts(result: Comparison) -> str:
    each = min(len(arm.samples) for arm in result.arms.values())
    return (
        f"{len(result.cold)} cold boots and {each} forks of each kind, in random order; each "
        f"answers a request that touches {TOUCHED_BYTES >> 20} MiB of the guest's memory"
    )


def _mib(kib: float | None) -> str:
    return "-" if kib is None else _short(kib / 1024)


def _short(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"
