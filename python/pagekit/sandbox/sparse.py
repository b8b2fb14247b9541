"""Sparse files: only what is not zero is read, written, or kept."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator

_PAGE = 4096
_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)


def extents(file: int) -> Iterator[tuple[int, int]]:
    """Yield start and end, in bytes, of the parts of ``file`` that are not holes."""
    size = os.fstat(file).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end of the file
                return
            raise
        end = min(os.lseek(file, start, os.SEEK_HOLE), size)
        yield start, end


def copy(source: int, target: int, *, drop_zeros: bool = False) -> int:
    """Copy the content of one file to another, which must be empty; return the bytes written.

    Args:
        source, target: descriptors. Holes stay holes.
        drop_zeros: make holes of pages of zeros too. Costs a look at every page.
    """
    os.ftruncate(target, os.fstat(source).st_size)
    written = 0
    for start, end in extents(source):
        while start < end:
            piece = os.pread(source, min(_PIECE, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            for first, last in _not_zero(piece) if drop_zeros else [(0, len(piece))]:
                _write(target, memoryview(piece)[first:last], start + first)
                written += last - first
            start += len(piece)
    return written


def digest(file: int) -> str:
    """Return the SHA-256 of a file's content, holes included, in hexadecimal."""
    sha = hashlib.sha256()
    position = 0
    for start, end in extents(file):
        _add_zeros(sha, start - position)
        while start < end:
            piece = os.pread(file, min(_PIECE, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            sha.update(piece)
            start += len(piece)
        position = end
    _add_zeros(sha, os.fstat(file).st_size - position)
    return sha.hexdigest()


def _not_zero(piece: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of the runs of pages in ``piece`` that are not all zero."""
    if piece == _ZEROS[: len(piece)]:
        return
    first = None
    for page in range(0, len(piece), _PAGE):
        content = piece[page : page + _PAGE]
        zero = content == _ZEROS[: len(content)]
        if not zero and first is None:
            first = page
        elif zero and first is not None:
            yield first, page
            first = None
    if first is not None:
        yield first, len(piece)


def _write(target: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(target, content, offset)
        content, offset = content[count:], offset + count


def _add_zeros(sha: hashlib._Hash, count: int) -> None:
    while count > 0:
        sha.update(_ZEROS[: min(count, _PIECE)])
        count -= _PIECE
