"""The QEMU driver: boot a guest, freeze it, start forks of it, have code run in them.

How a fork gets to its first answer, and what is done about the milliseconds:

1. QEMU is started with one end of two socket pairs, so there is no socket to wait for, and the
   commands that load the state already lie in the one for its monitor when it first looks.
2. It loads the state (memory comes with the mapping) and says so in an event.
3. ``cont``: the guest runs, and finds the first request waiting.

The rest, two thirds of it where instructions are emulated, is the guest's own: every basic block
that runs for the first time in a QEMU has to be translated. That is why a guest is made to rehearse
before it is frozen: what has been paged in, linked and allocated by then need not be done, and its
code not be translated, in any fork.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import (
    AgentError,
    BootFailed,
    ForkDied,
    GuestMissing,
    SandboxError,
    SnapshotError,
)
from . import machine
from .agent import Agent, Answer
from .backing import Backing, Plain, Prepared
from .channel import Channel, Closed
from .freezing import CAPABILITIES, capabilities, freeze
from .guest import COMMAND_LINE
from .memory import ProcessMemory, process_memory
from .process import Child
from .program import NAME, find_qemu, pick_accelerator
from .qmp import Qmp, QmpError
from .rundir import RunDirectory
from .snapshot import Snapshot

_SERVER_GONE = 69
_REHEARSAL_TIMEOUT = 60.0


@dataclass
class Marks:
    """Moments in a sandbox's life, in seconds of :func:`time.perf_counter`; None: not yet.

    Attributes:
        started: before anything was done for it.
        resumed: just before QEMU was told to let the guest run; for a cold boot, before QEMU was
            started.
        answered: when its first answer was there.
    """

    started: float
    resumed: float | None = None
    answered: float | None = None

    @property
    def ready_s(self) -> float | None:
        """Seconds from nothing to the first answer."""
        return None if self.answered is None else self.answered - self.started

    @property
    def resume_to_answer_s(self) -> float | None:
        """Seconds from when the guest was let run to the first answer."""
        if self.answered is None or self.resumed is None:
            return None
        return self.answered - self.resumed


class Qemu:
    """A guest in a QEMU of its own, made by :meth:`boot` or :meth:`fork`.

    For one thread at a time; several sandboxes may be made and used in as many threads. It is a
    context manager: at its end, QEMU and all that was made for it are gone. They also go when this
    process ends, however it does.

    Attributes:
        marks: when what happened.
        snapshot: what it is a fork of; None after a cold boot.
        fork_id: what it is called, in the guest too.
        guest: what the agent said of itself after a cold boot.
    """

    def __init__(self, run: RunDirectory, started: float, *, name: str) -> None:
        self.marks = Marks(started)
        self.snapshot: Snapshot | None = None
        self.fork_id = name
        self.guest: dict[str, Any] = {}
        self._run = run
        self._prepared: Prepared | None = None
        self._described: dict[str, Any] = {}
        self._child: Child | None = None
        self._qmp: Qmp | None = None
        self._agent: Agent | None = None
        self._needs_rehearsal = False

    # ---------------------------------------------------------------------------------- making one

    @classmethod
    def boot(
        cls,
        kernel: str | os.PathLike[str],
        initrd: str | os.PathLike[str],
        *,
        memory_bytes: int = 512 << 20,
        accelerator: str = "auto",
        balloon: bool = False,
        command_line: str = COMMAND_LINE,
        qemu: str = NAME,
        timeout: float = 120,
    ) -> Qemu:
        """Boot a guest from nothing and wait for its agent.

        Args:
            kernel, initrd: what to boot; the initramfs starts the agent.
            memory_bytes: the guest's RAM.
            accelerator: ``auto``, ``kvm`` or ``tcg``.
            balloon: whether it has a balloon and reports free pages.
            command_line: the kernel's.
            qemu: the program, by name or path.
            timeout: seconds until the agent must have said that it is there.

        Raises:
            QemuMissing, GuestMissing, Unsupported: what is needed is not there.
            BootFailed: QEMU or the guest ended, or was not ready in time.
        """
        program = find_qemu(qemu)
        kernel, initrd = _existing(kernel, "kernel"), _existing(initrd, "initramfs")
        chosen = pick_accelerator(program, kernel, wanted=accelerator).name
        arguments = machine.arguments(
            accelerator=chosen, memory_bytes=memory_bytes, balloon=balloon
        )
        started = time.perf_counter()
        self = cls(RunDirectory(), started, name="template")
        complete = False
        try:
            content = os.memfd_create("pagekit-guest", os.MFD_CLOEXEC)
            self._prepared = Prepared(f"/dev/fd/{content}", True, {}, (content,), content)
            os.ftruncate(content, memory_bytes)
            self._described = {
                "qemu": program.path,
                "qemu_version": program.version,
                "accelerator": chosen,
                "arguments": arguments,
                "agent": True,
            }
            boot = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", command_line]
            self.marks.resumed = time.perf_counter()
            self._start(program.path, arguments, boot)
            self._needs_rehearsal = True
            self.guest = self._ready_agent().wait_ready(timeout)
            complete = True
        except AgentError as error:
            hint = self._console_hint()
            raise BootFailed(f"the guest did not boot: {error}", hint=hint) from error
        except Closed as error:
            raise self._not_started("the guest did not boot") from error
        except OSError as error:
            raise BootFailed(f"the guest did not boot: {error}") from error
        finally:
            if not complete:
                self.close()
        return self

    @classmethod
    def fork(
        cls,
        snapshot: Snapshot,
        backing: Backing | None = None,
        *,
        fork_id: str | None = None,
        timeout: float = 60,
    ) -> Qemu:
        """Start a fork of a snapshot; it runs when this returns.

        Args:
            snapshot: what to fork.
            backing: where its memory comes from; a plain private mapping of the snapshot if None.
            fork_id: what to call it; something unique if None.
            timeout: seconds until it must run.

        Raises:
            QemuMissing: the program that made the snapshot is not there.
            BootFailed: QEMU ended, or did not load the snapshot in time.
            SandboxError: what the backing needs could not be had.
        """
        started = time.perf_counter()
        self = cls(RunDirectory(), started, name=fork_id or uuid.uuid4().hex)
        complete = False
        try:
            self.snapshot = snapshot
            self._prepared = (backing or Plain()).prepare(snapshot, self._run.path)
            with snapshot.state.open("rb") as state:
                loading = ("migrate-incoming", {"uri": f"fd:{state.fileno()}"})
                self._start(
                    snapshot.qemu,
                    snapshot.arguments,
                    ["-incoming", "defer"],
                    fds=[state.fileno()],
                    posted=[
                        ("migrate-set-capabilities", {"capabilities": capabilities(CAPABILITIES)}),
                        loading,
                    ],
                )
            assert self._qmp is not None
            self._qmp.wait_event(
                "MIGRATION", lambda data: data["status"] in ("completed", "failed"), timeout=timeout
            )
            self.marks.resumed = time.perf_counter()
            self._qmp.execute("cont")
            complete = True
        except QmpError as error:
            if error.closed:
                raise self._not_started("a fork did not start") from error
            raise BootFailed(f"a fork did not start: {error}", hint=error.hint) from error
        except FileNotFoundError as error:
            if error.filename != snapshot.qemu:
                raise SnapshotError(f"cannot read {error.filename}: it is gone") from error
            find_qemu(snapshot.qemu)  # says what to do about it
            raise BootFailed(f"cannot start {snapshot.qemu}: {error}") from error
        except OSError as error:
            raise BootFailed(f"cannot start a fork of {snapshot.directory}: {error}") from error
        finally:
            if not complete:
                self.close()
        return self

    # ------------------------------------------------------------------------------------ using it

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._alive().pid

    def exec(self, code: str, *, timeout: float = 60) -> Answer:
        """Run Python code in the guest and wait for the answer.

        Variables live on in the guest from one call to the next. The first call after a fork was
        started makes the guest different from its siblings before the code runs: clock, random
        numbers, fork id.

        Args:
            code: statements; what they assign to ``result`` and print comes back.
            timeout: seconds to wait for the answer.

        Raises:
            CodeError: the code raised.
            AgentError: no answer in time, or not one to this request. A later call may work.
            ForkDied: QEMU ended, or there is no guest any more.
        """
        agent = self._ready_agent()
        try:
            answer = agent.ask(code, timeout)
        except Closed:
            raise self._ended() from None
        except AgentError as error:
            error.hint = error.hint or self._console_hint()
            raise
        if self.marks.answered is None:
            self.marks.answered = time.perf_counter()
        return answer

    def freeze(self, directory: str | os.PathLike[str]) -> Snapshot:
        """Save this guest, as it is now, as a snapshot. It runs on afterwards, as one more fork.

        Args:
            directory: the snapshot's place, which must not exist yet, or be empty.

        Raises:
            UsageError: there is something in that place.
            SnapshotError: it is a fork that shares memory with others, or saving failed.
        """
        self._alive()
        if self._prepared is None or not self._prepared.share or self._prepared.content is None:
            raise SnapshotError(
                f"{self.fork_id} cannot be frozen: part of its memory is that of a template",
                hint="freeze a guest that was booted cold, or forked with the eager backing",
            )
        assert self._qmp is not None and self._agent is not None
        if self._needs_rehearsal:
            try:
                self._agent.rehearse(_REHEARSAL_TIMEOUT)
            except Closed:
                raise self._ended() from None
            self._needs_rehearsal = False
        snapshot = freeze(self._qmp, self._prepared.content, directory, **self._description())
        self._agent.needs_identity = True  # the state of its random generators is in the snapshot
        return snapshot

    def memory(self) -> ProcessMemory:
        """Return what this sandbox keeps in memory for itself alone.

        Raises:
            ForkDied: QEMU ended.
        """
        size = self.snapshot.memory_bytes if self.snapshot else 0
        base = self._guest_base()
        assert self._prepared is not None
        content = self._prepared.content
        if content is not None:
            found = os.fstat(content)
            size = found.st_size
        try:
            memory = process_memory(self.pid, base, size)
        except OSError:
            raise self._ended() from None
        if content is not None:
            return ProcessMemory(found.st_blocks // 2, memory.vmm_kib)
        return memory

    def translated_blocks(self) -> int:
        """Return how many basic blocks of the guest's code QEMU has translated; 0 with KVM.

        Raises:
            ForkDied: QEMU ended.
        """
        try:
            said = self.monitor("human-monitor-command", command_line="info jit")
        except SandboxError as error:
            if isinstance(error, ForkDied):
                raise
            return 0
        found = re.search(r"TB count +(\d+)", said)
        return int(found[1]) if found else 0

    def monitor(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return what it returned, for what has no method here.

        Args:
            command: its name.
            arguments: as QMP has them; an underscore stands for the hyphen in their names.

        Raises:
            SandboxError: QEMU refused it.
            ForkDied: QEMU ended.
        """
        self._alive()
        assert self._qmp is not None
        try:
            return self._qmp.execute(command, **arguments)
        except QmpError as error:
            if error.closed:
                raise self._ended() from error
            raise SandboxError(str(error), hint=error.hint) from error

    def end(self) -> None:
        """Have QEMU killed, without waiting for it, and from any thread. Close it afterwards."""
        if self._child is not None:
            self._child.send(signal.SIGKILL)

    def close(self) -> None:
        """End the guest, at once, and remove what was made for it. May be called twice."""
        if self._child is not None:
            self._child.kill()
        for end in (self._qmp, self._agent):
            if end is not None:
                end.close()
        if self._prepared is not None:
            for fd in self._prepared.fds:
                os.close(fd)
            self._prepared = None
        self._run.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- parts

    def _start(
        self,
        program: str,
        arguments: Sequence[str],
        more: Sequence[str],
        *,
        fds: Sequence[int] = (),
        posted: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """Start QEMU with its ends of the monitor and of the agent's channel."""
        assert self._prepared is not None
        monitor, its_monitor = socket.socketpair()
        agent, its_agent = socket.socketpair()
        self._agent = Agent(Channel(agent), self.fork_id)
        self._qmp = Qmp(Channel(monitor))
        with its_monitor, its_agent:
            for command, given in posted:
                self._qmp.post(command, **given)
            values = {
                "memory": self._prepared.path,
                "share": "on" if self._prepared.share else "off",
                "qmp": str(its_monitor.fileno()),
                "agent": str(its_agent.fileno()),
                "console": str(self._run.path / "console"),
            }
            self._child = Child(
                [program, *machine.fill(arguments, values), *more],
                environment=self._prepared.environment,
                fds=[its_monitor.fileno(), its_agent.fileno(), *self._prepared.fds, *fds],
                log=self._run.path / "stderr",
            )

    def _description(self) -> dict[str, Any]:
        if self.snapshot is None:
            return self._described
        names = ("qemu", "qemu_version", "accelerator", "arguments", "agent")
        return {name: getattr(self.snapshot, name) for name in names}

    def _guest_base(self) -> int:
        """Where the guest's RAM begins in QEMU's address space."""
        said = self.monitor("human-monitor-command", command_line="gpa2hva 0")
        found = re.search(r"is (0x[0-9a-f]+)", said)
        if not found:
            raise SandboxError(f"QEMU does not tell where the guest's memory is: {said.strip()}")
        return int(found[1], 16)

    def _ready_agent(self) -> Agent:
        self._alive()
        if self.snapshot is not None and not self.snapshot.agent:
            raise AgentError(
                f"no agent runs in the guest that was frozen as {self.snapshot.directory}",
                hint="the guest that `pagekit demo` boots has one; see pagekit.sandbox.guest",
            )
        assert self._agent is not None
        return self._agent

    def _alive(self) -> Child:
        if self._child is None or self._prepared is None:
            raise ForkDied(f"{self.fork_id} is closed")
        return self._child

    def _not_started(self, what: str) -> BootFailed:
        died = self._ended()
        return BootFailed(f"{what}: {died}", hint=died.hint)

    def _ended(self) -> ForkDied:
        """Say why QEMU is no longer there; it has closed its end of a channel."""
        child = self._alive()
        status, said = child.wait(2.0), child.log()
        last = said.splitlines()[-1] if said else ""
        hint = None
        if status is None:
            why = "QEMU closed its channels, but runs on"
        elif status == _SERVER_GONE:
            why = "its pagekit server went away"
            hint = "forks cannot outlive the server of their memory: start it again, and new forks"
        elif status < 0:
            why = f"QEMU was killed by signal {-status}"
            hint = {
                9: "the host may have run out of memory: see the kernel's log",
                7: "a page of its memory could not be provided",
            }.get(-status)
        elif status == 0:
            why = "the guest shut down"
            hint = self._console_hint()
        else:
            why = f"QEMU ended with status {status}"
        message = f"{self.fork_id} died: {why}" + (f": {last}" if last else "")
        return ForkDied(message, hint=hint, status=status, log=said)

    def _console_hint(self) -> str | None:
        """The last line on the guest's console, if any."""
        with contextlib.suppress(OSError):
            lines = (self._run.path / "console").read_text(errors="replace").split("\n")
            for line in reversed(lines):
                if line.strip():
                    return f"the guest's console ends with: {line.strip()[:200]}"
        return None


def _existing(file: str | os.PathLike[str], what: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise GuestMissing(
            f"no {what} at {path}",
            hint="`python -m pagekit.sandbox.guest` makes both, and says where they are",
        )
    return path
