"""The machine that our guests run on, as arguments for QEMU.

It is the same for a cold boot and for every kind of fork. What a guest without disks, network and
screen has no use for is left out, for milliseconds of QEMU's start and of the guest's boot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from .guest_agent import PORT_NAME

AGENT_PORT = PORT_NAME
"""Name of the virtio-serial port on which the agent in the guest listens."""

_WITHOUT = "sata=off,smbus=off,usb=off,vmport=off,hpet=off,smm=off"


def arguments(*, accelerator: str, memory_bytes: int, balloon: bool) -> list[str]:
    """Return the machine's arguments, with placeholders for what differs between its starts."""
    return [
        *("-accel", accelerator),
        *("-machine", f"q35,memory-backend=ram,{_WITHOUT}"),
        *("-cpu", "host" if accelerator == "kvm" else "max"),
        *("-m", f"{memory_bytes >> 20}M"),
        *("-object", memory_object("ram", memory_bytes)),
        *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-chardev", "file,id=console,path={console}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", "socket,id=agent,fd={agent}"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        *(("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on") if balloon else ()),
        *monitor(),
    ]


def memory_object(name: str, size: int) -> str:
    """Return the value of ``-object`` for the guest's RAM."""
    return f"memory-backend-file,id={name},size={size},mem-path={{memory}},share={{share}}"


def monitor() -> list[str]:
    """Return the arguments for the monitor that the driver talks to."""
    return [
        *("-chardev", "socket,id=pagekit-qmp,fd={qmp}"),
        *("-mon", "chardev=pagekit-qmp,mode=control"),
    ]


def fill(arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Put values in the place of ``{name}`` in arguments.

    QEMU separates options by commas, and takes two for one that is meant. In arguments that are
    JSON it does not.
    """

    def put(argument: str) -> str:
        def value(found: re.Match[str]) -> str:
            text = values[found[1]]
            return json.dumps(text)[1:-1] if argument.startswith("{") else text.replace(",", ",,")

        return re.sub(r"\{(" + "|".join(values) + r")\}", value, argument)

    return [put(argument) for argument in arguments]
