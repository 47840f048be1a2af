"""What tcp.py needs of libzmq that pyzmq does not offer: frames that are sent from where they lie.

pyzmq sends a buffer without a copy, too, but hands each such frame to a Python thread of its own
afterwards, so that its object lives until then: a tenth of the time that a slab takes, on a core
that copies. Here a frame is a constant message: libzmq refers to the memory until its bytes have
left, or the context has ended, and tells nobody. Whoever sends must know by other means.

Owns the few calls of libzmq, in the copy that pyzmq has loaded, and the setting of malloc that
frames which are received need.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.backend.cython._zmq as _loaded  # the extension that libzmq is linked with

_MESSAGE_BYTES = 64  # zmq_msg_t, zmq.h


@functools.cache
def _libzmq() -> ctypes.CDLL:
    library = ctypes.CDLL(_loaded.__file__, use_errno=True)  # finds what it is linked with, too
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.zmq_msg_init_data.argtypes = [pointer, pointer, size, pointer, pointer]
    library.zmq_msg_send.argtypes = [pointer, pointer, ctypes.c_int]
    library.zmq_msg_close.argtypes = [pointer]
    return library


def send_in_place(socket: Any, addresses: Sequence[int], length: int) -> None:
    """Send `length` bytes at each address as the last frames of a multipart message.

    Nothing may write there, and the memory must stay, until the peer has received them or the
    socket's context has ended. For the thread that owns the socket, which must have no limit on
    what it queues. Raises `zmq.ZMQError`.
    """
    library, handle = _libzmq(), socket.underlying
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    last = len(addresses) - 1
    for index, address in enumerate(addresses):
        library.zmq_msg_init_data(message, address, length, None, None)
        if library.zmq_msg_send(message, handle, zmq.SNDMORE if index < last else 0) < 0:
            error = ctypes.get_errno()
            library.zmq_msg_close(message)
            raise zmq.ZMQError(error)


@functools.cache
def keep_freed_pages() -> None:
    """Let malloc keep the memory of frames that are copied, for the frames that come next.

    By default it returns what is free at the top of an arena to the system at once, and every slab
    pays again for its page faults: a third of what receiving it costs. What is kept is bounded by
    the window, and by `_KEPT_BYTES` per arena. A C library without `mallopt` has its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)  # setting one ends the automatic choice of both
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 << 20  # the most that M_MMAP_THRESHOLD takes
