"""JSON objects, one a line, over a socket: what QMP and the agent in the guest both speak."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

_LONGEST_LINE = 256 << 20
_PIECE = 1 << 16


class Closed(Exception):
    """The other end closed the channel. Callers turn it into an error that says who that was."""


class Malformed(Exception):
    """The other end said something that is not a JSON object on a line of its own."""


class Channel:
    """One end of a channel. For one thread at a time.

    Args:
        end: a connected stream socket, owned by the channel from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = bytearray()

    def send(self, message: dict[str, Any], *, timeout: float, fds: Sequence[int] = ()) -> None:
        """Send one object, with descriptors attached to its first byte.

        Args:
            timeout: seconds to wait while the other end does not read.

        Raises:
            Closed, TimeoutError.
        """
        # Without spaces: QEMU reads its commands byte by byte, ten microseconds each.
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            self._socket.settimeout(timeout)
            if fds:
                line = line[socket.send_fds(self._socket, [line], list(fds)) :]
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, *, timeout: float) -> dict[str, Any]:
        """Wait for one object.

        Args:
            timeout: seconds to wait for the end of its line.

        Raises:
            Closed, Malformed, TimeoutError.
        """
        deadline = time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > _LONGEST_LINE:
                raise Malformed(f"a line of more than {_LONGEST_LINE >> 20} MiB")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            try:
                piece = self._socket.recv(_PIECE)
            except ConnectionResetError as error:
                raise Closed from error
            if not piece:
                raise Closed
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Malformed(f"{line[:80]!r} is not a JSON object")
        return message

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
