"""The warden: a small process that ends our children when we are gone, however that came about.

What is known, and what follows:

- A process can ask the kernel for a signal when its parent ends (PR_SET_PDEATHSIG). But the parent
  is the *thread* that made it, and forks are made by threads that end before them.
- A process that is to tell somebody of a child just made may be killed before it has told.

So nobody is told anything. Children are put into the process group of the warden, which does
nothing but read from a socket whose other end we alone hold, and at its end kills its group. No
child can be missed: one that is being made has a copy of our end, like of every descriptor of ours,
and closes it only after it has joined the group. (So does :mod:`subprocess`: it sets the group
first, closes descriptors last, then runs the program.)

A forked copy of this process must not keep the warden waiting: it closes its copy of our end, and
gets a warden of its own when it makes children.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import socket
import threading

_SCRIPT = "read _; kill -KILL 0"


class _Warden:
    def __init__(self) -> None:
        self._ours, its = socket.socketpair()
        with its:
            self.group = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _SCRIPT],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, its.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                # Ctrl-C at a terminal reaches its whole foreground process group. Who ends when is
                # for us to say.
                setpgroup=0,
            )
        self._pidfd = os.pidfd_open(self.group)
        self._session = os.getsid(0)

    def usable(self) -> bool:
        """Whether it lives, and is of our session: no group reaches beyond one."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0) and os.getsid(0) == self._session

    def dismiss(self) -> None:
        """Have it end what is left of its group, and itself."""
        self._ours.close()
        with contextlib.suppress(ChildProcessError):  # somebody waits for all our children
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)

    def disown(self) -> None:
        """In a forked copy of its owner: leave it alone."""
        self._ours.close()
        os.close(self._pidfd)


_wardens: list[_Warden] = []
"""The last one is in use. Earlier ones see to children made before a change of session."""

_lock = threading.Lock()


def group() -> int:
    """Return the process group to make a child in, so that it ends with this process.

    From any thread. Starts the warden if there is none.

    Raises:
        OSError: it could not be started.
    """
    with _lock:
        if not _wardens or not _wardens[-1].usable():
            _wardens.append(_Warden())
        return _wardens[-1].group


@atexit.register
def _dismiss() -> None:
    while _wardens:
        _wardens.pop().dismiss()


def _disown() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of our parent's may have held it
    while _wardens:
        _wardens.pop().disown()


os.register_at_fork(after_in_child=_disown)
