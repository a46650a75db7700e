"""Locks on files, held by one process or shared by several; they end with their process, however that ends."""
import contextlib
import errno
import functools
import os
import sys
from pathlib import Path

from tools.cli import InUse

try:
    import fcntl
except ImportError:  # Windows: works without locks
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@functools.cache
def _warn_of_no_locks():
    print("note: this file system has no locks: let no two processes write to one place, other than a dump's shards",
          file=sys.stderr)


def try_lock(file, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file, and say whether that worked; without `wait`, False at once if another process holds it.

    A system or file system without locks gives it to everyone, with a note. The lock ends when the file is closed.
    """
    if fcntl is None:
        _warn_of_no_locks()
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks()
    return True


@contextlib.contextmanager
def locked(path, busy: str | None = None, shared: bool = False):
    """Hold the lock file `path` while the block runs: nobody else does, or, if `shared`, others who share it.

    If somebody does, raise InUse with the message `busy`; without one, wait. The lock goes with its process, however
    that ends; the file goes when the block ends, or when the next one does if a process was killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a"))
            if not try_lock(file, shared, wait=not busy):
                raise InUse(busy)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            stack.close()  # its holder removed it meanwhile: what was locked is no longer the file of that name
        try:
            yield
        finally:
            if try_lock(file):  # else others share it, and the last one removes it
                with contextlib.suppress(PermissionError):  # Windows removes no open file
                    path.unlink(missing_ok=True)
