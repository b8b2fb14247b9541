"""Memory whose pages a function makes when they are touched: here, a table of square numbers.

The function runs in a process of its own, which imports this file: so it needs a name that can be
imported, and the program a guard.

Usage: python examples/computed_pages.py
"""

from __future__ import annotations

import numpy

import pagekit

SIZE = 1 << 40  # bytes: nobody has so much memory, and nobody needs it
PER_PAGE = 4096 // 8  # numbers


def squares(offset: int, length: int) -> numpy.ndarray:
    """The pages from ``offset`` on: what is in a page is a function of its number."""
    first = offset // 8
    if first >= 1 << 32:
        raise OverflowError("such a square has more than 64 bits")
    return numpy.arange(first, first + length // 8, dtype="u8") ** 2


def main() -> None:
    with pagekit.map(f"python:computed_pages:squares:{SIZE}") as memory:
        table = numpy.frombuffer(memory, dtype="u8")
        for number in (3, 1_000_003, 4_000_000_007):
            assert table[number] == number**2
            print(f"{number} squared is {table[number]}")
        print(f"table: {len(table)} numbers, {SIZE >> 30} GiB")
        made = memory.statistics()["template"]["bytes_read"]
        print(f"made: {made // 4096} of {SIZE // 4096} pages")
        try:
            memory[8 << 32]
        except pagekit.errors.CallbackError as error:
            print(f"{type(error.__cause__).__name__}: {error.__cause__}")


if __name__ == "__main__":
    main()
