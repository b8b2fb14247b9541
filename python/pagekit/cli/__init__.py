"""The command line: one file a verb, loaded when it is called.

Data goes to stdout, everything else to stderr. Only :func:`main` prints errors and exits; the exit
status is that of the error's class.
"""

from __future__ import annotations

import importlib
import sys

import click

from .. import __version__
from ..errors import PagekitError

_VERBS = ("boot", "demo", "doctor", "mount", "serve")


class _Verbs(click.Group):
    """Knows its commands by name, so that ``--help`` of one does not load the others."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command = importlib.import_module(f".{name}", __name__).command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `pagekit doctor`, then `pagekit demo`.",
)
@click.version_option(__version__, prog_name="pagekit")
def group() -> None:
    """Sandbox snapshots that boot in milliseconds: memory that arrives page by page, on demand."""


def main() -> None:
    """The program ``pagekit``."""
    try:
        status = group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        sys.exit(130)
    except PagekitError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    # With standalone_mode off, click returns what --help and ctx.exit() would have exited with.
    sys.exit(status if isinstance(status, int) else 0)
