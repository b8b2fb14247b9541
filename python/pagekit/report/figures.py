"""Figures of comparisons: medians, spreads, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

MIB = 1 << 20


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, for JSON."""
    found = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: round(number, 6) for name, number in found.items()}


def ms_range(seconds: Sequence[float]) -> str:
    """From the least to the greatest, in milliseconds."""
    return f"{min(seconds) * 1000:.0f}…{max(seconds) * 1000:.0f}"


def short(value: float) -> str:
    """A number as a table has it."""
    return f"{value:.1f}" if 0 < value < 10 and value != int(value) else f"{value:.0f}"


def medians(groups: Sequence[Sequence[Any]], value: Callable[[Any], float]) -> list[str]:
    """The median of a value in each group, as a table has it; nothing for an empty group."""
    return [short(median(map(value, group))) if group else "" for group in groups]
