"""``pagekit serve``: runs the server program in place of this one."""

from __future__ import annotations

import os

import click

from ..client import server_program, shim_path


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
    "--passthrough",
    type=click.Choice(["auto", "never", "always"]),
    help="Let the kernel serve that file from a local one by itself.  [default: auto]",
)
@click.option("--readahead", metavar="SIZE", help="Read so much around a page.  [default: 128K]")
@click.option("--owner", metavar="UID[:GID]", help="Give the socket to this user (and group).")
@click.option("--mode", metavar="OCTAL", help="Mode of the socket.  [default: 600]")
@click.option("--allow", metavar="UID", multiple=True, help="Let in only these users.")
@click.option("--record", metavar="FILE", help="Record the pages demanded, into a working set.")
@click.option(
    "--ready",
    metavar="WHEN",
    help="What is demanded later is not critical: settle=TIME, time=TIME, exit.  "
    "[default: settle=500ms]",
)
@click.option("--working-set", metavar="FILE", help="Fetch the pages of a working set ahead.")
@click.option("--rest", is_flag=True, help="Fetch those that are not critical, too.")
@click.option("--rate", metavar="RATE", help="Fetch ahead at most so fast: 100MB/s.")
@click.option("--layer", "layers", multiple=True, help="Wrap the source, outermost first.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "share", "copy", "plain"]),
    default="auto",
    show_default=True,
    help="How programs get the memory.",
)
@click.option("--deadline", default="5s", show_default=True, help="Give up a page after this time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object when ready, one at the end.")
@click.option("--run", "captive", is_flag=True, help="Run COMMAND, and live and die with it.")
@click.argument("command_line", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def command(
    spec: str,
    socket: str | None,
    firecracker: tuple[str, ...],
    mount: str | None,
    mount_name: str | None,
    mount_mode: str | None,
    passthrough: str | None,
    readahead: str | None,
    owner: str | None,
    mode: str | None,
    allow: tuple[str, ...],
    record: str | None,
    ready: str | None,
    working_set: str | None,
    rest: bool,
    rate: str | None,
    layers: tuple[str, ...],
    backend: str,
    deadline: str,
    as_json: bool,
    captive: bool,
    command_line: tuple[str, ...],
) -> None:
    """Serve the memory SPEC, page by page, to VMMs and other programs.

    SPEC is where the pages come from: file:PATH or zero:SIZE. Layers are pass, stats, delay=TIME,
    fail=N. In COMMAND, {file} stands for the file to map. A recording is saved at the end, and at
    SIGUSR1, which says that the sandbox is ready.

    \b
    Examples:
      pagekit serve file:memory --socket /run/pk.sock
      pagekit serve file:memory --firecracker /run/fc.sock --owner 1000
      pagekit serve file:memory --layer delay=2ms,1GB/s,16 --mount /run/pk
      pagekit serve file:memory --socket pk.sock --record memory.pkws
      pagekit serve file:memory --socket pk.sock --working-set memory.pkws
      pagekit serve file:memory --layer delay=2ms --socket pk.sock --run -- ./program {file}
    """
    if captive != bool(command_line):
        raise click.UsageError("--run and a command after -- belong together")
    program = str(server_program())
    arguments = [program, spec, "--backend", backend, "--deadline", deadline]
    for option, value in (
        ("--socket", socket),
        ("--mount", mount),
        ("--mount-name", mount_name),
        ("--mount-mode", mount_mode),
        ("--passthrough", passthrough),
        ("--readahead", readahead),
        ("--owner", owner),
        ("--mode", mode),
        ("--record", record),
        ("--ready", ready),
        ("--working-set", working_set),
        ("--rate", rate),
    ):
        if value is not None:
            arguments += [option, value]
    for option, values in (("--firecracker", firecracker), ("--allow", allow), ("--layer", layers)):
        for value in values:
            arguments += [option, value]
    if rest:
        arguments.append("--rest")
    arguments += ["--shim", str(shim_path())]
    if as_json:
        arguments.append("--json")
    if captive:
        arguments += ["--run", *command_line]
    # The server takes over this process: no Python stays around it.
    os.execv(program, arguments)
