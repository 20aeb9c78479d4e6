"""The lock of a run's directory: one process at a time writes to it."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

from memopt.training.writing import WriteError

#: The file in a run's directory that names the owner.
LOCK = "memopt.lock"

#: Tells this process from one with the same number.
_TOKEN = secrets.token_hex(8)

#: Seconds between two touches of the file by its owner.
SECONDS_BETWEEN_TOUCHES = 5.0

#: Seconds without a touch after which another host takes the lock over: four touches were missed.
SECONDS_TO_WAIT = 20.0


class Lock:
    """The lock of a directory; belongs to the process that acquires it, and ends with it.

    The file `memopt.lock` names its owner's host and process. On the owner's host the kernel knows
    whether the owner lives (`flock`). From another host, which `flock` need not reach, the file is
    watched: its owner touches it every few seconds, and is taken for dead if it does not. No clocks
    are compared. An owner that ends in order empties the file, so that nobody has to wait.

    Args:
        directory: The directory, which need not exist yet.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> lock = Lock(directory)
        >>> lock.acquire()
        >>> (directory / LOCK).read_text() == json.dumps(_this_process())
        True
        >>> lock.close()
    """

    def __init__(self, directory: Path):
        self._path = directory / LOCK
        self._release: weakref.finalize | None = None

    def acquire(self) -> None:
        """Makes this process the owner, unless it is already; the directory must exist.

        Raises:
            ValueError: Another process that lives is the owner; names it.
            OSError: The file cannot be written.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _flock(descriptor)
            if owner := self._other_owner(locked):
                raise ValueError(
                    f"the run in {str(self._path.parent)!r} is in use by {_name(owner)}: wait for "
                    "its end or stop it first."
                )
            if locked is False and _owner(self._path) == _this_process():  # by another object
                os.close(descriptor)
                return
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        released = threading.Event()
        self._release = weakref.finalize(self, _release, descriptor, self._path, released)
        threading.Thread(target=_touch, args=(self._path, released), daemon=True).start()

    def check(self) -> None:
        """Raises if another process has taken the lock over, after this one was suspended.

        Raises:
            WriteError: Another process is the owner; names it.
        """
        owner = _owner(self._path)
        if self._release and owner and owner != _this_process():
            raise WriteError(
                f"{_name(owner)} has taken over the run in {str(self._path.parent)!r}, since this "
                "process was suspended; this one writes nothing more."
            )

    def close(self) -> None:
        """Releases the lock, if this object has acquired it."""
        if self._release:
            self._release()

    def _other_owner(self, locked: bool | None) -> dict[str, Any] | None:
        """Returns the owner, if it is another process that lives."""
        owner = _owner(self._path)
        if owner == _this_process():
            return None
        if locked is False and owner is None:  # it has not written its name yet
            return _this_process() | {"process": "of unknown number"}
        if locked is None or (owner and owner["kernel"] != _kernel()):
            return owner and self._wait_for_touch(owner)
        return None if locked else owner

    def _wait_for_touch(self, owner: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the owner at the first touch, None if there is none or the lock is released."""
        warnings.warn(
            f"the run in {str(self._path.parent)!r} may be in use by {_name(owner)}: waiting up to "
            f"{SECONDS_TO_WAIT:.0f} seconds for a sign of it.",
            stacklevel=4,
        )
        touched, end = self._path.stat().st_mtime_ns, time.monotonic() + SECONDS_TO_WAIT
        while time.monotonic() < end:
            time.sleep(SECONDS_BETWEEN_TOUCHES / 10)
            now = _owner(self._path)  # opened, so that NFS asks its server for the time of change
            if now != owner or self._path.stat().st_mtime_ns != touched:
                return now
        return None


def _this_process() -> dict[str, Any]:
    """The host and process, and what tells them from others of the same names, as of containers."""
    host, process = socket.gethostname(), os.getpid()
    return {"host": host, "process": process, "kernel": _kernel(), "token": f"{_TOKEN}-{process}"}


def _kernel() -> str:
    """Identifies the running kernel; by the name of its host, if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['process']} on {owner['host']}"


def _flock(descriptor: int) -> bool | None:
    """Locks a file; False if another process has, None if the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(path: Path) -> dict[str, Any] | None:
    """Returns who has written the file, if anybody."""
    try:
        owner = json.loads(path.read_text())
        return {name: owner[name] for name in ("host", "process", "kernel", "token")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _touch(path: Path, released: threading.Event) -> None:
    while not released.wait(SECONDS_BETWEEN_TOUCHES):
        if _owner(path) == _this_process():
            with contextlib.suppress(OSError):
                os.utime(path)


def _release(descriptor: int, path: Path, released: threading.Event) -> None:
    released.set()
    with contextlib.suppress(OSError):
        if _owner(path) == _this_process():
            os.ftruncate(descriptor, 0)
    os.close(descriptor)
