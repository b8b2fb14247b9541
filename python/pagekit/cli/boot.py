"""``pagekit boot``: make a snapshot of a guest, and boot forks of one."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import click

from .. import WorkingSet
from ..errors import CodeError, PagekitError
from ..report import console
from ..report.forks import as_json, as_table
from ..report.progress import Progress
from ..sandbox import (
    Backing,
    Fleet,
    Mounted,
    Qemu,
    RunDirectory,
    Served,
    Snapshot,
    choose,
    freeze_running,
    guest,
)
from ..sandbox.guest import COMMAND_LINE
from .ending import end_on_sigterm

_PATH = click.Path(path_type=Path)


@click.command(name="boot")
@click.argument("directory", metavar="[DIR]", type=_PATH, required=False)
@click.option("--forks", type=click.IntRange(1), default=1, help="How many forks to boot.")
@click.option("--exec", "code", default="", metavar="CODE", help="Python to run in each fork.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "share", "copy", "mount", "plain"]),
    default="auto",
    help="How forks get their memory.",
)
@click.option("--working-set", type=_PATH, metavar="FILE", help="Fetch these pages ahead.")
@click.option(
    "--record", type=_PATH, metavar="FILE", help="Save, or add, the pages that forks demand."
)
@click.option("--save", type=_PATH, metavar="DIR", help="Make a snapshot there.")
@click.option("--kernel", type=_PATH, help="Boot this kernel; the guest of `pagekit demo` if none.")
@click.option("--initrd", type=_PATH, help="Boot this initramfs; it must start the agent.")
@click.option("--append", default=COMMAND_LINE, help="The kernel's command line.")
@click.option("--memory", type=click.IntRange(64), default=512, help="MiB of RAM.")
@click.option("--balloon", is_flag=True, help="With a balloon, and free page reporting.")
@click.option(
    "--accelerator", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", help="QEMU's."
)
@click.option("--qmp", type=_PATH, metavar="SOCKET", help="Freeze the QEMU with this QMP socket.")
@click.option("--timeout", type=click.FloatRange(0.1), default=120.0, help="Seconds for each step.")
@click.option("--json", "json_", is_flag=True, help="One JSON object on stdout.")
def command(
    directory: Path | None,
    forks: int,
    code: str,
    backend: str,
    working_set: Path | None,
    record: Path | None,
    save: Path | None,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
    memory: int,
    balloon: bool,
    accelerator: str,
    qmp: Path | None,
    timeout: float,
    json_: bool,
) -> None:
    """Boot forks of the snapshot in DIR, or make one with --save.

    A snapshot is made of a guest that is booted for it, or of a QEMU that runs already; the latter
    runs on. In CODE, what is printed and what is assigned to `result` comes back, and
    os.environ["PAGEKIT_FORK_ID"] says which fork it is.

    \b
    Examples:
      pagekit boot --save base
      pagekit boot --kernel vmlinuz --initrd initrd --save base
      pagekit boot --qmp /run/vm.qmp --save base
      pagekit boot base --forks 20 --exec 'import uuid; result = uuid.uuid4()'
      pagekit boot base --forks 3 --backend share --json
      pagekit boot base --record base/working-set --exec 'import json'
      pagekit boot base --working-set base/working-set --forks 20
    """
    end_on_sigterm()
    if (directory is None) == (save is None):
        raise click.UsageError("give the DIR of a snapshot to fork, or --save DIR to make one")
    if save is None:
        assert directory is not None
        snapshot = Snapshot.load(directory)
        pages = WorkingSet.load(working_set) if working_set else None
        _fork(snapshot, forks, code, backend, pages, record, timeout, json_)
        return
    if qmp is not None:
        snapshot = freeze_running(qmp, save)
    else:
        with Progress() as progress:
            progress.told("making the guest", 0, 1)
            if kernel is None or initrd is None:
                made = guest.ensure()
                kernel, initrd = kernel or made.kernel, initrd or made.initrd
            progress.told("booting the guest", 0, 1)
            with Qemu.boot(
                kernel,
                initrd,
                memory_bytes=memory << 20,
                accelerator=accelerator,
                balloon=balloon,
                command_line=append,
                timeout=timeout,
            ) as booted:
                progress.told("freezing it", 0, 1)
                snapshot = booted.freeze(save)
    _made(snapshot, json_)


def _made(snapshot: Snapshot, json_: bool) -> None:
    used = snapshot.memory.stat().st_blocks * 512
    if json_:
        click.echo(
            json.dumps(
                {
                    "snapshot": str(snapshot.directory),
                    "accelerator": snapshot.accelerator,
                    "memory_bytes": snapshot.memory_bytes,
                    "image_bytes": used,
                    "agent": snapshot.agent,
                }
            )
        )
        return
    click.echo(
        f"{snapshot.directory}: {used >> 20} of {snapshot.memory_bytes >> 20} MiB in use, "
        f"accelerator {snapshot.accelerator}"
    )


def _fork(
    snapshot: Snapshot,
    count: int,
    code: str,
    backend: str,
    working_set: WorkingSet | None,
    record: Path | None,
    timeout: float,
    json_: bool,
) -> None:
    """Boot forks, have each run the code, print what came of it, and raise the first error."""
    name = uuid.uuid4().hex[:8]
    names = [f"{name}-{number}" for number in range(1, count + 1)]
    with (
        RunDirectory() as run,
        choose(
            snapshot, backend, run.path, working_set=working_set, recording=record is not None
        ) as (backing, reason),
        _recording(backing, record),
        Progress() as progress,
        Fleet(snapshot, backing) as fleet,
    ):
        click.echo(f"backend: {backing.name} ({reason})", err=True)
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            progress.told("booting forks", done, count)

        progress.told("booting forks", 0, count)
        outcomes = fleet.run([code] * count, names=names, timeout=timeout, told=told)
    if json_:
        click.echo(json.dumps(as_json(snapshot, backing.name, reason, names, outcomes)))
    else:
        console().print(as_table(snapshot, backing.name, names, outcomes))
    errors: list[PagekitError] = [outcome.error for outcome in outcomes if outcome.error]
    for error in errors[:1]:
        if isinstance(error, CodeError):
            click.echo(error.traceback.rstrip(), err=True)
        raise error


@contextlib.contextmanager
def _recording(backing: Backing, file: Path | None) -> Iterator[None]:
    """Record what forks demand of a backing that serves, and add it to a file."""
    if file is None:
        yield
        return
    assert isinstance(backing, (Served, Mounted))
    recording = backing.server.template.record()
    # Known to be of this template before an hour of recording is lost.
    before = WorkingSet.load(file) if file.exists() else None
    if before is not None:
        before.check(backing.server.template)
    yield
    recording.ready()
    found = recording.finish()
    united = found if before is None else before | found
    united.save(file)
    click.echo(
        f"{file}: {found.pages} pages were demanded; it has {united.pages} "
        f"of {united.recordings} recordings",
        err=True,
    )
