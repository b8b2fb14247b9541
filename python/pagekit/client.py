"""What a program needs around it to be a client: the shim, and its environment."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import Unsupported


def shim_path() -> Path:
    """The preloaded library that was installed with this package.

    Raises:
        Unsupported: it was not.
    """
    return _artifact("_shim*.so", "the preloaded library")


def server_program() -> Path:
    """The server program that was installed with this package.

    Raises:
        Unsupported: it was not.
    """
    return _artifact("pagekitd*", "the server program")


def _artifact(pattern: str, what: str) -> Path:
    found = sorted(Path(__file__).parent.glob(pattern))
    if not found:
        raise Unsupported(
            f"{what} of pagekit is not installed",
            hint="install pagekit with `pip install .` on a Linux machine",
        )
    return found[0]


def owner_environment() -> dict[str, str]:
    """The variables that make a program end when this process ends, and nothing else."""
    return {"LD_PRELOAD": str(shim_path()), "PAGEKIT_OWNER": str(os.getpid())}


def plain_environment(
    stub: str | os.PathLike[str], memory: str | os.PathLike[str]
) -> dict[str, str]:
    """The variables that make a program's private mapping of ``stub`` a plain private mapping of
    ``memory``, which is opened read-only: without a server, and safe from holes that the program
    punches. The program ends when this process does.
    """
    return {
        **owner_environment(),
        "PAGEKIT_FILE": str(Path(stub).resolve()),
        "PAGEKIT_PLAIN": str(Path(memory).resolve()),
    }
