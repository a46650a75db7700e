"""Worker processes of the dumps: results in order, bounded look-ahead, and an end that leaves nothing behind."""
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2

from tools.cli import InputError
from tools.features import build_extractor


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_with_parent():
    # a killed parent closes no queue: without this its workers would wait for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _start_worker():
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    threading.Thread(target=_exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def worker_pool(workers: int):
    """A pool of `workers` processes, or None for one: then the work is done in the calling process.

    When the block is left early, what has been started is finished and the rest is dropped. Raises InputError if a
    worker was killed from outside.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if workers == 1:
        yield None
        return
    # spawned, not forked: the parent may hold threads of OpenCV or a GPU
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(f"a worker was killed (out of memory?): run again, with fewer --workers than {workers}; "
                         "what is done is kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool, function, tasks, ahead: int):
    """Yield function(task) for each task, in order, computed in `pool` at most `ahead` tasks ahead of the reader.

    The bound is what keeps memory bounded: at most `ahead` tasks and results are alive. Without a pool it is map().
    """
    if pool is None:
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    waiting = deque(pool.submit(function, task) for task in itertools.islice(tasks, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


@functools.lru_cache(maxsize=1)
def _extractor(feature_type, settings):
    return build_extractor(feature_type, **dict(settings))


def extractor(feature_type: str, settings: dict, device: str = "auto"):
    """The extractor with these settings, built once per process; `device` is for networks only."""
    on_device = {} if feature_type == "sift" else {"device": device}
    return _extractor(feature_type, tuple(sorted({**settings, **on_device}.items())))


def _load_and_finish(load, finish, task):
    return finish(task, load(task))


def each_image(pool, workers: int, feature_type: str, load, finish, tasks):
    """Yield finish(task, load(task)) for each task, in order: `load` reads files, `finish` extracts and writes.

    sift does both in the worker processes. A network stays in this process, where the GPU and torch's threads are,
    and threads read ahead for it.
    """
    if feature_type == "sift":
        yield from in_order(pool, functools.partial(_load_and_finish, load, finish), tasks, ahead=2 * workers)
        return
    tasks = list(tasks)
    readers = ThreadPoolExecutor(workers)
    try:
        for task, loaded in zip(tasks, in_order(readers, load, tasks, ahead=2 * workers)):
            yield finish(task, loaded)
    finally:
        readers.shutdown(cancel_futures=True)


def stop_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: temporary files go, the exit status is 130."""
    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # a shell starts what it runs in the background with SIGINT ignored
