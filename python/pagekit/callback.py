"""Callbacks: Python functions that make the pages of a ``python:`` source.

A callback runs in a *helper*, a fresh interpreter that runs :func:`main`: a thread that touches a
page may sleep with the GIL, so nothing that brings pages may ever need it. ``source/python.rs``
starts helpers and has the byte tables of what is said between us.

This module imports next to nothing: each helper pays for it before its first page.
"""

from __future__ import annotations

import importlib
import os
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .errors import UsageError

Callback = Callable[[int, int], Any]
"""Takes (offset, length), returns an object with a buffer, or None for zeros."""

Body = list[bytes | memoryview]
"""An answer's body, in parts."""

READY, REFUSED, BYTES, ZEROS, FAILED = range(1, 6)
PAIR = struct.Struct("<QQ")
"""A request (offset, length), or what precedes an answer's body (kind, length)."""


def source_of(source: str | Callback, size: int | None) -> str:
    """The spec of a source that is given as such, or as a callback and its size.

    Raises:
        UsageError: a spec with a size, a callback without one, or one that :func:`spec_of` refuses.
    """
    if isinstance(source, str):
        if size is None:
            return source
    elif size is not None:
        return spec_of(source, size)
    raise UsageError(
        "a function needs a size, and a spec has its own",
        hint='give "file:memory", or a function and size=',
    )


def spec_of(function: Callback, size: int, *, timeout: float | None = None) -> str:
    """The spec of the source whose pages ``function`` makes.

    Args:
        function: takes (offset, length), multiples of 4096, and returns exactly that many bytes
            (any object with a buffer) or None for zeros; the same ones whenever it is asked. A
            helper process must be able to import it.
        size: bytes, a multiple of 4096.
        timeout: seconds after which a call is given up; 30 if None.

    Raises:
        UsageError: it cannot be imported by its name: a lambda, a function inside another one, a
            method of an instance, or one of the program that was started.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found: object = sys.modules.get(module or "")
    if module == "__main__":
        # A program that was started by `python -m MODULE` can be imported by that name.
        module = getattr(getattr(found, "__spec__", None), "name", None)
    for part in name.split("."):
        found = getattr(found, part, None)
    if module is None or found is not function:
        raise UsageError(
            f"the callback {function!r} cannot be imported by a helper process",
            hint="define it at the top level of a module of its own, and import it from there",
        )
    more = "" if timeout is None else f",timeout={timeout}s"
    return f"python:{module}:{name}:{size}{more}"


def original(pickled: bytes, text: str) -> BaseException:
    """The exception that a helper raised, or, where it cannot be had, one that says ``text``."""
    import pickle

    try:
        error = pickle.loads(pickled)
    except Exception:  # anything can happen: it runs what the class says
        error = None
    return error if isinstance(error, BaseException) else RuntimeError(text)


# The helper


def main() -> None:
    """Loads the callback that the command line names, and serves it on standard input."""
    name, parent, sys.argv = sys.argv[1], int(sys.argv[2]), ["-c"]
    end_with(parent)
    # Who handles an interruption may need pages. Signals are blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = os.dup(0)  # not inherited by what the callback starts
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with suppress(BrokenPipeError, ConnectionResetError):  # nobody is interested any more
        serve(connection, name)


def end_with(parent: int) -> None:
    """Has the kernel end this process with the thread that started it, whatever it does then."""
    try:
        import ctypes
    except ImportError:
        return  # it still ends when it next waits for a request
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def serve(connection: int, name: str) -> None:
    """Answers requests until their end."""
    try:
        function, content = load(name)
    except LookupError as error:
        return send(connection, REFUSED, [encoded(error.args[0])])
    except BaseException as error:
        return send(connection, FAILED, failure(error))
    send(connection, READY, [content])
    while request := receive(connection, PAIR.size):
        offset, length = PAIR.unpack(request)
        try:
            result = function(offset, length)
            kind, body = answer(result, length)
        except BaseException as error:
            kind, body = FAILED, failure(error)
        send(connection, kind, body)


def load(name: str) -> tuple[Callback, bytes]:
    """The function, and the file of its module.

    Raises:
        LookupError: there is none; in words.
    """
    module_name, _, path = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # One that it imports itself is an error of its own.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise LookupError(f"there is no module {error.name}") from None
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise LookupError(f"module {module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        kind = article(type(found).__name__)
        raise LookupError(f"{path} of module {module_name} is {kind}, no function")
    try:
        loader: Any = module.__spec__.loader  # type: ignore[union-attr]
        content = bytes(loader.get_data(module.__file__))
    except (AttributeError, OSError, TypeError):
        content = b""  # it is built in, or made by a program
    return found, content


def answer(result: object, length: int) -> tuple[int, Body]:
    """What to send for what a callback returned."""
    if result is None:
        return ZEROS, []
    try:
        view = memoryview(result)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        kind = article(type(result).__name__)
        return FAILED, wrong(f"it returned {kind}, where bytes or None belong")
    if view.nbytes != length:
        much = "few" if view.nbytes < length else "many"
        return FAILED, wrong(f"it returned too {much} bytes: {view.nbytes} instead of {length}")
    try:
        return BYTES, [view.cast("B")]
    except (TypeError, ValueError):  # not in one piece, or elements that Python has no name for
        return BYTES, [view.tobytes()]


def article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def wrong(summary: str) -> Body:
    """The body of a failure that is no exception."""
    text = encoded(summary)
    return [PAIR.pack(len(text), 0), text]


def failure(error: BaseException) -> Body:
    """The body of a failure: the exception in words, where it was raised, and itself."""
    import pickle
    import traceback

    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # many a class can do the one and not the other
    except BaseException:
        pickled = b""
    try:
        summary = encoded(f"it raised {error!r}")
    except BaseException:
        summary = encoded(f"it raised {article(type(error).__name__)} that cannot be printed")
    places = error.__traceback__
    while places and places.tb_frame.f_globals.get("__name__", "").startswith(
        (__name__, "importlib")
    ):
        places = places.tb_next  # ours are of no interest
    trace = encoded("".join(traceback.format_exception(type(error), error, places)))
    return [PAIR.pack(len(summary), len(trace)), summary, trace, pickled]


def encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def send(connection: int, kind: int, body: Body) -> None:
    parts = [PAIR.pack(kind, sum(len(part) for part in body)), *body]
    while parts:
        sent = os.writev(connection, parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = memoryview(parts[0])[sent:]


def receive(connection: int, length: int) -> bytes:
    """That many bytes, or none at their end."""
    received = b""
    while len(received) < length:
        more = os.read(connection, length - len(received))
        if not more:
            return b""
        received += more
    return received
