"""The descriptor: opening, registering, reading events, resolving."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

from .._closing import Closing
from .._native import core
from ..errors import KernelError, PagekitError, PermissionDenied, Unsupported, UsageError
from .events import Cause, Event, Fault, Fork, Remap, Remove, Unknown, Unmap
from .memory import Range, Where, bits, held, locate, refused, whole_pages
from .table import features as rows_of_features

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEVICE = "/dev/userfaultfd"

_MISSING, _WP, _MINOR, _RWP = 1, 2, 4, 8
_DONT_WAKE, _PROTECTED, _HOLES = 1, 2, 4


class Registration(Closing):
    """Memory that is registered; a context manager, at whose end it is not any more.

    The buffer is held meanwhile: it can be neither freed nor resized (``mmap.close`` raises
    ``BufferError``).
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        range: Range,
        view: memoryview | None,
        modes: frozenset[str],
        operations: frozenset[str],
    ) -> None:
        self.range = range
        """The addresses."""
        self.modes = modes
        """Which faults are reported: ``missing``, ``wp``, ``minor``, ``rwp``."""
        self.operations = operations
        """Which operations the kernel has for this memory: ``COPY``, ``ZEROPAGE``, ..."""
        self._uffd = uffd
        self._view = view

    @property
    def start(self) -> int:
        """The first address, that of a page."""
        return self.range.start

    @property
    def length(self) -> int:
        """Bytes, whole pages."""
        return self.range.length

    def unregister(self) -> None:
        """Lets the memory be what it was: missing pages read as zeros, also in threads that wait at
        this moment. Nothing happens the second time, and when the userfaultfd is closed."""
        self._uffd._unregister(self)

    def close(self) -> None:
        """The same as :meth:`unregister`, for ``with``."""
        self.unregister()

    def __repr__(self) -> str:
        return f"<Registration of {self.length} bytes at {self.start:#x}>"


class Userfaultfd(Closing):
    """A userfaultfd of this process, opened and negotiated; a context manager.

    Args:
        features: names of what is asked for beyond what every kernel gives, of those rows of
            :func:`features` that have a bit: ``["THREAD_ID", "EVENT_FORK"]``.
        user_mode_only: for faults of the program itself only, which everybody may have. A system
            call that meets a missing page then fails with EFAULT.
        device: where to get it: the path of ``/dev/userfaultfd`` or an open descriptor of it,
            perhaps handed over by somebody who may open it. None: that path if this user may open
            it, else the system call.

    Raises:
        UsageError: a name that is no feature.
        Unsupported: the kernel lacks one; or this is not Linux.
        PermissionDenied: this user may not have it; the hint says what would help.
        KernelError: no descriptor can be had.

    Threads: every method may be called from any thread, and gives up the GIL while it is in the
    kernel. Of several readers each event reaches one. What is under way when another thread closes
    is finished; the descriptor's number is free for others only then.

    Every operation on a range takes addresses, multiples of the page size (that of a huge page for
    hugetlbfs), and raises:

    - UsageError: addresses that are no whole pages, or the userfaultfd is closed.
    - Exists, NotCovered, LayoutChanged, Gone: see there. Their ``done`` says how much was done.
    - Unsupported: the kernel has no such operation.
    - Ioctl: anything else the kernel says.
    """

    def __init__(
        self,
        features: Iterable[str] = (),
        *,
        user_mode_only: bool = False,
        device: str | os.PathLike[str] | int | None = None,
    ) -> None:
        known = _bits_of_features()
        wanted = bits("features", features, known)
        if user_mode_only and device is not None:
            raise UsageError("what comes from the device is never for user mode only")
        self._begin(_open(user_mode_only, device))
        try:
            self._core.handshake(wanted)
        except OSError as error:
            self.close()
            raise _not_negotiated(
                error, [name for name in known if wanted >> known[name] & 1]
            ) from error
        self._features = frozenset(self._core.negotiated() or ())

    def _begin(self, opened: Any) -> None:
        self._core = opened
        self._lock = threading.Lock()
        self._registrations: list[Registration] = []
        self._process = os.getpid()
        self._features = frozenset(opened.negotiated() or ())

    @classmethod
    def adopt(cls, descriptor: int) -> Self:
        """Takes over a descriptor that another process sent, and that is negotiated. It acts on the
        memory of the process that made it.

        Raises:
            UsageError: no userfaultfd, or one that is not negotiated. The descriptor is left alone.
        """
        try:
            opened = core().Userfaultfd.adopt(descriptor)
        except OSError as error:
            raise UsageError(f"descriptor {descriptor} cannot be taken over: {error}") from error
        return cls._of(opened)

    @classmethod
    def _of(cls, opened: Any) -> Self:
        uffd = cls.__new__(cls)
        uffd._begin(opened)
        return uffd

    @property
    def features(self) -> frozenset[str]:
        """Names of what was negotiated."""
        return self._features

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """What was registered by :meth:`register`, and still is."""
        with self._lock:
            return tuple(self._registrations)

    def fileno(self) -> int:
        """The number of the descriptor, for ``select`` and for sending it. It is non-blocking.

        Raises:
            UsageError: it is closed.
        """
        return int(self._native().fileno())

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core is None

    def close(self) -> None:
        """Unregisters everything, ends the wait of those who read, and gives the descriptor back.

        Missing pages read as zeros from then on, also in threads that wait at this moment. (In a
        child of ``os.fork`` only the child's descriptor is closed.)
        """
        with self._lock:
            opened, self._core = self._core, None
            registrations, self._registrations = self._registrations, []
        if opened is None:
            return
        for registration in registrations:
            if os.getpid() == self._process:
                _quietly(opened.unregister, registration.start, registration.length)
            _release(registration)
        opened.close()

    def _native(self) -> Any:
        opened = self._core
        if opened is None:
            raise UsageError("the userfaultfd is closed")
        return opened

    # Registering

    def register(
        self,
        where: Where,
        *,
        missing: bool = True,
        wp: bool = False,
        minor: bool = False,
        rwp: bool = False,
    ) -> Registration:
        """From now on faults on this memory are reported. See :data:`Where`; of a buffer the pages
        that lie wholly in it are registered, which need not be all of its bytes.

        Args:
            missing: a page that is not there is touched.
            wp: a page that :meth:`protect` protected is written.
            minor: a page is touched that is in the page cache and not mapped (shared memory).
            rwp: a page that :meth:`protect_against_access` protected is touched (Linux 7.3).

        Raises:
            UsageError: no memory; no mode; or it overlaps what this userfaultfd has registered.
            Ioctl: EINVAL (not mapped, or this kind of memory has not got the mode), EBUSY (another
                userfaultfd has it).
            Gone: the target of an adopted userfaultfd.
        """
        chosen = {"missing": missing, "wp": wp, "minor": minor, "rwp": rwp}
        modes = frozenset(name for name, on in chosen.items() if on)
        if not modes:
            raise UsageError("a range is registered for something: missing, wp, minor, rwp")
        mode = missing * _MISSING | wp * _WP | minor * _MINOR | rwp * _RWP
        range, view = locate(where)
        with contextlib.ExitStack() as unless_registered, self._lock:
            if view is not None:
                unless_registered.enter_context(view)
            opened = self._native()
            for other in self._registrations:
                if range.start < other.range.end and other.start < range.end:
                    raise UsageError(f"{range.length} bytes at {range.start:#x} overlap {other!r}")
            try:
                operations = frozenset(opened.register(range.start, range.length, mode))
            except OSError as error:
                raise self._failed("register", error, range.start, range.length) from error
            registration = Registration(self, range, view, modes, operations)
            self._registrations.append(registration)
            unless_registered.pop_all()
        return registration

    def _unregister(self, registration: Registration) -> None:
        with self._lock:
            if registration not in self._registrations:
                return
            self._registrations.remove(registration)
            _quietly(self._core.unregister, registration.start, registration.length)
        _release(registration)

    # Events

    def read(self, timeout: float | None = None, *, most: int = 64) -> list[Event]:
        """Waits for events, at most ``timeout`` seconds (None: for ever), and gives all that are
        there, at most ``most``; none when the time is over. Faults come first, then the others.

        Raises:
            UsageError: it is closed, also while it waits.
        """
        if most < 1 or (timeout is not None and not timeout >= 0):
            raise UsageError(f"no events can be read: timeout {timeout}, at most {most}")
        told = self._native().read(timeout, most)
        if told is None:
            raise UsageError("the userfaultfd was closed")
        return [_event(*one) for one in told]

    def __iter__(self) -> Iterator[Event]:
        """Events one by one, as they come, until the userfaultfd is closed."""
        # One at a time: an event that was read and not handed out would be lost.
        while (opened := self._core) and (told := opened.read(None, 1)) is not None:
            yield from (_event(*one) for one in told)

    # Resolving

    def copy(self, address: int, source: Buffer, *, wp: bool = False, wake: bool = True) -> int:
        """Fills the pages at ``address`` with a copy of ``source``, whole pages of it, and wakes
        who waits for them. Gives the bytes done, all of them.

        Args:
            source: bytes, or anything that has a contiguous buffer. It is held meanwhile.
            wp: the pages arrive write-protected (registered with ``wp``).
            wake: False: nobody is woken; :meth:`wake` does that.

        Raises:
            UsageError: also if the source is memory whose missing pages this userfaultfd reports:
                the kernel would wait for a page while it reads the bytes for one.
        """
        base, length, view = held(source, "bytes to copy")
        with view:
            whole_pages(address, length)
            self._not_in_what_faults(base, length)
            opened, how = self._native(), self._how(wp, wake)
            with view.cast("B") as flat:
                return self._fill(
                    *("copy", address, length),
                    lambda done: opened.copy(address + done, flat[done:], how),
                )

    def _not_in_what_faults(self, base: int, length: int) -> None:
        for other in self.registrations:
            waits = other.modes & {"missing", "minor"}
            if waits and base < other.range.end and other.start < base + length:
                raise UsageError(f"the bytes to copy are in memory that faults: {other!r}")

    def zeropage(self, address: int, length: int, *, wake: bool = True) -> int:
        """Fills pages with the zero page, and wakes. Not on hugetlbfs. Gives the bytes done."""
        opened, how = self._native(), self._how(False, wake)
        return self._fill(
            *("zeropage", address, length),
            lambda done: opened.zeropage(address + done, length - done, how),
        )

    def continue_(self, address: int, length: int, *, wp: bool = False, wake: bool = True) -> int:
        """Maps pages that are in the page cache of shared memory (registered with ``minor``), and
        wakes. Gives the bytes done."""
        opened, how = self._native(), self._how(wp, wake)
        return self._fill(
            *("continue_", address, length),
            lambda done: opened.continue_(address + done, length - done, how),
        )

    def poison(self, address: int, length: int, *, wake: bool = True) -> int:
        """Makes pages raise SIGBUS where they are touched (Linux 6.6), and wakes. Gives the bytes
        done."""
        opened, how = self._native(), self._how(False, wake)
        return self._fill(
            *("poison", address, length),
            lambda done: opened.poison(address + done, length - done, how),
        )

    def move(
        self, destination: int, source: int, length: int, *, holes: bool = False, wake: bool = True
    ) -> int:
        """Moves pages of this process's anonymous memory to ``destination`` without copying them
        (Linux 6.8), and wakes. ``holes``: pages that are missing at ``source`` are no error. Gives
        the bytes done."""
        whole_pages(source, length)
        opened = self._native()
        how = self._how(False, wake) | holes * _HOLES
        return self._fill(
            *("move", destination, length),
            lambda done: opened.move_(destination + done, source + done, length - done, how),
        )

    def protect(self, address: int, length: int) -> None:
        """Write-protects pages (registered with ``wp``). Pages that are not there are passed over
        in anonymous memory, unless WP_UNPOPULATED was negotiated."""
        self._change("protect", address, length)

    def unprotect(self, address: int, length: int, *, wake: bool = True) -> None:
        """Takes :meth:`protect` back, and wakes who waits to write there."""
        self._change("unprotect", address, length, self._how(False, wake))

    def protect_against_access(self, address: int, length: int) -> None:
        """Protects pages (registered with ``rwp``) against any access (Linux 7.3)."""
        self._change("protect_against_access", address, length)

    def allow_access(self, address: int, length: int) -> None:
        """Takes :meth:`protect_against_access` back, and wakes."""
        self._change("allow_access", address, length)

    def set_mode(self, *, enable: Iterable[str] = (), disable: Iterable[str] = ()) -> None:
        """Switches features on and off after the handshake: RWP_ASYNC is the only one (Linux
        7.3)."""
        known = _bits_of_features()
        switched_on = bits("features", enable, known)
        switched_off = bits("features", disable, known)
        try:
            self._native().set_mode(switched_on, switched_off)
        except OSError as error:
            raise refused("set_mode", error.errno or errno.EINVAL, 0, 0) from error

    def wake(self, address: int, length: int) -> None:
        """Wakes who waits in a range, registered or not; if a page is still missing they fault
        again."""
        self._change("wake", address, length)

    def is_alive(self, address: int) -> bool:
        """Whether the target's memory still exists, of which no event tells; ``address`` is that of
        any page."""
        whole_pages(address, 4096)
        return bool(self._native().is_alive(address))

    @staticmethod
    def _how(wp: bool, wake: bool) -> int:
        return (not wake) * _DONT_WAKE | wp * _PROTECTED

    def _fill(
        self, operation: str, start: int, length: int, step: Callable[[int], tuple[int, int]]
    ) -> int:
        """Goes on as long as something is done: of a partial result the kernel does not say why."""
        whole_pages(start, length)
        done = 0
        while True:
            more, code = step(done)
            done += more
            if code == 0:
                return done
            if more == 0:
                raise refused(operation, code, start, length, done)

    def _change(self, operation: str, start: int, length: int, *how: int) -> None:
        whole_pages(start, length)
        try:
            getattr(self._native(), operation)(start, length, *how)
        except OSError as error:
            raise self._failed(operation, error, start, length) from error

    def _failed(self, operation: str, error: OSError, start: int, length: int) -> PagekitError:
        code = error.errno or errno.EINVAL
        if code == errno.ENOMEM and not self._core.is_alive(start):
            code = errno.ESRCH  # what the kernel calls it when it registers
        return refused(operation, code, start, length)


def _bits_of_features() -> dict[str, int]:
    return {row[0]: row[1] for row in core().uffd_table() if row[1] is not None}


def _open(user_mode_only: bool, device: str | os.PathLike[str] | int | None) -> Any:
    opened: int | None = None
    try:
        if isinstance(device, int):
            return core().Userfaultfd.open(device, False)
        if not user_mode_only:
            try:
                opened = os.open(DEVICE if device is None else device, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                if device is not None:
                    raise
        return core().Userfaultfd.open(opened, user_mode_only)
    except OSError as error:
        raise _not_opened(error, user_mode_only, device) from error
    finally:
        if opened is not None:
            os.close(opened)


def _not_opened(error: OSError, user_mode_only: bool, device: object) -> KernelError:
    if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return KernelError(f"cannot open a userfaultfd: {error}")
    if device is not None:
        hint = "sudo setfacl -m u:$USER:rw /dev/userfaultfd"
        return PermissionDenied(f"cannot open a userfaultfd of {device}: {error}", hint=hint)
    reason = core().probe()[3]
    rows = {row.name: row for row in rows_of_features()}
    hint = rows["USER_MODE_ONLY" if user_mode_only else "KERNEL_FAULTS"].remedy
    if not user_mode_only and rows["USER_MODE_ONLY"].state == "yes":
        hint = f"{hint}; or, for faults of the program itself, user_mode_only=True"
    return PermissionDenied(reason or f"cannot open a userfaultfd: {error}", hint=hint)


def _not_negotiated(error: OSError, wanted: list[str]) -> KernelError:
    rows = {row.name: row for row in rows_of_features()}
    lacking = [name for name in wanted if rows[name].state == "no"]
    if lacking:
        remedy = rows[lacking[0]].remedy
        return Unsupported(f"this kernel's userfaultfd has no {', '.join(lacking)}", hint=remedy)
    if error.errno == errno.EPERM:
        remedy = rows["EVENT_FORK"].remedy
        return PermissionDenied("EVENT_FORK is not permitted to this user", hint=remedy)
    return KernelError(f"the kernel refuses {', '.join(wanted)}: {error}")


def _event(kind: str, first: int, second: int, third: int, child: Any) -> Event:
    match kind:
        case "fork":
            return Fork(Userfaultfd._of(child))
        case "remap":
            return Remap(first, second, third)
        case "remove":
            return Remove(first, second)
        case "unmap":
            return Unmap(first, second)
        case "unknown":
            return Unknown(first)
        case cause:
            return Fault(first, Cause(cause), bool(second), third or None)


def _quietly(unregister: Callable[[int, int], None], start: int, length: int) -> None:
    """It may be unmapped by now, or the target gone: then nothing is registered there."""
    with contextlib.suppress(OSError):
        unregister(start, length)


def _release(registration: Registration) -> None:
    if registration._view is not None:
        registration._view.release()
