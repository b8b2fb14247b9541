"""The host's side of the agent in the guest; :mod:`pagekit.sandbox.guest_agent` is the other."""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass
from typing import Any

from ..errors import AgentError, CodeError
from .channel import Channel, Malformed

_REHEARSALS = 3


@dataclass(frozen=True)
class Answer:
    """What came of running code in a sandbox.

    Attributes:
        output: what it, and processes it started, wrote to standard output.
        result: ``str()`` of the variable ``result``, None if the code did not set it.
        seconds: from the request to the answer, on the host's clock.
    """

    output: str
    result: str | None
    seconds: float


class Agent:
    """Asks an agent. For one thread at a time.

    Whatever waits raises :class:`~pagekit.sandbox.channel.Closed` when the VMM is gone.

    Args:
        channel: to the agent; owned from now on.
        fork_id: what the guest is told that it is called.

    Attributes:
        needs_identity: whether the guest still is what it was when it was frozen, so that the next
            request must make it different from its siblings.
    """

    def __init__(self, channel: Channel, fork_id: str) -> None:
        self.needs_identity = True
        self._channel = channel
        self._fork_id = fork_id
        self._requests = 0

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        """Wait for the agent of a guest that boots cold; return what it says of itself.

        Raises:
            AgentError: it did not say that it is ready, or not in time.
        """
        words = self._receive(timeout, "say that it is ready")
        if words.get("ready") is not True:
            raise AgentError(f"the agent's first words were not that it is ready: {words}")
        self.needs_identity = False
        return words

    def ask(self, code: str, timeout: float) -> Answer:
        """Have code run in the guest.

        Raises:
            CodeError: the code raised.
            AgentError: no answer in time, or not one to this request. A later request may work.
        """
        started = time.perf_counter()
        self._requests += 1
        request: dict[str, Any] = {"id": self._requests, "code": code}
        if self.needs_identity:
            request["identity"] = {
                "fork_id": self._fork_id,
                "time_ns": time.time_ns(),
                "entropy": base64.b64encode(os.urandom(64)).decode(),
            }
        try:
            self._channel.send(request, timeout=timeout)
        except TimeoutError:
            raise AgentError(f"the agent did not take a request within {timeout:g} s") from None
        while True:
            left = started + timeout - time.perf_counter()
            answer = self._receive(left, f"answer within {timeout:g} s")
            if answer.get("id") == self._requests:
                break
            if answer.get("id") is None:
                raise AgentError(f"the agent could not read a request: {answer.get('error')}")
            # else it belongs to a request whose time was up
        seconds = time.perf_counter() - started
        error = answer.get("error")
        if isinstance(error, str) and error.startswith("bad request"):
            raise AgentError(f"the agent refused a request: {error}")
        self.needs_identity = False
        if error:
            raise CodeError("the code raised in the sandbox", traceback=str(error))
        try:
            output, result = answer["output"], answer["result"]
        except KeyError as missing:
            raise AgentError(f"the agent's answer has no {missing}") from None
        return Answer(str(output), None if result is None else str(result), seconds)

    def rehearse(self, timeout: float) -> None:
        """Have the agent do now what it will do in every fork. Raises as :meth:`ask` does."""
        for _ in range(_REHEARSALS):
            self.needs_identity = True
            self.ask("print('a rehearsal')\nresult = 0", timeout)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _receive(self, timeout: float, awaited: str) -> dict[str, Any]:
        try:
            return self._channel.receive(timeout=timeout)
        except TimeoutError:
            raise AgentError(f"the agent in {self._fork_id} did not {awaited}") from None
        except Malformed as error:
            raise AgentError(f"the agent does not speak its protocol: {error}") from None
