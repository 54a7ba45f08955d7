"""A timer of the C library that ends the process with a status of ours, whoever holds Python's lock.

faulthandler's own timer can end a process only with status 1. On Linux a POSIX timer may call any C
function of one integer in a new thread (SIGEV_THREAD): here `_exit`, with the status as integer.
"""

import ctypes
import sys

CLOCK_MONOTONIC = 1
SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux's 64-bit C libraries: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: the interval, which stays 0, and the time to run; all 0 stops a timer."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ExitTimer:
    """Ends the process with `status`, unless it is set anew or closed before its time."""

    def __init__(self, status: int):
        """Raises OSError where the system has no such timers."""
        self._library = _library()
        exit_function = ctypes.cast(self._library._exit, ctypes.c_void_p)
        event = _Event(value=status, notify=SIGEV_THREAD, function=exit_function)
        self._timer = ctypes.c_void_p()
        if self._library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "no timer could be made")

    def set(self, seconds: float) -> None:
        """Starts the timer, or starts it anew."""
        whole = int(seconds)
        times = _Times(0, 0, whole, max(1, int((seconds - whole) * 1e9)))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """Stops the timer for good."""
        self._library.timer_delete(self._timer)


def _library() -> ctypes.CDLL:
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"no such timers on {sys.platform}")
    for name in (None, "librt.so.1"):  # Of libc itself since glibc 2.34.
        try:
            library = ctypes.CDLL(name, use_errno=True)
            pointer = ctypes.c_void_p
            library.timer_create.argtypes = (ctypes.c_int, pointer, pointer)
            library.timer_settime.argtypes = (pointer, ctypes.c_int, pointer, pointer)
            library.timer_delete.argtypes = (pointer,)
            return library
        except (OSError, AttributeError):
            continue
    raise OSError("the C library has no timer_create")
