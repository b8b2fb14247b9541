"""What ``pagekit boot`` prints about the forks that it booted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from ..sandbox import Outcome, Snapshot


def as_json(
    snapshot: Snapshot, backend: str, reason: str, names: Sequence[str], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """What came of each fork, as one JSON object. Times are in seconds."""
    return {
        "accelerator": snapshot.accelerator,
        "backend": backend,
        "reason": reason,
        "forks": [
            {
                "fork_id": name,
                "output": outcome.answer.output if outcome.answer else None,
                "result": outcome.answer.result if outcome.answer else None,
                "error": str(outcome.error) if outcome.error else None,
                "traceback": getattr(outcome.error, "traceback", None),
                "ready_s": outcome.fork.marks.ready_s if outcome.fork else None,
                "resume_to_answer_s": (
                    outcome.fork.marks.resume_to_answer_s if outcome.fork else None
                ),
            }
            for name, outcome in zip(names, outcomes, strict=True)
        ],
    }


def as_table(
    snapshot: Snapshot, backend: str, names: Sequence[str], outcomes: Sequence[Outcome]
) -> RenderableType:
    """The same for people."""
    table = Table(
        title=f"{len(names)} forks of {snapshot.directory} "
        f"(accelerator: {snapshot.accelerator}, backend: {backend})",
        title_justify="left",
    )
    table.add_column("fork")
    table.add_column("ready, ms", justify="right")
    table.add_column("resume to answer, ms", justify="right")
    table.add_column("result", overflow="fold")
    table.add_column("output", overflow="fold")
    for name, outcome in zip(names, outcomes, strict=True):
        marks = outcome.fork.marks if outcome.fork else None
        answer, error = outcome.answer, outcome.error
        result = f"error: {error}" if error else (answer.result if answer else None) or ""
        table.add_row(
            name,
            _ms(marks.ready_s if marks else None),
            _ms(marks.resume_to_answer_s if marks else None),
            result,
            answer.output.rstrip() if answer else "",
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"
