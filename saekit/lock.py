"""A lock on a directory that is being written. It ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from saekit.errors import UsageError
from saekit.files import disk_errors

fcntl: Any
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot lock


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path` in the block; it is there only as long as it is held, or after a kill.

    wait: until another process lets it go; otherwise UsageError, which names that process. Where there are no locks, and
    where this process cannot write, it does without.
    """
    if fcntl is None or not os.access(path.parent, os.W_OK):
        yield
        return
    with disk_errors(path):
        file = _acquired(path, wait)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquired(path: Path, wait: bool) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise UsageError(_in_use(path.parent, file.read().strip())) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        if _is_at(path, file.fileno()):
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # whoever held it removed it meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(directory: Path, holder: str) -> str:
    who = f"process {holder}" if holder else "another process"
    return f"{directory}: is in use by {who}, which writes there. Wait until it has ended, or end it; or choose another directory."
