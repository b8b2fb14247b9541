"""An array of 4 GiB of which a program uses one page in a hundred: it pays for those.

Usage: python examples/sparse_array.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy

import pagekit

GIB = 1 << 30
PAGE = 4096
ROW = PAGE // 8  # numbers in a page


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * GIB)  # nothing but a hole
        # Writable: what is written stays in this process, page by page, and the file as it is.
        with pagekit.map(f"file:{file.name}", writable=True) as memory:
            array = numpy.frombuffer(memory, dtype="f8").reshape(-1, ROW)
            before = resident()
            touched = array[::100]
            touched[:, 0] = numpy.arange(len(touched))
            grown = resident() - before
            assert array[100 * 17, 0] == 17 and array[100 * 17 + 1].sum() == 0
            print(f"array: {array.nbytes / GIB:.1f} GiB of {array.dtype}")
            print(f"touched: {len(touched)} of {len(array)} pages")
            print(f"resident: {grown / 2**20:.0f} MiB more than before")


if __name__ == "__main__":
    main()
