"""Callbacks of the tests, good and bad: helper processes import this module."""

from __future__ import annotations

import array
import ctypes
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

PAGE = 4096


def page(number: int) -> bytes:
    """What a page holds: a function of its number."""
    return (number + 1).to_bytes(8, "little") * (PAGE // 8)


def numbered(offset: int, length: int) -> bytes:
    first = offset // PAGE
    return b"".join(map(page, range(first, first + length // PAGE)))


class Group:
    @staticmethod
    def numbered(offset: int, length: int) -> memoryview:
        return memoryview(numbered(offset, length))

    def method(self, offset: int, length: int) -> bytes:
        return numbered(offset, length)


def nothing(offset: int, length: int) -> None:
    return None


def buffers(offset: int, length: int) -> Any:
    """Objects of many kinds, all with the right bytes."""
    content = numbered(offset, length)
    kinds = [
        lambda: bytearray(content),
        lambda: array.array("I", content),
        lambda: (ctypes.c_char * length).from_buffer_copy(content),
        lambda: memoryview(content).cast("B", (length // PAGE, PAGE)),
        lambda: memoryview(content[::-1])[::-1],
    ]
    return kinds[offset // PAGE % len(kinds)]()


def about_itself(offset: int, length: int) -> bytes:
    """In every page: its process, that one's parent, and where it finds things."""
    about = [os.getpid(), os.getppid(), sys.path, sys.executable, os.environ.get("PYTHONPATH")]
    return repr(about).encode().ljust(PAGE) * (length // PAGE)


def wrong(offset: int, length: int) -> Any:
    """A page for every thing that is not what was asked for."""
    things = [
        lambda: numbered(offset, length)[1:],
        lambda: numbered(offset, length) + b"x",
        lambda: b"",
        lambda: "text",
        lambda: 17,
        lambda: [1, 2],
        lambda: (number for number in range(3)),
    ]
    return things[offset // PAGE]()


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class Unprintable(Exception):
    def __repr__(self) -> str:
        raise TypeError("no")


def raising(offset: int, length: int) -> bytes:
    """A page for every way to raise; the last is fine."""
    number = offset // PAGE
    if number == 0:
        raise ValueError("no page here", 17)
    if number == 1:
        raise Unpicklable("one", "two")
    if number == 2:
        raise Unprintable
    if number == 3:
        sys.exit(5)
    if number == 4:
        Path("/no/such/file").read_bytes()
    if number == 5:
        try:
            raise KeyError("first")
        except KeyError:
            raise OSError(5, "second \udcff") from None
    return numbered(offset, length)


def announce() -> None:
    """Tells a test, where one wants to know, that a callback is about to hang."""
    if path := os.environ.get("PAGEKIT_TEST_FILE"):
        Path(path).touch()


def hanging(offset: int, length: int) -> bytes:
    """Page 1 never comes."""
    if offset <= PAGE < offset + length:
        announce()
        threading.Event().wait()
    return numbered(offset, length)


def hanging_with_the_gil(offset: int, length: int) -> bytes:
    """Page 1 never comes, and no thread of this process ever runs again."""
    if offset <= PAGE < offset + length:
        announce()
        ctypes.PyDLL(None).pause()
    return numbered(offset, length)


def dying(offset: int, length: int) -> bytes:
    """Page 1 ends the process."""
    if offset <= PAGE < offset + length:
        os._exit(7)
    return numbered(offset, length)


def printing(offset: int, length: int) -> bytes:
    print("said by the callback")
    print(f"it reads {sys.stdin.read()!r}")
    return numbered(offset, length)


def recursive(offset: int, length: int) -> bytes:
    """Opens the source that it serves."""
    import pagekit

    with pagekit.Template("python:callbacks:recursive:64K") as template:
        return template.read(offset, length)


def nested(offset: int, length: int) -> bytes:
    """Opens another source, which is fine."""
    import pagekit

    with pagekit.Template(numbered, size=64 << 10) as template:
        return template.read(offset, length)


def reading_what_it_serves(offset: int, length: int) -> bytes:
    """Reads the file that its own pages are mounted as."""
    with Path(os.environ["PAGEKIT_TEST_FILE"]).open("rb") as file:
        file.seek(offset)
        return file.read(length)


def slow(offset: int, length: int) -> bytes:
    time.sleep(0.005)
    return numbered(offset, length)


def touching(offset: int, length: int) -> bytes:
    """Reads the memory of the process that it serves, at the very place that it is asked for."""
    address = int(Path(os.environ["PAGEKIT_TEST_FILE"]).read_text()) + offset
    page = ctypes.create_string_buffer(length)
    vector = ctypes.c_size_t * 2
    ours, theirs = vector(ctypes.addressof(page), length), vector(address, length)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.process_vm_readv(os.getppid(), ours, 1, theirs, 1, 0) != length:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return page.raw


def peeking(offset: int, length: int) -> bytes:
    """The same, as a debugger does it."""
    address = int(Path(os.environ["PAGEKIT_TEST_FILE"]).read_text()) + offset
    with Path(f"/proc/{os.getppid()}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


def of_the_map_itself(offset: int, length: int) -> bytes:
    """Asks the process that has the map of this function for the very bytes that it is to make."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.environ["PAGEKIT_TEST_MAP"])
        asking.sendall(f"{offset} {length}\n".encode())
        with asking.makefile("rb") as answer:
            return answer.read(length)
