"""Sandboxes: guests that are booted once, frozen, and forked in milliseconds.

::

    from pagekit import sandbox

    guest = sandbox.guest.ensure()
    with sandbox.Qemu.boot(guest.kernel, guest.initrd) as template:
        snapshot = template.freeze("/var/lib/snapshots/base")
    with sandbox.Qemu.fork(snapshot) as fork:
        print(fork.exec("result = 6 * 7").result)
"""

from . import guest, memory
from .agent import Answer
from .backing import Backing, Eager, Mounted, Plain, Served, choose, mount_in
from .fleet import Fleet, Outcome
from .foreign import freeze_running
from .program import Accelerator, Program, find_qemu, pick_accelerator
from .qemu import Marks, Qemu
from .rundir import RunDirectory
from .snapshot import Snapshot

__all__ = [
    "Accelerator",
    "Answer",
    "Backing",
    "Eager",
    "Fleet",
    "Marks",
    "Mounted",
    "Outcome",
    "Plain",
    "Program",
    "Qemu",
    "RunDirectory",
    "Served",
    "Snapshot",
    "choose",
    "find_qemu",
    "freeze_running",
    "guest",
    "memory",
    "mount_in",
    "pick_accelerator",
]
