"""A dictionary of words, sorted, one a line, looked up in place: without reading most of it.

Usage: python examples/dictionary.py
"""

from __future__ import annotations

import itertools
import tempfile

import pagekit

PAGE = 4096
LONGEST = 16


def words() -> list[bytes]:
    """About ten MiB of words, in order."""
    consonants, vowels = b"bcdfghjklmnprstvwz", b"aeiou"
    syllables = [bytes(pair) for pair in itertools.product(consonants, vowels)]
    return [b"".join(parts) + b"\n" for parts in itertools.product(syllables, repeat=3)] + [
        b"".join(parts) + b"na\n" for parts in itertools.product(syllables, repeat=3)
    ]


def contains(dictionary: memoryview, word: bytes) -> bool:
    """Whether ``word`` is one of the lines: halves what is left until nothing is."""
    low, high = 0, len(dictionary)
    while low < high:
        middle = (low + high) // 2
        before = bytes(dictionary[max(0, middle - LONGEST) : middle])
        start = middle - len(before) + before.rfind(b"\n") + 1
        line, _, _ = bytes(dictionary[start : start + LONGEST]).partition(b"\n")
        if line == word:
            return True
        if not line or line > word:  # empty lines at the end fill the last page
            high = start
        else:
            low = start + len(line) + 1
    return False


def main() -> None:
    lines = sorted(words())
    with tempfile.NamedTemporaryFile() as file:
        text = b"".join(lines)
        file.write(text.ljust(-(-len(text) // PAGE) * PAGE, b"\n"))
        file.flush()
        with pagekit.map(f"file:{file.name}") as memory, memoryview(memory) as dictionary:
            for word in (b"banana", b"tomato", b"vanilla", b"kiwi", b"zuzuzuna"):
                found = contains(dictionary, word)
                assert found == (word + b"\n" in lines)
                print(f"{word.decode()}: {'yes' if found else 'no'}")
            read = memory.statistics()["template"]["bytes_read"]
            print(f"dictionary: {len(lines)} words, {len(memory) >> 20} MiB")
            print(f"read: {read // PAGE} of {len(memory) // PAGE} pages")


if __name__ == "__main__":
    main()
