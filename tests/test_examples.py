"""The examples do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import support

EXAMPLES = Path(__file__).parent.parent / "examples"

SAID = {
    "sparse_array": [
        r"array: 4\.0 GiB of float64",
        r"touched: 10486 of 1048576 pages",
        r"resident: (?P<mib>\d+) MiB more than before",
    ],
    "computed_pages": [
        r"3 squared is 9",
        r"1000003 squared is 1000006000009",
        r"4000000007 squared is 16000000056000000049",
        r"table: 137438953472 numbers, 1024 GiB",
        r"made: (?P<pages>\d+) of 268435456 pages",
        r"OverflowError: such a square has more than 64 bits",
    ],
    "dictionary": [
        r"banana: yes",
        r"tomato: yes",
        r"vanilla: no",
        r"kiwi: no",
        r"zuzuzuna: yes",
        r"dictionary: 1458000 words, 11 MiB",
        r"read: (?P<pages>\d+) of 2848 pages",
    ],
    "userfault": [
        r"this is page 0",
        r"this is page 7000",
        r"this is page 16383",
        r"3 of 16384 pages are there",
    ],
}

AT_MOST = {
    # Two pages in a hundred, and what numpy needs to do so.
    "sparse_array": {"mib": 80},
    # Sixteen come at once.
    "computed_pages": {"pages": 3 * 16},
    "dictionary": {"pages": 2848 // 4},
    "userfault": {},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example(name: str) -> None:
    support.need_userfaultfd()
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=support.PATIENCE)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == len(SAID[name]), ended.stdout
    numbers: dict[str, str] = {}
    for line, expected in zip(lines, SAID[name], strict=True):
        found = re.fullmatch(expected, line)
        assert found, f"{line!r} is not {expected!r}"
        numbers |= found.groupdict()
    for what, most in AT_MOST[name].items():
        assert int(numbers[what]) <= most, ended.stdout
