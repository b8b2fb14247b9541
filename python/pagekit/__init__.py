"""pagekit: memory that arrives page by page, on demand.

A frozen sandbox is a *template*; a :class:`Server` serves its memory to any number of forks::

    import pagekit

    with pagekit.Template("file:memory") as template:
        with pagekit.Server(template, "/run/pk.sock") as server:
            ...
            print(server.statistics())

Importing this package works on every system. What needs Linux raises
:class:`pagekit.errors.Unsupported`, with a hint, when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from . import relay as relay
    from . import sandbox as sandbox
    from . import uffd as uffd
    from .client import owner_environment, plain_environment, shim_path
    from .mapping import Map, map
    from .relay import Relay
    from .server import Mount, Server
    from .template import Template
    from .working_set import Recording, Replay, WorkingSet

__version__ = "0.1.0"

__all__ = [
    "Map",
    "Mount",
    "Recording",
    "Relay",
    "Replay",
    "Server",
    "Template",
    "WorkingSet",
    "errors",
    "map",
    "owner_environment",
    "plain_environment",
    "relay",
    "sandbox",
    "shim_path",
    "uffd",
]

# Resolved on first use, so that `import pagekit` is light and needs no compiled extension.
_LAZY = {
    "Map": "mapping",
    "map": "mapping",
    "Mount": "server",
    "Recording": "working_set",
    "Relay": "relay",
    "Replay": "working_set",
    "WorkingSet": "working_set",
    "Server": "server",
    "Template": "template",
    "owner_environment": "client",
    "plain_environment": "client",
    "shim_path": "client",
    "relay": None,
    "sandbox": None,
    "uffd": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    if module is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{module}", __name__), name)
