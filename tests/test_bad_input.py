"""Whatever is wrong: a clear error that names the thing and the remedy, the exit status of its
class, and nobody else disturbed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import select
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import support
from support import (
    PAGE,
    UNAVAILABLE,
    Client,
    Daemon,
    Memory,
    Nobody,
    Witness,
    need,
    need_userfaultfd,
    program,
    refused,
    start,
    stopping,
)

import pagekit
from pagekit import errors


@pytest.fixture
def memory() -> Iterator[Memory]:
    with support.reachable_directory() as directory:
        yield support.make_memory(directory)


@pytest.fixture
def daemon(memory: Memory) -> Iterator[Daemon]:
    """A server with a target that was there before, and must not notice what the test does."""
    need_userfaultfd()
    with Daemon(memory.spec, memory.path.with_name("socket"), "--backend", "share") as daemon:
        stub = memory.stub("witness")
        with Witness(daemon.environment(stub), memory, stub):
            yield daemon
            # New ones are served as well.
            stub = memory.stub("newcomer")
            command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
            process = start(command, daemon.environment(stub))
            with stopping(process):
                support.ended(process)
        _, err = daemon.stop()
        assert "panic" not in err


# Memory files


def bad_file(memory: Memory, kind: str) -> tuple[str, int, str, type[errors.PagekitError]]:
    """A spec, the status, the words, and the class of its error."""
    path = memory.path.with_name(kind)
    content = {"empty": b"", "unaligned": bytes(PAGE + 100)}.get(kind)
    if content is not None:
        path.write_bytes(content)
    if kind == "directory":
        path.mkdir()
    return {
        "missing": (f"file:{path}", 6, f"{path}: No such file", errors.Missing),
        "empty": (f"file:{path}", 2, f"{path} is empty", errors.UsageError),
        "unaligned": (f"file:{path}", 2, "4196 bytes, which is no whole number", errors.UsageError),
        "directory": (f"file:{path}", 2, f"{path} is no regular file", errors.UsageError),
        "no source": (str(path), 2, f"a plain file is file:{path}", errors.UsageError),
        "no size": ("zero:12", 2, "is no size of whole 4096-byte pages", errors.UsageError),
        "too much": ("zero:70000000G", 3, "cannot", errors.KernelError),
    }[kind]


KINDS = ["missing", "empty", "unaligned", "directory", "no source", "no size", "too much"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_sources(memory: Memory, kind: str) -> None:
    spec, status, words, error_class = bad_file(memory, kind)
    code, err = refused(spec, "--socket", memory.path.with_name("socket"))
    assert code == status and err.startswith("error: ") and words in err, err
    assert "hint: " in err or status in (3, 6)
    with pytest.raises(error_class) as raised:
        pagekit.Template(spec)
    assert raised.value.exit_code == status
    text = f"{raised.value} {raised.value.hint}"
    assert words in text


def test_a_file_that_may_not_be_read(memory: Memory) -> None:
    nobody = Nobody(memory.path.parent)
    memory.path.chmod(0o600)
    arguments = [memory.spec, "--socket", memory.path.with_name("socket")]
    status, err = refused(*arguments, program=nobody.server, **nobody.who)
    assert status == 6 and f"{memory.path}: Permission denied" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "SPEC is missing"),
        (["zero:1M"], "there is no way in"),
        (["zero:1M", "--socket"], "--socket"),
        (["zero:1M", "--socket", "s", "--layer", "cache"], '"cache" names no layer'),
        (["zero:1M", "--socket", "s", "--layer", "delay=soon"], "for example delay=2ms"),
        (["zero:1M", "--socket", "s", "--backend", "magic"], '"magic" names no backend'),
        (["zero:1M", "--socket", "s", "--deadline", "5"], '"5" is no time'),
        (["zero:1M", "--socket", "s", "--mode", "999"], '"999" is no mode'),
        (["zero:1M", "--socket", "s", "--owner", "root"], '"root" is no owner'),
        (["zero:1M", "--socket", "s", "--run"], "--run needs a command"),
        (["zero:1M", "--socket", "s", "--fast"], "--fast"),
    ],
)
def test_bad_options(arguments: list[str], words: str, tmp_path: Path) -> None:
    status, err = refused(*arguments, cwd=tmp_path)
    assert status == 2 and words in err and "hint: " in err, err
    assert not list(tmp_path.iterdir())


# Sockets


def test_a_second_server_on_the_socket(memory: Memory, daemon: Daemon) -> None:
    status, err = refused(memory.spec, "--socket", daemon.socket)
    assert status == 8 and f"another server answers at {daemon.socket}" in err and "hint: " in err
    with (
        pagekit.Template(memory.spec) as template,
        pytest.raises(errors.AddressInUse, match="another server answers"),
    ):
        pagekit.Server(template, daemon.socket)


def test_a_socket_that_was_left_behind_is_replaced(memory: Memory) -> None:
    path = memory.path.with_name("socket")
    with Daemon(memory.spec, path) as daemon:
        daemon.process.kill()
        daemon.process.wait()
    assert path.is_socket()
    with Daemon(memory.spec, path) as daemon:
        daemon.stop()
    assert not path.exists()


def test_a_file_in_place_of_the_socket_is_kept(memory: Memory) -> None:
    path = memory.path.with_name("precious")
    path.write_text("precious")
    status, err = refused(memory.spec, "--socket", path)
    assert status == 2 and f"{path} exists, and is no socket" in err and "hint: " in err
    assert path.read_text() == "precious"


def test_another_kind_of_server_is_kept(memory: Memory) -> None:
    path = memory.path.with_name("stream")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        status, _ = refused(memory.spec, "--socket", path)
        assert status == 8
        assert path.is_socket()


def test_a_path_that_is_too_long(memory: Memory) -> None:
    status, err = refused(memory.spec, "--socket", memory.path.with_name("s" * 120))
    assert status == 2 and "too long for a socket's path" in err and "107 bytes at most" in err


def test_a_directory_that_is_not_there(memory: Memory) -> None:
    path = memory.path.parent / "nowhere" / "socket"
    status, err = refused(memory.spec, "--socket", path)
    assert status == 3 and f"cannot listen at {path}: No such file" in err


# Clients


def test_a_client_that_says_nothing(daemon: Daemon) -> None:
    """It is dropped after a while (longer than this test waits); the others do not notice it."""
    silent = [Client(daemon.socket) for _ in range(50)]
    for client in silent:
        client.socket.close()
    with Client(daemon.socket) as other:
        assert other.attach(PAGE)[0] == Client.OFFER


def test_a_silent_client_is_dropped(memory: Memory) -> None:
    with (
        Daemon(memory.spec, memory.path.with_name("socket")) as daemon,
        Client(daemon.socket) as client,
    ):
        ready, _, _ = select.select([client.socket], [], [], 30)
        assert ready and client.receive()[0] == 0


def test_a_client_that_reads_no_answers(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.socket.setblocking(False)
        attach = struct.pack("=BBQQ", Client.ATTACH, 0, 0, PAGE)
        with suppress(OSError):
            for _ in range(100_000):
                client.send(attach)
        with Client(daemon.socket) as other:
            assert other.attach(PAGE)[0] == Client.OFFER


def test_garbage(daemon: Daemon) -> None:
    for garbage, words in [
        (b"GET / HTTP/1.1\r\n\r\n", b"does not speak pagekit's protocol"),
        (b"pgkt", b"does not speak pagekit's protocol"),
        (b"pgkt\1", b"does not speak pagekit's protocol"),
        (b"pgkt\7\1", b"speaks version 7 of the protocol, this one 1"),
        (b"pgkt\1\1", b"a message of kind 1 is malformed"),
        (b"pgkt\1\1\0" + bytes(15), b"a message of kind 1 is malformed"),
        (b"pgkt\1\1\0" + bytes(17), b"a message of kind 1 is malformed"),
        (b"pgkt\1\x63", b"a message of kind 99 is malformed"),
        (b"pgkt\1\4" + bytes(8), b"that is a message of the server's"),
        (os.urandom(1000), b"does not speak pagekit's protocol"),
    ]:
        with Client(daemon.socket) as client:
            client.send(garbage, head=b"")
            kind, body, _ = client.receive()
            assert kind == Client.REFUSAL and words in body, body
            assert client.receive()[0] == 0, "the connection is over"


def test_a_message_that_is_too_large(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.send(bytes(100_000))
        assert client.receive()[0] == 0


@pytest.mark.parametrize(
    "offset, length",
    [
        (0, 0),
        (1, PAGE),
        (0, 1 << 60),
        (512 * PAGE, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        ((1 << 64) - PAGE, (1 << 64) - 1),
        (0, (1 << 64) - 1),
    ],
)
def test_absurd_attaches(daemon: Daemon, offset: int, length: int) -> None:
    with Client(daemon.socket) as client:
        kind, body, _ = client.attach(length, offset=offset)
        assert kind == Client.REFUSAL and b"is no part of the template's" in body


def userfaultfd(flags: int = os.O_CLOEXEC | os.O_NONBLOCK, *, negotiated: bool = False) -> int:
    """A userfaultfd of this process."""
    descriptor = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        uffd = fcntl.ioctl(descriptor, 0xAA00, flags)
    finally:
        os.close(descriptor)
    if negotiated:
        fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 0, 0))
    return uffd


@contextmanager
def holding(*descriptors: int) -> Iterator[list[int]]:
    try:
        yield list(descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_region_before_its_attach(daemon: Daemon) -> None:
    with Client(daemon.socket) as client, holding(userfaultfd()) as descriptors:
        kind, body, _ = client.region(1 << 40, descriptors)
        assert kind == Client.REFUSAL and body == b"a region came before its attach"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: [], b"exactly one userfaultfd"),
        (lambda: [userfaultfd(), userfaultfd()], b"exactly one userfaultfd"),
        (lambda: [os.open("/dev/null", os.O_RDONLY)], b"is no userfaultfd"),
        (lambda: [os.open(__file__, os.O_RDONLY)], b"is no userfaultfd"),
        (lambda: list(os.pipe())[:1], b"is no userfaultfd"),
        (lambda: [userfaultfd(negotiated=True)], b"negotiated already"),
    ],
    ids=["none", "two", "device", "file", "pipe", "negotiated"],
)
def test_wrong_descriptors(daemon: Daemon, make: Callable[[], list[int]], words: bytes) -> None:
    with Client(daemon.socket) as client, holding(*make()) as descriptors:
        assert client.attach(PAGE, wish=2)[0] == Client.OFFER
        kind, body, _ = client.region(1 << 40, descriptors)
        assert kind == Client.REFUSAL and words in body, body


def test_more_descriptors_than_fit(daemon: Daemon) -> None:
    with Client(daemon.socket) as client, ExitStack() as stack:
        pipes = [os.pipe() for _ in range(20)]
        descriptors = [stack.enter_context(os.fdopen(end)) for pair in pipes for end in pair]
        client.attach(PAGE)
        numbers = [file.fileno() for file in descriptors]
        assert client.region(1 << 40, numbers)[0] == 0


@pytest.mark.parametrize("where", [0x1001, (1 << 64) - PAGE])
def test_regions_that_cannot_be(daemon: Daemon, where: int) -> None:
    with Client(daemon.socket) as client, holding(userfaultfd()) as descriptors:
        client.attach(2 * PAGE)
        kind, body, _ = client.region(where, descriptors)
        assert kind == Client.REFUSAL and b"no region can be at" in body


def test_a_userfaultfd_that_blocks(daemon: Daemon) -> None:
    """Reading it would stop the loop for everybody."""
    with Client(daemon.socket) as client, holding(userfaultfd(os.O_CLOEXEC)) as descriptors:
        client.attach(PAGE, wish=2)
        assert client.region(1 << 40, descriptors)[0] == Client.READY
        assert not os.get_blocking(descriptors[0])


def test_a_child_that_is_nobodys(daemon: Daemon) -> None:
    for target in (0, 1, 12345, (1 << 64) - 1):
        with Client(daemon.socket) as client:
            client.send(struct.pack("=BQ", Client.CHILD, target))
            kind, body, _ = client.receive()
            assert kind == Client.REFUSAL and b"there is no forked target" in body


def test_clients_cannot_write_the_template(memory: Memory, daemon: Daemon) -> None:
    """Not by the descriptor, nor by opening it anew, nor by mapping or sealing."""
    with Client(daemon.socket) as client:
        kind, _, descriptors = client.attach(memory.size)
        assert kind == Client.OFFER
        with holding(*descriptors):
            file = descriptors[0]
            attempts: list[Callable[[], Any]] = [
                lambda: os.write(file, b"x"),
                lambda: os.pwrite(file, b"x", 0),
                lambda: os.ftruncate(file, 0),
                lambda: os.open(f"/proc/self/fd/{file}", os.O_RDWR),
                lambda: mmap.mmap(file, memory.size, mmap.MAP_SHARED, mmap.PROT_WRITE),
                lambda: os.posix_fallocate(file, 0, PAGE),
                lambda: os.fchmod(file, 0o777),
                lambda: os.utime(file),
            ]
            for attempt in attempts:
                with pytest.raises(OSError) as raised:
                    attempt()
                assert raised.value.errno in (
                    *(errno.EBADF, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL),
                )


def test_a_sealed_template_cannot_be_written_either(memory: Memory) -> None:
    nobody = Nobody(memory.path.parent)
    need_userfaultfd()
    memory.path.parent.chmod(0o777)
    options = {"program": nobody.server, **nobody.who}
    with (
        support.sysctl("vm.unprivileged_userfaultfd", "1"),
        Daemon(
            memory.spec, memory.path.with_name("socket"), "--backend", "share", **options
        ) as daemon,
        Client(daemon.socket) as client,
    ):
        _, _, descriptors = client.attach(memory.size)
        with holding(*descriptors):
            file = descriptors[0]
            with pytest.raises(OSError):
                os.pwrite(file, b"x", 0)
            # Whoever opens it anew for writing (as root can) meets the seals.
            with holding(os.open(f"/proc/self/fd/{file}", os.O_RDWR)) as [anew]:
                for attempt in (
                    lambda: os.pwrite(anew, b"x", 0),
                    lambda: os.ftruncate(anew, 0),
                    lambda: mmap.mmap(anew, memory.size, mmap.MAP_SHARED, mmap.PROT_WRITE),
                ):
                    with pytest.raises(OSError):
                        attempt()


def test_a_client_that_reads_holes_is_found_out(memory: Memory) -> None:
    """Reading the descriptor without registering makes zero pages for everybody: nothing that was
    touched by it is served, and the server says why."""
    need_userfaultfd()
    with Daemon(memory.spec, memory.path.with_name("socket"), "--backend", "share") as daemon:
        with Client(daemon.socket) as client:
            _, _, descriptors = client.attach(memory.size)
            with (
                holding(*descriptors),
                mmap.mmap(descriptors[0], memory.size, mmap.MAP_PRIVATE, mmap.PROT_READ) as view,
            ):
                assert view[10 * PAGE] == 0
        stub = memory.stub()
        command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
        process = start(command, daemon.environment(stub))
        with stopping(process):
            _, err = support.ended(process, None)
            assert process.returncode != 0
        statistics, err = daemon.stop()
        assert "page 10 is in the shared file, but was never published" in err
        assert statistics["template"]["damaged"]


# Limits


def test_out_of_descriptors(memory: Memory) -> None:
    """Clients that cannot be taken in wait or fail; who is served is served on, and the server
    recovers."""
    need_userfaultfd()
    prefix = ["prlimit", "--nofile=40"]
    need("prlimit", shutil.which("prlimit"), "no prlimit")
    socket = memory.path.with_name("socket")
    with Daemon(memory.spec, socket, "--backend", "share", prefix=prefix) as daemon:
        stub = memory.stub("witness")
        with Witness(daemon.environment(stub), memory, stub):
            crowd = [Client(daemon.socket) for _ in range(60)]
            for client in crowd:
                client.socket.close()
            with Client(daemon.socket) as client:
                kind, _, descriptors = client.attach(PAGE)
                assert kind == Client.OFFER
                with holding(*descriptors):
                    pass
        daemon.stop()


def test_no_address_space(memory: Memory) -> None:
    need("prlimit", shutil.which("prlimit"), "no prlimit")
    prefix = ["prlimit", f"--as={256 << 20}"]
    status, err = refused("zero:1G", "--socket", memory.path.with_name("socket"), prefix=prefix)
    assert status == 3 and "cannot map the template's file of 1073741824 bytes" in err


@contextmanager
def memory_limit(size: int) -> Iterator[Path]:
    """A memory cgroup, of either version: where to write a process id."""
    support.need_root()
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent = v1 if (v1 / "memory.limit_in_bytes").exists() else v2
    knob = "memory.limit_in_bytes" if parent == v1 else "memory.max"
    group = parent / f"pagekit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / knob).write_text(str(size))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        need("memory cgroup", False, f"no cgroup can be limited here: {error}")
    try:
        yield group / "cgroup.procs"
    finally:

        def removed() -> bool:
            with suppress(OSError):
                group.rmdir()
            return not group.exists()

        support.until(removed, "removing the cgroup")


@pytest.mark.parametrize("backend", ["share", "copy"])
def test_memory_limit(backend: str) -> None:
    """The template's pages are charged to the server. At its limit targets end clearly, by SIGBUS
    or because the server is gone; what they read before was right."""
    need_userfaultfd()
    with support.reachable_directory() as directory, memory_limit(24 << 20) as processes:
        memory = support.make_memory(directory, 16384, [])
        prefix = ["sh", "-c", f'echo $$ > {processes}; exec "$@"', "sh"]
        options = ["--backend", backend, "--deadline", "300ms"]
        socket = directory / "socket"
        with Daemon(memory.spec, socket, *options, prefix=prefix) as daemon:
            stub = memory.stub()
            command = support.target_command("check(map_file(), range(PAGES))", stub, memory)
            process = start(command, daemon.environment(stub))
            with stopping(process):
                _, err = support.ended(process, None)
            if process.returncode == UNAVAILABLE:
                assert "the pagekit server is gone" in err
                daemon.process.wait(support.PATIENCE)
            else:
                assert process.returncode == -7, err
                _, err = daemon.stop()
                assert "charged to the memory limit of this process" in err


# No userfaultfd


def test_a_seccomp_filter_is_named(memory: Memory) -> None:
    """With the capability but not the device, refused by a filter alone."""
    nobody = Nobody(memory.path.parent)
    need("setpriv", shutil.which("setpriv"), "no setpriv")
    memory.path.parent.chmod(0o777)
    who = ["setpriv", f"--reuid={support.NOBODY}", f"--regid={support.NOBODY}", "--clear-groups"]
    capable = [*who, "--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]
    for prefix, error, words in [
        (capable, "EPERM", "a seccomp filter or security module refuses userfaultfd(2)"),
        (capable, "ENOSYS", "a seccomp filter refuses userfaultfd(2)"),
        (who, "EPERM", "the seccomp filter of this process may refuse it too"),
    ]:
        status, err = refused(
            *(memory.spec, "--socket", memory.path.with_name("socket"), "--backend", "share"),
            prefix=[*prefix, program("filter"), error],
            program=nobody.server,
        )
        assert status == 4 and words in err and "hint: " in err, err


def test_too_many_open_files_is_no_lack_of_permission(memory: Memory) -> None:
    """The limit of this very process, reached while a server is wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    with pagekit.Template(memory.spec) as template:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
        try:
            with pytest.raises(errors.KernelError) as raised:
                pagekit.Server(template, memory.path.with_name("socket"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "Too many open files" in str(raised.value)


def test_a_client_of_another_pid_namespace(memory: Memory) -> None:
    """It cannot be watched, so it is not served."""
    support.need_root()
    need_userfaultfd()
    need("unshare", shutil.which("unshare"), "no unshare")
    prefix = ["unshare", "--pid", "--fork", "--kill-child"]
    stub = memory.stub()
    code = """
try:
    map_file()
except OSError:
    say("refused")
"""
    with Daemon(
        memory.spec, memory.path.with_name("socket"), "--backend", "share", prefix=prefix
    ) as daemon:
        process = start(support.target_command(code, stub, memory), daemon.environment(stub))
        with stopping(process):
            out, err = support.ended(process)
            assert out == "refused\n" and "the client is in another pid namespace" in err
