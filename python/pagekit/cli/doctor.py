"""``pagekit doctor``: can this machine do it, and if not, the command that mends it."""

from __future__ import annotations

import dataclasses
import json

import click
from rich.console import Console
from rich.table import Table

from .. import doctor

_MARK = {"yes": "[green]yes[/]", "limited": "[yellow]limited[/]", "no": "[red]no[/]"}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Look at this machine and say what pagekit can do on it.

    Exits with 0 if sandboxes can be served here, with 1 if not.

    \b
    Examples:
      pagekit doctor
      pagekit doctor --json
    """
    checks = doctor.examine()
    able = doctor.can_serve(checks)
    if as_json:
        report = {"can_serve": able, "checks": [dataclasses.asdict(check) for check in checks]}
        click.echo(json.dumps(report))
    else:
        _show(checks, able)
    context.exit(0 if able else 1)


def _show(checks: list[doctor.Check], able: bool) -> None:
    console = Console()
    table = Table(title="What pagekit finds on this machine", title_justify="left")
    for column in ("", "has it", "found", "needed for"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, _MARK[check.state], check.found, check.needed_for)
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"[bold]hint:[/] {check.name}: {check.remedy}", highlight=False)
    verdict = "sandboxes can be served here" if able else "sandboxes cannot be served here"
    console.print(verdict, style="green" if able else "red")
