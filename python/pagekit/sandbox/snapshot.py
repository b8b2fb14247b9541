"""Snapshots: a frozen sandbox, as a directory.

::

    snapshot.json   what made it and how to start a fork: see Snapshot
    memory          the guest's RAM from its first byte to its last; pages of zeros are holes
    state           the VMM's own state, everything but that RAM

A directory appears whole under its name, or not at all, and never changes afterwards: forks map
``memory`` privately or get their pages from a server, and write neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PagekitError, SnapshotError, UsageError
from . import sparse

_VERSION = 1
_STATE_MAGIC = b"QEVM"


@dataclass(frozen=True)
class Snapshot:
    """A frozen QEMU guest.

    Attributes:
        directory: where it lies; not stored in it.
        qemu: the program that made it, and that forks run.
        qemu_version: what that program called itself.
        accelerator: ``tcg`` or ``kvm``.
        arguments: QEMU's arguments for a fork, with ``{memory}``, ``{share}``, ``{qmp}``,
            ``{agent}`` and ``{console}`` where a fork's own values go.
        memory_bytes: size of the guest's RAM.
        agent: whether an agent waits for requests in the guest.
        created: when, as ISO 8601.
    """

    directory: Path
    qemu: str
    qemu_version: str
    accelerator: str
    arguments: tuple[str, ...]
    memory_bytes: int
    agent: bool
    created: str

    @property
    def memory(self) -> Path:
        """The file with the guest's RAM."""
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        """The file with the VMM's state."""
        return self.directory / "state"

    def digest(self) -> str:
        """Return the SHA-256 of the guest's RAM, in hexadecimal. Reads all of it."""
        with self.memory.open("rb") as memory:
            return sparse.digest(memory.fileno())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Snapshot:
        """Open a snapshot.

        Raises:
            SnapshotError: there is none, or it is damaged.
        """
        directory = Path(directory).absolute()
        try:
            fields = json.loads((directory / "snapshot.json").read_text())
        except FileNotFoundError:
            raise SnapshotError(
                f"{directory} is not a snapshot: it has no snapshot.json",
                hint="make one with `pagekit boot --save DIR`",
            ) from None
        except (OSError, ValueError) as error:
            raise SnapshotError(f"cannot read {directory}/snapshot.json: {error}") from error
        try:
            if fields.pop("version") != _VERSION:
                raise ValueError("it was made by another version of pagekit")
            fields["arguments"] = tuple(str(argument) for argument in fields["arguments"])
            snapshot = cls(directory=directory, **fields)
            snapshot._check()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(
                f"snapshot {directory} is damaged: {error}", hint="make it anew"
            ) from error
        return snapshot

    def _check(self) -> None:
        size = self.memory.stat().st_size
        if size != self.memory_bytes or size == 0:
            raise ValueError(f"its memory has {size} bytes instead of {self.memory_bytes}")
        with self.state.open("rb") as state:
            if state.read(len(_STATE_MAGIC)) != _STATE_MAGIC:
                raise ValueError("its state is not QEMU's")


class Draft:
    """A snapshot that is being made, under a name of its own beside the one it will have."""

    def __init__(self, path: Path, final: Path) -> None:
        self.path = path
        self.final = final

    def publish(self, **fields: Any) -> Snapshot:
        """Write down what :class:`Snapshot` has to say of it and give it its name, in one step."""
        described = json.dumps({"version": _VERSION, **fields}, indent=1)
        (self.path / "snapshot.json").write_text(described + "\n")
        for file in self.path.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        self.path.rename(self.final)  # replaces an empty directory, and nothing else
        return Snapshot.load(self.final)


@contextlib.contextmanager
def draft(final: str | os.PathLike[str]) -> Iterator[Draft]:
    """Make room for a snapshot at ``final``; remove what was begun if it does not get there.

    Raises:
        UsageError: there is something there already.
        SnapshotError: it could not be made there.
    """
    final = Path(final).absolute()
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise UsageError(
                f"{final} exists already", hint="remove it, or give another directory to save to"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            yield Draft(begun, final)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    except OSError as error:
        if isinstance(error, PagekitError):
            raise
        raise SnapshotError(
            f"cannot save a snapshot in {final}: {error.strerror or error}",
            hint="it needs as much space there as the guest uses memory",
        ) from error
