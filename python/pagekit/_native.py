"""Loads the compiled core, or says why there is none."""

from __future__ import annotations

import sys
from types import ModuleType

from .errors import Unsupported


def core() -> ModuleType:
    """The module ``pagekit._core``.

    Raises:
        Unsupported: this is not Linux, or the package was not built for this machine.
    """
    if sys.platform != "linux":
        raise Unsupported(
            f"pagekit serves memory on Linux only, and this is {sys.platform}",
            hint="run it on Linux, or in a Linux virtual machine",
        )
    try:
        from . import _core
    except ImportError as error:
        raise Unsupported(
            f"pagekit's compiled core cannot be loaded: {error}",
            hint="install pagekit with `pip install .` on this machine",
        ) from error
    return _core


__all__ = ["core"]
