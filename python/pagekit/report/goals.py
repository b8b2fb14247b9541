"""What the figures of a comparison are meant to be, and whether they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A bound for a ratio.

    Attributes:
        ratio: its name.
        words: what it is, with ``{}`` for its value.
        limit: its bound: the least that it shall be, or the greatest.
        least: which of these.
    """

    ratio: str
    words: str
    limit: float
    least: bool

    def met(self, value: float) -> bool:
        """Whether that value is good enough."""
        return value >= self.limit if self.least else value <= self.limit


GOALS = (
    Goal(
        "mount_to_map_private_resume",
        "A warm fork over the mount takes {} times as long from resume to answer as over a plain "
        "mapping",
        1.2,
        False,
    ),
    Goal(
        "mount_to_map_private_guest_kib",
        "and has {} times as much private guest memory",
        1.1,
        False,
    ),
    Goal("remote_lazy_to_replay_ready", "Replay is ready {} times sooner than lazy", 3, True),
    Goal("remote_eager_to_replay_ready", "and {} times sooner than eager", 3, True),
    Goal(
        "remote_replay_moved_to_needed",
        "It moves {} times the bytes that are needed",
        1.3,
        False,
    ),
)


def as_json(ratios: dict[str, float]) -> list[dict[str, Any]]:
    """Each goal whose ratio was measured, and whether it is met."""
    return [
        {
            "ratio": goal.ratio,
            "value": value,
            "at_least" if goal.least else "at_most": goal.limit,
            "met": goal.met(value),
        }
        for goal, value in _measured(ratios)
    ]


def said(ratios: dict[str, float]) -> str:
    """The same in words."""
    parts = [
        f"{goal.words.format(f'{value:.2f}')} (the goal is at "
        f"{'least' if goal.least else 'most'} {goal.limit:g}: "
        f"{'met' if goal.met(value) else 'MISSED'})"
        for goal, value in _measured(ratios)
    ]
    # A part that goes on begins with a small letter.
    text = ""
    for part in parts:
        text += (", " if part[0].islower() else ". ") * bool(text) + part
    return text + "." * bool(text)


def _measured(ratios: dict[str, float]) -> Iterator[tuple[Goal, float]]:
    return ((goal, ratios[goal.ratio]) for goal in GOALS if goal.ratio in ratios)
