"""What ``pagekit demo`` prints: the figures as JSON or as tables, and what they say in words."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..sandbox.comparison import Comparison
from . import goals, local, remote


def as_json(result: Comparison) -> dict[str, Any]:
    """The figures as one JSON object. Times are in seconds, memory in KiB, per fork if not the
    host's.
    """
    found: dict[str, Any] = {
        "accelerator": result.accelerator.name,
        "accelerator_reason": result.accelerator.reason,
        "backend": result.backend,
        "forks": result.forks,
        "answers_checked": result.answers,
    }
    if result.local:
        found |= local.as_json(result.local, result.forks)
    if result.remote:
        found |= remote.as_json(result.remote, result.forks)
    measured = ratios(result)
    return {**found, "ratios": measured, "goals": goals.as_json(measured)}


def ratios(result: Comparison) -> dict[str, float]:
    """The ratios that the project makes promises about, of medians."""
    found: dict[str, float] = {}
    if result.local:
        found |= local.ratios(result.local)
    if result.remote:
        found |= remote.ratios(result.remote)
    return {name: round(ratio, 3) for name, ratio in found.items()}


def as_tables(result: Comparison) -> RenderableType:
    """The figures as tables, with what they say below them."""
    parts: list[RenderableType] = []
    if result.local:
        parts += [local.as_table(result.local, result.accelerator, result.forks), ""]
    if result.remote:
        parts += [remote.as_table(result.remote, result.forks), ""]
    last = [goals.said(ratios(result)), f"{result.answers} answers, all right."]
    return Group(*parts, *(Text(line) for line in last if line))
