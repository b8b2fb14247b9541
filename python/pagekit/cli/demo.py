"""``pagekit demo``: the comparison, on this machine."""

from __future__ import annotations

import json

import click

from ..report import console
from ..report.comparison import as_json, as_tables
from ..report.progress import Progress
from ..sandbox import guest
from ..sandbox.comparison import compare
from .ending import end_on_sigterm


@click.command(name="demo")
@click.option("--json", "json_", is_flag=True, help="One JSON object on stdout.")
@click.option("--local-only", is_flag=True, help="Only the snapshot in a local file.")
@click.option("--remote-only", is_flag=True, help="Only the store far away.")
@click.option("--quick", is_flag=True, help="One or two samples of each, for development.")
@click.option("--samples", type=click.IntRange(1), default=7, help="Forks of each kind.")
@click.option("--cold-boots", type=click.IntRange(1), default=5, help="Cold boots.")
@click.option("--forks", type=click.IntRange(2), default=20, help="Forks at once.")
@click.option(
    "--accelerator", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", help="QEMU's."
)
@click.option(
    "--backend",
    type=click.Choice(["share", "copy"]),
    default="share",
    help="How pagekit brings pages into forks.",
)
def command(
    json_: bool,
    local_only: bool,
    remote_only: bool,
    quick: bool,
    samples: int,
    cold_boots: int,
    forks: int,
    accelerator: str,
    backend: str,
) -> None:
    """Boot Linux guests in several ways, and compare.

    From a snapshot in a local file: cold; eagerly loaded; over a plain MAP_PRIVATE mapping; served
    by pagekit from an empty template, with and without fetching ahead, and from a warm one; over a
    mount. From a store far away, which is a model and the same for all: eagerly, lazily, and with
    pages fetched ahead. Every answer is checked. Takes two or three minutes.

    \b
    Examples:
      pagekit demo
      pagekit demo --quick --remote-only
      pagekit demo --json > figures.json
    """
    if local_only and remote_only:
        raise click.UsageError("--local-only and --remote-only leave nothing to compare")
    end_on_sigterm()
    if quick:
        samples, cold_boots = min(samples, 2), 1
    with Progress() as progress:
        progress.told("making the guest", 0, 1)
        files = guest.ensure()
        result = compare(
            files,
            with_local=not remote_only,
            with_remote=not local_only,
            samples=samples,
            cold_boots=cold_boots,
            forks=forks,
            accelerator=accelerator,
            backend=backend,
            told=progress.told,
        )
    if json_:
        click.echo(json.dumps(as_json(result)))
    else:
        console().print(as_tables(result))
