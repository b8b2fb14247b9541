"""Everything pagekit raises.

::

    PagekitError                       .hint .retryable .exit_code
    ├─ UsageError(ValueError)          an impossible stack, a wrong option or argument
    ├─ KernelError(OSError)            the kernel refused or lacks something
    │  ├─ Unsupported                  this system or kernel cannot do it, whoever asks
    │  ├─ PermissionDenied             it could, but not for this user; the hint names the knob
    │  └─ Ioctl                        an operation on a userfaultfd failed: .errno .range .done
    ├─ TargetError(OSError)            the target is why it failed; the same attributes
    │  ├─ Gone                         the target has ended, or runs another program
    │  ├─ LayoutChanged                its memory is changing: read events, and try again
    │  ├─ NotCovered                   not all of the range is registered for that
    │  └─ Exists                       there is a page already; its waiters were not woken
    ├─ HandlerError                    the process that handled faults raised or died
    ├─ SourceError(OSError)            the place the pages come from failed
    │  ├─ Missing                      there is nothing at that place
    │  ├─ Unavailable                  it exists, but could not be read now
    │  ├─ SourceTimeout(TimeoutError)  it did not answer in the time it has
    │  └─ CallbackError                a callback raised, or gave something else than pages
    ├─ IntegrityError                  bytes are not what they must be; never retried
    ├─ ServerError(OSError)            the server could not be started or reached
    │  ├─ AddressInUse                 another server answers on this socket
    │  └─ RelayError                   no relay, or it does not want this second handler any more
    └─ SandboxError                    a sandbox driver could not do its work
       ├─ QemuMissing                  no QEMU program, or one that does not start
       ├─ GuestMissing                 no kernel or initramfs to boot
       ├─ BootFailed                   the guest or its VMM did not come up in time
       ├─ ForkDied                     a running sandbox ended; the message says why
       ├─ AgentError                   the program in the guest did not answer as it must
       ├─ CodeError                    code that ran in a sandbox raised; its traceback is kept
       └─ SnapshotError                a snapshot directory is damaged or cannot be made

A builtin is the second base where callers would already catch it. The text says what failed, on
what, and why, in lower case; what to do next is in ``hint``. ``exit_code`` is what the command line
exits with. The classes raised by the Rust core are mapped in ``crates/pagekit-py``.
"""

from __future__ import annotations


class PagekitError(Exception):
    """Base of everything pagekit raises."""

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(PagekitError, ValueError):
    """An impossible stack, a wrong option or argument."""

    exit_code = 2


class KernelError(PagekitError, OSError):
    """The kernel refused or lacks something."""

    exit_code = 3


class Unsupported(KernelError):
    """This system or kernel cannot do it, whoever asks."""


class PermissionDenied(KernelError):
    """It could be done, but not by this user; the hint names the knob."""

    exit_code = 4


class Ioctl(KernelError):
    """An operation on a userfaultfd, or on what the kernel says about pages, failed.

    ``errno`` says why, ``range`` is what it was asked for, as (address, bytes), and ``done`` how
    many bytes of it were done before.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        errno: int = 0,
        range: tuple[int, int] = (0, 0),
        done: int = 0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.range = range
        self.done = done


class TargetError(PagekitError, OSError):
    """An operation failed for what the target is, or does; attributes are those of Ioctl."""

    exit_code = 10

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        errno: int = 0,
        range: tuple[int, int] = (0, 0),
        done: int = 0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.range = range
        self.done = done


class Gone(TargetError):
    """The target has ended, or runs another program: its memory is no more."""


class LayoutChanged(TargetError):
    """The target's memory is changing: an event is unread, or its cause has not run since."""

    retryable = True


class NotCovered(TargetError):
    """Not all of the range is registered for that, or it lies in more than one mapping."""


class Exists(TargetError):
    """There is a page already. Threads that wait for it were not woken."""


class HandlerError(PagekitError):
    """The process that handled page faults raised, died, or ended too early.

    ``traceback`` is what Python printed about it there, if it raised; ``__cause__`` is what it
    raised, where that could be handed over.
    """

    exit_code = 11

    def __init__(self, message: str, *, hint: str | None = None, traceback: str = "") -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback


class SourceError(PagekitError, OSError):
    """The place the pages come from failed."""

    exit_code = 6


class Missing(SourceError):
    """There is nothing at that place."""


class Unavailable(SourceError):
    """The source exists, but could not be read now."""

    retryable = True


class SourceTimeout(SourceError, TimeoutError):
    """The source did not answer in the time it has; it would be as slow again."""


class CallbackError(SourceError):
    """A callback raised, or gave something else than pages; it would do so again.

    ``__cause__`` is what it raised, or, where that cannot be brought here from the process that
    runs callbacks, a :class:`RuntimeError` with its ``repr``; None if nothing was raised.
    ``traceback`` is what Python printed about it there.
    """

    def __init__(self, message: str, *, hint: str | None = None, traceback: str = "") -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback


class IntegrityError(PagekitError):
    """Bytes are not what they must be; never retried on the same copy."""

    exit_code = 7


class ServerError(PagekitError, OSError):
    """The server could not be started or reached."""

    exit_code = 8


class AddressInUse(ServerError):
    """Another server answers on this socket."""


class RelayError(ServerError):
    """No relay can be reached, or it does not want this second handler, or no more."""


class SandboxError(PagekitError):
    """A sandbox driver could not do its work."""

    exit_code = 9


class QemuMissing(SandboxError):
    """No QEMU program, or one that does not start."""


class GuestMissing(SandboxError):
    """No kernel or initramfs to boot."""


class BootFailed(SandboxError):
    """The guest or its VMM did not come up in time."""


class ForkDied(SandboxError):
    """A running sandbox ended; the message says why.

    ``status`` is the exit status of its VMM, or minus the signal that ended it (None: unknown);
    ``log`` is the end of what the VMM wrote to standard error.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, status: int | None = None, log: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.log = log


class AgentError(SandboxError):
    """The program in the guest did not answer as it must."""


class CodeError(SandboxError):
    """Code that ran in a sandbox raised; ``traceback`` is what Python printed about it there."""

    def __init__(self, message: str, *, hint: str | None = None, traceback: str = "") -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback


class SnapshotError(SandboxError):
    """A snapshot directory is damaged, or cannot be made."""
