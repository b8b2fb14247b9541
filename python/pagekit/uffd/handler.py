"""Faults handled in another process, by a descriptor that is handed over.

The two processes talk over a Unix socket, one message each::

    the handler's process                      this process
    READY, or REPORT                     ->
                                         <-    the ranges, with the userfaultfd
    TAKEN, or REPORT                     ->
                                               (the heir is appointed; the context begins)
                                         <-    end of the stream, when the context ends
    REPORT (empty: it ended as it should) ->
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import traceback as tracebacks
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Self, TypeAlias

from .._native import core
from ..errors import HandlerError, KernelError, UsageError
from .descriptor import Userfaultfd
from .memory import Range

Handler: TypeAlias = Callable[[Userfaultfd, tuple[Range, ...]], object]
"""A function that handles the faults of some ranges: it iterates the userfaultfd until that
ends."""

_READY, _TAKEN, _REPORT = b"ready", b"taken", b"report"
_MOST = 128 << 10


class HandlerProcess:
    """A context manager: while it lasts, the faults of ``uffd`` are handled by ``handler`` in a
    process of its own, so that threads of this one may touch the memory as they like, the GIL in
    their hands.

    Args:
        handler: a function of a userfaultfd and the ranges that are registered now. It is called
            once and iterates the userfaultfd; at the end of the context the iteration ends, and it
            must return. Either ``"module:function"``, or something that can be pickled. The process
            is started anew (by ``spawn``), so a script must guard its doing by ``if __name__ ==
            "__main__":``.
        uffd: of this process, with everything registered whose faults are to be handled.
        patience: seconds for the process to start, and to end.

    Raises:
        UsageError: a handler that cannot be handed over; a userfaultfd with EVENT_FORK (the memory
            of children would read as zeros should the process die).
        HandlerError: when the context begins: it could not start. When it ends: the handler raised
            (``traceback``, ``__cause__``), died, returned before the end, or did not return.

    **What happens when the process dies.** A thread of this process that needs no GIL notices, says
    so on standard error, and takes its place until ``uffd`` is closed: whoever waits for a page
    that is missing, or touches one, gets SIGBUS (a system call: EFAULT); whoever writes to a
    protected page goes on. Nobody waits for ever, and nobody reads zeros. On Linux older than 6.6,
    which cannot do that, this process ends with status 70 instead.
    """

    def __init__(
        self, handler: Handler | str, uffd: Userfaultfd, *, patience: float = 30.0
    ) -> None:
        if "EVENT_FORK" in uffd.features:
            raise UsageError(
                "a userfaultfd with EVENT_FORK cannot be handled in another process: the memory of"
                " children would read as zeros should it die"
            )
        if isinstance(handler, str) and not all(handler.partition(":")):
            raise UsageError(f"{handler!r} names no function", hint="module:function")
        try:
            self._handler = bytes(ForkingPickler.dumps(handler))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"the handler cannot be handed over: {error}",
                hint="a function at the top of a module can, and so can module:function",
            ) from error
        self._uffd = uffd
        self._patience = patience
        self._heir: Any = None
        self._reported = False

    @property
    def pid(self) -> int | None:
        """The process, from the beginning of the context on."""
        return self._process.pid

    def __enter__(self) -> Self:
        descriptor = self._uffd.fileno()
        ranges = tuple(registration.range for registration in self._uffd.registrations)
        context = multiprocessing.get_context("spawn")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(self._patience)
        self._process = context.Process(
            target=_run, args=(theirs, self._handler), name="pagekit-uffd-handler", daemon=True
        )
        try:
            with theirs:
                self._process.start()
            self._expect(_READY)
            with suppress(ConnectionError):  # what it died of is said next
                socket.send_fds(self._socket, [pickle.dumps(ranges)], [descriptor])
            self._expect(_TAKEN)
            process = os.pidfd_open(self._process.pid or 0)
            try:
                self._heir = core().Heir(self._uffd._native(), process)
            finally:
                os.close(process)
        except OSError as error:
            self._end()
            raise KernelError(f"the handler's process cannot be had: {error}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._heir.retire()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        failure = self._failure()
        # What has reported ends by itself.
        self._end(patience=self._patience if self._reported else 0)
        if failure is not None and (error is None or isinstance(error, Exception)):
            raise failure from failure.__cause__

    def _expect(self, word: bytes) -> None:
        """Waits for the next message, which must be this."""
        with suppress(TimeoutError):
            if (found := self._receive()) == word:
                return
            raise _failed(found, "before it could handle anything", self._status())
        raise HandlerError(f"the handler's process did not start within {self._patience} s")

    def _receive(self) -> bytes:
        """The next message; nothing if the process has ended."""
        try:
            return self._socket.recv(_MOST)
        except ConnectionError:
            return b""

    def _failure(self) -> HandlerError | None:
        """Waits for the report; None if all was well."""
        try:
            found = self._receive()
            self._reported = True
        except TimeoutError:
            return HandlerError(
                f"the handler did not return within {self._patience} s of the end",
                hint="let it iterate the userfaultfd, or look whether that is closed",
            )
        if found == _REPORT:
            return None
        return _failed(found, "while it handled faults", self._status())

    def _status(self) -> int | None:
        self._process.join(self._patience)
        return self._process.exitcode

    def _end(self, patience: float = 0) -> None:
        self._socket.close()
        if self._process.pid is None:
            return
        self._process.join(patience)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def handler_process(
    handler: Handler | str, uffd: Userfaultfd, *, patience: float = 30.0
) -> HandlerProcess:
    """Handles the faults of ``uffd`` in another process; see :class:`HandlerProcess`."""
    return HandlerProcess(handler, uffd, patience=patience)


def _failed(found: bytes, when: str, status: int | None) -> HandlerError:
    if not found.startswith(_REPORT):
        how = (
            f"was killed by signal {-status}" if status and status < 0 else f"exited with {status}"
        )
        hint = 'guard what a script does by if __name__ == "__main__"' if status == 1 else None
        return HandlerError(f"the handler's process {how} {when}", hint=hint)
    words, text, pickled = pickle.loads(found[len(_REPORT) :])
    error = HandlerError(words, traceback=text)
    if pickled is not None:
        # What it raised may be of a class that this process cannot make.
        with suppress(Exception):
            error.__cause__ = pickle.loads(pickled)
    return error


# In the other process


def _run(parent: socket.socket, pickled: bytes) -> None:
    # An interrupt is meant for the program; this process ends with its socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = threading.Event()
    try:
        handler = _load(pickled)
        parent.send(_READY)
        message, descriptors, _, _ = socket.recv_fds(parent, _MOST, 1)
        if not descriptors:
            return
        uffd = Userfaultfd.adopt(descriptors[0])
        ranges: tuple[Range, ...] = pickle.loads(message)

        def wait_for_the_end() -> None:
            with suppress(OSError):
                parent.recv(1)
            ended.set()
            # The iteration ends; what it is at can still be resolved.
            uffd._native().finish()

        parent.send(_TAKEN)
        threading.Thread(target=wait_for_the_end, daemon=True).start()
        handler(uffd, ranges)
        report = b""
        if not ended.is_set():
            report = _report("the handler returned while there was memory to handle", "", None)
    except BaseException as error:
        text = "".join(tracebacks.format_exception(error))
        try:
            cause = pickle.dumps(error)
        except Exception:
            cause = None
        words = f"the handler raised {type(error).__name__}: {error}"
        report = _report(words[:4096], text[-16384:], cause)
    with suppress(OSError):
        parent.send(_REPORT + report)


def _report(words: str, text: str, cause: bytes | None) -> bytes:
    if cause is not None and len(cause) > _MOST // 2:
        cause = None
    return pickle.dumps((words, text, cause))


def _load(pickled: bytes) -> Handler:
    found = pickle.loads(pickled)
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"{found!r} cannot be called")
    handler: Handler = found
    return handler
