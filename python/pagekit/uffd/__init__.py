"""userfaultfd, the kernel's interface by which a program answers page faults, for experiments.

Somebody touches a page, the kernel puts that thread to sleep and sends a message, and whoever reads
it says what shall be there::

    import mmap, threading
    from pagekit import uffd

    memory = mmap.mmap(-1, 16 << 20)
    with uffd.Userfaultfd() as faults, faults.register(memory) as registered:

        def handle() -> None:
            for event in faults:
                if isinstance(event, uffd.Fault):
                    number = registered.range.offset(event.address) // uffd.PAGE_SIZE
                    faults.copy(event.address, number.to_bytes(8, "little") * 512)

        threading.Thread(target=handle, daemon=True).start()
        ...

What the kernel has, and since when, is in ``docs/userfaultfd.md``; :func:`features` says what this
machine has. :class:`pagekit.Server` and :class:`pagekit.Template` serve memory faster than any
Python can; this is for those who want to see, or to do something else.

**Threads and the GIL.** A thread that touches a page waits in the kernel *with the GIL*, if it had
it: ``memory[0]``, slicing, comparing, most of NumPy. A handler in the same interpreter then never
gets to run, and both wait for ever. So let faults be handled in another process, by
:func:`handler_process`; or touch the memory only where the GIL is given up: in ``os.write``,
``socket.send``, ``hashlib``, ``zlib``, all given a ``memoryview``. (A system call that touches it
needs a userfaultfd that was not opened with ``user_mode_only``.) When a handler's call waits for
the GIL for seconds, while a thread stays in a fault that is the handler's and no other thread runs,
that is taken for what it is: it is said on standard error, and SIGBUS ends the process (``python -X
faulthandler`` shows the line). It is found when the handler is inside :meth:`read
<Userfaultfd.read>`, the iteration or an operation, which is where handlers wait.

**Forks.** A child of ``os.fork`` gets a copy of the memory in which missing pages read as zeros,
unless EVENT_FORK was negotiated and the child's userfaultfd, which comes with the event
:class:`Fork`, is served; its copy of a ``Userfaultfd`` acts on the parent's memory.
"""

from __future__ import annotations

from .descriptor import Registration, Userfaultfd
from .events import Cause, Event, Fault, Fork, Remap, Remove, Unknown, Unmap
from .handler import Handler, HandlerProcess, handler_process
from .memory import PAGE_SIZE, Range, Where
from .pagemap import Entry, Run, pagemap, scan
from .table import Feature, State, Support, features, lacking, support

__all__ = [
    "PAGE_SIZE",
    "Cause",
    "Entry",
    "Event",
    "Fault",
    "Feature",
    "Fork",
    "Handler",
    "HandlerProcess",
    "Range",
    "Registration",
    "Remap",
    "Remove",
    "Run",
    "State",
    "Support",
    "Unknown",
    "Unmap",
    "Userfaultfd",
    "Where",
    "features",
    "handler_process",
    "lacking",
    "pagemap",
    "scan",
    "support",
]
