"""Freezing a QEMU guest whose memory is one file, shared: its state and that file's content.

QEMU writes its state by "migrating" to a file, with the capability ``x-ignore-shared``: memory that
is shared is then left out, which leaves some 300 KB.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SnapshotError
from . import sparse
from .qmp import Qmp, QmpError
from .snapshot import Snapshot, draft

CAPABILITIES = {"x-ignore-shared": True, "events": True}
"""What the migration that freezes, and the one that forks, are done with."""

_STATE_TIMEOUT = 60.0


def capabilities(wanted: dict[str, bool]) -> list[dict[str, Any]]:
    """Return migration capabilities as QMP has them."""
    return [{"capability": name, "state": state} for name, state in wanted.items()]


def freeze(qmp: Qmp, memory: int, directory: str | os.PathLike[str], **described: Any) -> Snapshot:
    """Stop a guest, save it, and let it run on if it ran before.

    Args:
        qmp: its monitor.
        memory: descriptor of the file that is its memory.
        directory: the snapshot's place, which must not exist yet, or be empty.
        described: what :class:`Snapshot` has to say of it.

    Raises:
        UsageError: there is something in that place.
        SnapshotError: it could not be stopped, or saved.
    """
    with draft(directory) as new:
        try:
            with _stopped(qmp), _with_capabilities(qmp):
                _save_state(qmp, new.path / "state")
                with (new.path / "memory").open("xb") as copy:
                    sparse.copy(memory, copy.fileno(), drop_zeros=True)
        except QmpError as error:
            raise SnapshotError(f"cannot freeze the guest: {error}", hint=error.hint) from error
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return new.publish(created=now, memory_bytes=os.fstat(memory).st_size, **described)


@contextmanager
def _stopped(qmp: Qmp) -> Iterator[None]:
    if not qmp.execute("query-status")["running"]:
        yield
        return
    qmp.execute("stop")
    try:
        yield
    finally:
        qmp.execute("cont")


@contextmanager
def _with_capabilities(qmp: Qmp) -> Iterator[None]:
    found = {
        capability["capability"]: capability["state"]
        for capability in qmp.execute("query-migrate-capabilities")
    }
    missing = CAPABILITIES.keys() - found.keys()
    if missing:
        raise SnapshotError(
            f"this QEMU cannot leave memory out of a migration: it has no {missing.pop()}",
            hint="QEMU 4.0 or newer can",
        )
    before = {name: found[name] for name in CAPABILITIES}
    qmp.execute("migrate-set-capabilities", capabilities=capabilities(CAPABILITIES))
    try:
        yield
    finally:
        qmp.execute("migrate-set-capabilities", capabilities=capabilities(before))


def _save_state(qmp: Qmp, state: Path) -> None:
    with state.open("xb") as file:
        qmp.execute("getfd", fds=[file.fileno()], fdname="pagekit-state")
    qmp.execute("migrate", uri="fd:pagekit-state")
    ended = qmp.wait_event(
        "MIGRATION",
        lambda data: data["status"] in ("completed", "failed", "cancelled"),
        timeout=_STATE_TIMEOUT,
    )
    if ended["status"] != "completed":
        why = qmp.execute("query-migrate").get("error-desc", ended["status"])
        raise SnapshotError(
            f"cannot save the guest's state in {state.parent}: {why}",
            hint="it needs as much space there as the guest uses memory",
        )
