"""Cold boots that fail, each with an error that names the thing and the remedy; accelerators."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import support
from test_sandbox_fork import fake

from pagekit.errors import BootFailed, GuestMissing, QemuMissing, Unsupported, UsageError
from pagekit.sandbox import Program, Qemu, find_qemu, pick_accelerator
from pagekit.sandbox.guest import Guest


def test_no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuMissing, match="qemu-system-x86_64 not found") as missing:
        find_qemu()
    assert "apt-get install" in (missing.value.hint or "")
    assert "--no-install-recommends" in (missing.value.hint or "")


@pytest.mark.parametrize(("script", "said"), [("exit 1", "does not start"), ("echo 1", "not QEMU")])
def test_something_else_is_called_qemu(script: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(QemuMissing, match=said):
        find_qemu(fake(tmp_path, script))


def test_no_kernel_and_no_initrd(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(GuestMissing, match=r"no kernel at .*/nothing") as missing:
        Qemu.boot(tmp_path / "nothing", guest.initrd)
    assert missing.value.hint
    with pytest.raises(GuestMissing, match=r"no initramfs at .*/nothing"):
        Qemu.boot(guest.kernel, tmp_path / "nothing")


def test_a_kernel_that_is_none(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_text("not a kernel")
    with pytest.raises(BootFailed, match="the guest did not boot"):
        Qemu.boot(tmp_path / "kernel", guest.initrd, accelerator="tcg")


def test_an_initrd_that_is_none(guest: Guest, tmp_path: Path) -> None:
    """The kernel panics, and its last words are in the hint."""
    (tmp_path / "initrd").write_text("not an initramfs")
    with pytest.raises(BootFailed, match="the guest shut down") as failed:
        Qemu.boot(guest.kernel, tmp_path / "initrd", accelerator="tcg")
    assert "console" in (failed.value.hint or "")


def test_an_agent_that_does_not_come(guest: Guest) -> None:
    with pytest.raises(BootFailed, match="did not say that it is ready"):
        Qemu.boot(guest.kernel, guest.initrd, accelerator="tcg", timeout=0.5)


def test_a_vmm_that_dies(guest: Guest, tmp_path: Path) -> None:
    script = 'test "$1" = --version && echo version 9.9 && exit; echo no such machine >&2; exit 1'
    with pytest.raises(BootFailed, match="no such machine"):
        Qemu.boot(guest.kernel, guest.initrd, accelerator="tcg", qemu=fake(tmp_path, script))


# Accelerators


@pytest.fixture
def probed(tmp_path: Path) -> Program:
    """A QEMU whose KVM does not work, and which counts how often that is tried."""
    script = f"echo tried >> {tmp_path}/tries; echo it is broken >&2; exit 1"
    return Program(fake(tmp_path, script), "9.9")


def need_kvm_device() -> None:
    accessible = os.access("/dev/kvm", os.R_OK | os.W_OK)
    support.need("kvm", accessible, "there is no /dev/kvm that could be tried")


def test_kvm_is_tried_and_the_verdict_remembered(
    probed: Program, guest: Guest, tmp_path: Path
) -> None:
    need_kvm_device()
    for _ in range(2):
        chosen = pick_accelerator(probed, guest.kernel, cache=tmp_path)
        assert chosen.name == "tcg"
        assert "it is broken" in chosen.reason
    assert (tmp_path / "tries").read_text() == "tried\n"
    # Another QEMU is another question, and so is a cache that cannot be understood.
    pick_accelerator(Program(probed.path, "10.0"), guest.kernel, cache=tmp_path)
    (tmp_path / "accelerator.json").write_text("{")
    pick_accelerator(probed, guest.kernel, cache=tmp_path)
    assert (tmp_path / "tries").read_text() == "tried\n" * 3
    assert json.loads((tmp_path / "accelerator.json").read_text())["refused"] == "it is broken"


def test_kvm_that_hangs(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kvm_device()
    monkeypatch.setattr("pagekit.sandbox.program._PROBE_TIMEOUT", 0.3)
    # As an emulated KVM does: first words on the console, and no more.
    script = 'for a; do case $a in file:*) echo Probing > "${a#file:}";; esac; done; exec sleep 600'
    chosen = pick_accelerator(Program(fake(tmp_path, script), "1"), guest.kernel, cache=tmp_path)
    assert chosen.name == "tcg"
    assert "did not boot" in chosen.reason


def test_kvm_that_works(guest: Guest, tmp_path: Path) -> None:
    need_kvm_device()
    words = "VFS: Unable to mount root fs on unknown-block(0,0)"
    script = f'for a; do case $a in file:*) echo "{words}" > "${{a#file:}}";; esac; done'
    program = Program(fake(tmp_path, script), "1")
    assert pick_accelerator(program, guest.kernel, cache=tmp_path).name == "kvm"


def test_kvm_is_wanted_and_refused(probed: Program, guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="kvm does not work here") as refused:
        pick_accelerator(probed, guest.kernel, wanted="kvm", cache=tmp_path)
    assert "tcg" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="xen"):
        pick_accelerator(probed, guest.kernel, wanted="xen", cache=tmp_path)
