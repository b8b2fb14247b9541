"""``pagekit doctor``: can this machine do it, and if not, the command that mends it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import doctor, uffd

_MARK = {"yes": "[green]yes[/]", "limited": "[yellow]limited[/]", "no": "[red]no[/]"}
_FEATURE_MARK = {
    "yes": "[green]yes[/]",
    "not permitted": "[red]not permitted[/]",
    "no": "[red]no[/]",
}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Look at this machine and say what pagekit can do on it.

    Below it is what userfaultfd has here: since which Linux, what is lost where it is missing, and
    the command that mends it. Run it as the user who is to serve: another one may have less.

    Exits with 0 if sandboxes can be served here, with 1 if not.

    \b
    Examples:
      pagekit doctor
      pagekit doctor --json
    """
    checks = doctor.examine()
    able = doctor.can_serve(checks)
    support = doctor.userfaultfd()
    if as_json:
        report: dict[str, Any] = {
            "can_serve": able,
            "checks": [dataclasses.asdict(check) for check in checks],
            "userfaultfd": dataclasses.asdict(support) if support else None,
        }
        click.echo(json.dumps(report))
    else:
        console = Console()
        _show(console, checks, able)
        if support:
            _show_features(console, support)
    context.exit(0 if able else 1)


def _show(console: Console, checks: list[doctor.Check], able: bool) -> None:
    verdict = "sandboxes can be served here" if able else "sandboxes cannot be served here"
    console.print(verdict, style="green" if able else "red")
    for check in checks:
        if check.remedy:
            console.print(f"[bold]hint:[/] {check.name}: {escape(check.remedy)}", highlight=False)
    table = Table(title="What pagekit finds on this machine", title_justify="left")
    for column in ("", "has it", "found", "needed for"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, _MARK[check.state], escape(check.found), escape(check.needed_for))
    console.print(table)


def _show_features(console: Console, support: uffd.Support) -> None:
    title = "What userfaultfd has here, for this user"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "has it", "since", "gives"):
        table.add_column(column, overflow="fold")
    for row in support.features:
        has = row.state == "yes"
        text = escape(row.gives) if has else f"[yellow]without: {escape(row.without)}[/]"
        table.add_row(row.name, _FEATURE_MARK[row.state], row.since, text)
    for name in support.unknown:
        table.add_row(name, _FEATURE_MARK["yes"], "", "newer than this release of pagekit")
    console.print(table)
    for remedy, names in uffd.lacking(support.features).items():
        listed = ", ".join(names)
        console.print(f"[bold]hint:[/] {listed}: {escape(remedy)}", highlight=False)
