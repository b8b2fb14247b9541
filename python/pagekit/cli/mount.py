"""``pagekit mount``: a template's memory as a file, until it is interrupted."""

from __future__ import annotations

from typing import Any

import click

from .program import become_server, shared_options


@click.command(name="mount")
@click.argument("spec")
@click.argument("directory", metavar="DIR")
@click.option("--name", metavar="NAME", help="The name of the file.  [default: memory]")
@click.option(
    "--mode",
    metavar="OCTAL",
    help="Its mode. Who may write can open it for writing, as QEMU before 8.2 does even to map it "
    "privately, and spoil it for others; 600 is for those.  [default: 400]",
)
@shared_options
def command(spec: str, directory: str, name: str | None, mode: str | None, **options: Any) -> None:
    """Mount the memory SPEC as a file in DIR, for any program that maps it privately.

    Firecracker's File backend, QEMU's memory-backend-file, or mmap(2): no preloaded library and no
    userfaultfd. A page is fetched once for all of them, and they share it until they write. They
    need not trust each other. Ends at SIGINT or SIGTERM.

    \b
    Examples:
      pagekit mount file:memory /run/pk
      pagekit mount python:tiles:render:1G /run/pk
      pagekit mount file:memory /run/pk --layer delay=2ms,1GB/s,16 --working-set memory.pkws
      qemu-system-x86_64 … -object memory-backend-file,mem-path=/run/pk/memory,share=off,…
    """
    become_server(spec, {"mount": directory, "mount_name": name, "mount_mode": mode, **options})
