"""The comparisons that ``pagekit demo`` makes: the same guest, started in different ways.

======================  ==========================================================================
:mod:`.local`           from a snapshot in a local file
:mod:`.remote`          a larger one from a store far away, the same for every way to start it
======================  ==========================================================================

All guests run on the same machine, with the same accelerator, and every answer is checked against a
value worked out here. The samples of all arms are taken in one random order, each alone; then many
forks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..guest import Guest
from ..program import Accelerator, find_qemu, pick_accelerator
from ..rundir import RunDirectory
from . import local, remote
from .local import Local
from .remote import Remote
from .setting import Setting, Told


@dataclass
class Comparison:
    """What was compared, and under which circumstances.

    Attributes:
        accelerator: what ran the guests' instructions.
        backend: how pagekit brought pages into the forks.
        forks: how many "many" are.
        answers: how many answers were checked; a wrong one ends the comparison.
        local, remote: the figures; None if they were not asked for.
    """

    accelerator: Accelerator
    backend: str
    forks: int
    answers: int
    local: Local | None
    remote: Remote | None


def compare(
    guest: Guest,
    *,
    with_local: bool = True,
    with_remote: bool = True,
    samples: int = 7,
    cold_boots: int = 5,
    forks: int = 20,
    accelerator: str = "auto",
    backend: str = "share",
    told: Told = lambda *_: None,
) -> Comparison:
    """Make the comparisons. Takes some minutes, most of them for cold boots.

    Args:
        guest: what to boot.
        with_local, with_remote: which ones.
        samples: how many starts of each arm that forks.
        cold_boots: how many cold boots, one at least.
        forks: how many forks at once.
        accelerator: ``auto``, ``kvm`` or ``tcg``.
        backend: how pagekit brings pages into forks: ``share`` or ``copy``.
        told: called as it goes on.

    Raises:
        IntegrityError: a guest gave a wrong answer, or a template is not what it was.
        PagekitError: what is needed is not there.
    """
    with RunDirectory() as run:
        told("looking for an accelerator that works", 0, 1)
        chosen = pick_accelerator(find_qemu(), guest.kernel, wanted=accelerator)
        setting = Setting(guest, chosen.name, run.path, forks, backend, told)
        found = Comparison(chosen, backend, forks, 0, None, None)
        if with_local:
            found.local = local.measure(setting, samples, cold_boots)
        if with_remote:
            found.remote = remote.measure(setting, samples)
        found.answers = setting.requests.checked
        return found
