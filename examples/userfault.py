"""A mapping of 64 MiB whose pages are computed when they are touched, by another process.

Needs no privilege: only the program itself touches the memory, never a system call on its behalf.
"""

import mmap

from pagekit import uffd

PAGE = uffd.PAGE_SIZE


def compute(faults: uffd.Userfaultfd, ranges: tuple[uffd.Range, ...]) -> None:
    """Runs in a process of its own, so it does not matter who holds the GIL here."""
    (memory,) = ranges
    for event in faults:
        if isinstance(event, uffd.Fault):
            number = memory.offset(event.address) // PAGE
            faults.copy(event.address, f"this is page {number}".encode().ljust(PAGE))


def main() -> None:
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with (
        uffd.Userfaultfd(user_mode_only=True) as faults,
        faults.register(memory),
        uffd.handler_process(compute, faults),
    ):
        for number in (0, 7_000, 16_383):
            print(memory[number * PAGE : (number + 1) * PAGE].decode().rstrip())
        pages = uffd.pagemap(memory)
        print(sum(page.present for page in pages), "of", len(pages), "pages are there")


if __name__ == "__main__":
    main()
