"""QMP, the protocol by which QEMU is controlled: as much of it as freezing and forking need."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .channel import Channel, Closed, Malformed


class QmpError(Exception):
    """QEMU refused a command, or stopped answering. Callers say what that means to theirs.

    ``closed`` says that QEMU is no longer there.
    """

    def __init__(self, message: str, *, hint: str | None = None, closed: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.closed = closed


class Qmp:
    """A QMP connection. For one thread at a time.

    Commands may be posted before QEMU has even been started: it works them off in order. That is
    how a fork starts without a round trip.

    Args:
        channel: connected, or about to be, to a QMP monitor; owned from now on.
        timeout: seconds that any single answer may take, unless a call says otherwise.
    """

    def __init__(self, channel: Channel, *, timeout: float = 10) -> None:
        self._channel = channel
        self._timeout = timeout
        self._commands: deque[str] = deque()
        self._events: deque[dict[str, Any]] = deque()
        self.greeting: dict[str, Any] | None = None
        self.post("qmp_capabilities")

    def post(self, command: str, *, fds: Sequence[int] = (), **arguments: Any) -> None:
        """Send a command without waiting for its answer; the next :meth:`execute` looks at it.

        Raises:
            QmpError: QEMU is gone or does not read.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {name.replace("_", "-"): arguments[name] for name in arguments}
        try:
            self._channel.send(message, timeout=self._timeout, fds=fds)
        except Closed:
            raise self._gone(command) from None
        except TimeoutError:
            raise QmpError(f"QEMU does not read its command {command}") from None
        self._commands.append(command)

    def execute(
        self,
        command: str,
        *,
        timeout: float | None = None,
        fds: Sequence[int] = (),
        **arguments: Any,
    ) -> Any:
        """Run a command and return what it returned.

        Args:
            command: its name.
            timeout: seconds to wait, for it and for what was posted before it.
            fds: descriptors to pass along.
            arguments: as QMP has them; an underscore stands for the hyphen in their names.

        Raises:
            QmpError: this command or one posted before it was refused, or not answered in time.
        """
        self.post(command, fds=fds, **arguments)
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        result = None
        while self._commands:
            result = self._read(deadline, f"answer {self._commands[0]}")
        return result

    def wait_event(
        self, name: str, accept: Callable[[dict[str, Any]], bool], *, timeout: float
    ) -> dict[str, Any]:
        """Wait for an event called ``name`` whose data are accepted, and return its data.

        Raises:
            QmpError: it did not come in time, or a posted command was refused meanwhile.
        """
        deadline = time.monotonic() + timeout
        while True:
            while self._events:
                event = self._events.popleft()
                data: dict[str, Any] = event.get("data") or {}
                if event["event"] == name and accept(data):
                    return data
            self._read(deadline, f"report {name}")

    def close(self) -> None:
        """Close the connection. QEMU goes on."""
        self._channel.close()

    def _read(self, deadline: float, awaited: str) -> Any:
        """Take in one message; return the result if it is an answer."""
        try:
            message = self._channel.receive(timeout=deadline - time.monotonic())
        except TimeoutError:
            hint = None
            if self.greeting is None:
                hint = "a monitor talks to one client at a time: is another one connected to it?"
            raise QmpError(f"QEMU did not {awaited} in time", hint=hint) from None
        except Closed:
            raise self._gone(awaited) from None
        except Malformed as error:
            raise QmpError(f"this is not a QMP monitor: {error}") from None
        if "event" in message:
            self._events.append(message)
        elif "QMP" in message:
            self.greeting = message["QMP"]
        elif "return" in message:
            self._answered()
            return message["return"]
        elif "error" in message:
            reason = str(message["error"].get("desc", message["error"]))
            raise QmpError(f"QEMU refused {self._answered()}: {reason}")
        return None

    def _answered(self) -> str:
        if not self._commands:
            raise QmpError("QEMU answered a command that was not given")
        return self._commands.popleft()

    @staticmethod
    def _gone(awaited: str) -> QmpError:
        return QmpError(f"QEMU closed its monitor instead of going on to {awaited}", closed=True)
