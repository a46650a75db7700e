"""Worker processes that start clean, leave Ctrl-C to their parent, and end with it."""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path

import cv2

from tools.cli import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage
_HAS_MASKS = hasattr(signal, "pthread_sigmask")  # Windows has none, and no resource tracker

def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker() -> None:
    """Make this process a worker: one OpenCV thread, Ctrl-C ignored, and an end when the parent is gone."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    # A killed parent closes no queue: its workers would do what is in it, then wait for ever. It may have been killed
    # before they come to this.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)


def stop_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: temporary files go, the exit status is 130."""
    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # a shell starts what it runs in the background with SIGINT ignored


class WorkerPool(ProcessPoolExecutor):
    """A pool of processes that are spawned, not forked: the parent may hold threads of OpenCV or a GPU."""

    def __init__(self, workers: int):
        super().__init__(workers, multiprocessing.get_context("spawn"), start_worker)
        if _HAS_MASKS:
            resource_tracker.ensure_running()  # starting it would end the blocking below

    def submit(self, *args, **kwargs):
        if not _HAS_MASKS:
            return super().submit(*args, **kwargs)
        # a process may be started here, and Ctrl-C before it comes to start_worker would end it with a traceback
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def worker_pool(workers: int):
    """A pool of `workers` processes, or None for one: then the work is done in the calling process.

    When the block is left early, what has been started is finished and the rest is dropped. Raises InputError if a
    worker was killed from outside.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    pool = WorkerPool(workers) if workers > 1 else None
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(f"a worker was killed (out of memory?): run again, with fewer --workers than {workers}; "
                         "what is done is kept") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def in_order(pool, function, items, ahead: int):
    """Yield function(item) for each item, in order, computed in `pool` at most `ahead` items ahead of the reader.

    The bound keeps memory bounded: at most `ahead` items and results are alive. Without a pool it is map().
    """
    if pool is None:
        yield from map(function, items)
        return
    items = iter(items)
    waiting = deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        for future in waiting:
            future.cancel()


def peak_bytes() -> float | None:
    """Most memory that this process held so far; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        # what getrusage gives counts the process that started this one, up to then
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux
        return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def peak_memory_mb(workers: int) -> float | None:
    """Most memory that this process held so far, plus `workers` times that of the largest process it started.

    Of the latter, those that have ended count. None where the system does not say.
    """
    if resource is None:
        return None
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT
    return (peak_bytes() + workers * child) / 1e6
