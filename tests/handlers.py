"""Handlers that tests run in another process, where they are imported by name."""

from __future__ import annotations

import os
import signal
import threading

from support import page_content

from pagekit import errors, uffd


def fill(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    """Every page gets the content that stands for its number."""
    for event in faults:
        assert isinstance(event, uffd.Fault), event
        range = next(range for range in ranges if event.address in range)
        page = event.address // uffd.PAGE_SIZE * uffd.PAGE_SIZE
        try:
            faults.copy(page, page_content((page - range.start) // uffd.PAGE_SIZE))
        except errors.Exists:
            faults.wake(page, uffd.PAGE_SIZE)


def fill_from(first: int, faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    """With another content, for partial functions."""
    for event in faults:
        assert isinstance(event, uffd.Fault), event
        number = ranges[0].offset(event.address) // uffd.PAGE_SIZE
        faults.copy(event.address, page_content(first + number))


class Odd(Exception):
    """An error that is made of two things, and cannot be made again from what it says."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_known(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    next(iter(faults))
    raise LookupError("no such page")


def raise_odd(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    next(iter(faults))
    raise Odd("no", "page")


def die(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    next(iter(faults))
    os.kill(os.getpid(), signal.SIGKILL)


def return_early(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    next(iter(faults))


def never_return(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    threading.Event().wait()
