# What every Python target begins with: it maps a file as any program would, through libc.
import ctypes
import os
import signal
import sys

PAGE = 4096
STUB, REFERENCE, *ARGUMENTS = sys.argv[1:]
with open(REFERENCE, "rb") as file:  # noqa: PTH123
    CONTENT = file.read()
PAGES = len(CONTENT) // PAGE
READ, WRITE = 1, 2
SHARED, PRIVATE, FIXED, ANONYMOUS, LOCKED, POPULATE = 1, 2, 0x10, 0x20, 0x2000, 0x8000
DONTNEED, REMOVE, FREE, DONTFORK, DOFORK, HUGEPAGE = 4, 9, 8, 10, 11, 14
PUNCH = 1 | 2
FAILED = ctypes.c_void_p(-1).value
ZEROS = bytes(PAGE)

_size, _int, _pointer, _offset = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes, libc.mmap.restype = [_pointer, _size, _int, _int, _int, _offset], _pointer
libc.mremap.argtypes, libc.mremap.restype = [_pointer, _size, _size, _int, _pointer], _pointer
libc.munmap.argtypes = [_pointer, _size]
libc.madvise.argtypes = libc.mprotect.argtypes = [_pointer, _size, _int]
libc.fallocate.argtypes = [_int, _int, _offset, _offset]


def say(*words):
    print(*words, flush=True)


def map_file(pages=None, offset=0, flags=PRIVATE, protection=READ | WRITE, at=None, path=STUB):
    """Maps pages of the file; the address, or raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    length = (PAGES - offset if pages is None else pages) * PAGE
    start = libc.mmap(at, length, protection, flags, descriptor, offset * PAGE)
    os.close(descriptor)
    if start == FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return start


def call(function, *arguments):
    """Calls a function of libc that answers 0."""
    if function(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def page(start, number):
    return ctypes.string_at(start + number * PAGE, PAGE)


def expected(number):
    return CONTENT[number * PAGE : (number + 1) * PAGE]


def check(start, numbers, offset=0):
    """Every byte of these pages is what the file has there."""
    for number in numbers:
        assert page(start, number) == expected(number + offset), f"page {number} is wrong"


def put(start, number, text):
    ctypes.memmove(start + number * PAGE, text, len(text))


def punch(first, pages):
    descriptor = os.open(STUB, os.O_RDWR)
    call(libc.fallocate, descriptor, PUNCH, first * PAGE, pages * PAGE)
    os.close(descriptor)


def live_on():
    """Says so, and lives until it is ended from outside."""
    say("ready")
    while True:
        signal.pause()


def wait_for(child):
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a child ended with {os.waitstatus_to_exitcode(status)}"


def in_child(work):
    """Forks, and does something in the child, which must succeed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
        finally:
            os._exit(status)
    return child
