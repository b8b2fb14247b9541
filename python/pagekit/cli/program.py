"""What ``serve`` and ``mount`` have in common: options of the server program, and becoming it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import click

from ..client import server_program, shim_path

Command = Callable[..., None]

_SHARED = [
    click.option(
        "--owner", metavar="UID[:GID]", help="Give what is made to this user (and group)."
    ),
    click.option("--layer", multiple=True, help="Wrap the source, outermost first."),
    click.option(
        "--deadline", metavar="TIME", help="Give up a page after this time.  [default: 5s]"
    ),
    click.option("--record", metavar="FILE", help="Record the pages demanded, into a working set."),
    click.option(
        "--ready",
        metavar="WHEN",
        help="What is demanded later is not critical: settle=TIME, time=TIME, exit.  "
        "[default: settle=500ms]",
    ),
    click.option("--working-set", metavar="FILE", help="Fetch the pages of a working set ahead."),
    click.option("--rest", is_flag=True, help="Fetch those that are not critical, too."),
    click.option("--rate", metavar="RATE", help="Fetch ahead at most so fast: 100MB/s."),
    click.option(
        "--passthrough",
        type=click.Choice(["auto", "never", "always"]),
        help="Let the kernel serve a mounted file from a local one by itself.  [default: auto]",
    ),
    click.option(
        "--readahead",
        metavar="SIZE",
        help="What the kernel reads around a page of a mounted file.  [default: 128K]",
    ),
    click.option("--json", is_flag=True, help="One JSON object when ready, one at the end."),
]


def shared_options(command: Command) -> Command:
    """Adds the options that every way in has."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def become_server(spec: str, options: Mapping[str, Any], captive: tuple[str, ...] = ()) -> NoReturn:
    """Runs the server program in place of this one: no Python stays around it.

    Args:
        spec: where the pages come from.
        options: by their names in Python. What is None, False or empty is left out; a tuple is an
            option given several times.
        captive: a command to run with the shim.
    """
    arguments = [str(server_program()), spec, "--shim", str(shim_path())]
    for name, given in options.items():
        option = f"--{name.replace('_', '-')}"
        if given is True:
            arguments.append(option)
        elif given not in (None, False):
            for value in given if isinstance(given, tuple) else (given,):
                arguments += [option, str(value)]
    if captive:
        arguments += ["--run", *captive]
    # The Python that has pagekit, should callbacks make the pages.
    environment = {"PAGEKIT_PYTHON": sys.executable, **os.environ}
    os.execve(arguments[0], arguments, environment)
