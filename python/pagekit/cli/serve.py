"""``pagekit serve``: runs the server program in place of this one."""

from __future__ import annotations

from typing import Any

import click

from .program import become_server, shared_options


@click.command(name="serve")
@click.argument("spec")
@click.option("--socket", help="Where programs attach that preload the shim.")
@click.option(
    "--firecracker", metavar="PATH", multiple=True, help="Where Firecracker connects; repeatable."
)
@click.option("--mount", metavar="DIR", help="A directory in which the memory shall be a file.")
@click.option("--mount-name", metavar="NAME", help="The name of that file.  [default: memory]")
@click.option("--mount-mode", metavar="OCTAL", help="The mode of that file.  [default: 400]")
@click.option(
    "--backend",
    type=click.Choice(["auto", "share", "copy", "plain"]),
    help="How programs with the shim get the memory.  [default: auto]",
)
@click.option(
    "--broadcast",
    type=click.Choice(["off", "working-set", "all"]),
    help="Put what one demanded into its siblings that have copies.  [default: off]",
)
@click.option("--relay", metavar="PATH", help="Where second handlers connect (pagekit.Relay).")
@click.option("--mode", metavar="OCTAL", help="Mode of the sockets.  [default: 600]")
@click.option("--allow", metavar="UID", multiple=True, help="Let in only these users.")
@shared_options
@click.option("--run", "captive", is_flag=True, help="Run COMMAND, and live and die with it.")
@click.argument("command_line", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def command(spec: str, captive: bool, command_line: tuple[str, ...], **options: Any) -> None:
    """Serve the memory SPEC, page by page, to VMMs and other programs.

    SPEC is where the pages come from: file:PATH, zero:SIZE, or python:MODULE:FUNCTION:SIZE, whose
    pages a function makes. Layers are pass, stats, delay=TIME, fail=N. In COMMAND, {file} stands
    for the file to map. A recording is saved at the end, and at SIGUSR1, which says that the
    sandbox is ready.

    Firecrackers at a socket get copies of their own; to share pages between them take --mount.

    \b
    Examples:
      pagekit serve file:memory --socket /run/pk.sock
      pagekit serve file:memory --firecracker /run/fc.sock --owner 1000
      pagekit serve file:memory --layer delay=2ms,1GB/s,16 --mount /run/pk
      pagekit serve file:memory --socket pk.sock --record memory.pkws
      pagekit serve file:memory --socket pk.sock --working-set memory.pkws
      pagekit serve file:memory --layer stats --socket pk.sock --run -- ./program {file}
    """
    if captive != bool(command_line):
        raise click.UsageError("--run and a command after -- belong together")
    become_server(spec, options, command_line)
