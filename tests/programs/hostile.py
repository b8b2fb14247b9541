# What every client begins with that comes in as Firecracker does, and does something wrong.
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys

PAGE = 4096
SOCKET, SIZE, *ARGUMENTS = sys.argv[1:]
SIZE = int(SIZE)
HUGE = 2 << 20
REMOVE = 1 << 3

_size, _int, _pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes, libc.mmap.restype = (
    [_pointer, _size, _int, _int, _int, ctypes.c_int64],
    _pointer,
)
libc.syscall.restype = ctypes.c_long


def say(*words):
    print(*words, flush=True)


def userfaultfd(features=REMOVE, flags=os.O_CLOEXEC | os.O_NONBLOCK):
    """A userfaultfd; without features it is not initialised."""
    descriptor = libc.syscall(323, flags)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    if features is not None:
        fcntl.ioctl(descriptor, 0xC018AA3F, struct.pack("=QQQ", 0xAA, features, 0))
    return descriptor


def room(size=SIZE):
    """Anonymous memory."""
    start = libc.mmap(None, size, 3, 0x22, -1, 0)
    assert start != _pointer(-1).value
    return start


def register(descriptor, start, size=SIZE):
    fcntl.ioctl(descriptor, 0xC020AA00, struct.pack("=QQQQ", start, size, 1, 0))
    return start


def region(start, size=SIZE, offset=0, **more):
    return {"base_host_virt_addr": start, "size": size, "offset": offset} | (
        more or {"page_size": PAGE, "page_size_kib": PAGE}
    )


def connect():
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(SOCKET)
    return client


def send(client, message, descriptors=()):
    """All of it, the descriptors with the first byte; the server may hang up in the middle."""
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sent = socket.send_fds(client, [text], list(descriptors)) if descriptors else 0
        client.sendall(text[sent:])


def live_on():
    """Lives until it is ended from outside."""
    while True:
        signal.pause()


def until_closed(client):
    """Waits until the server has closed the connection, and says so."""
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    say("closed")
