"""Worker processes: results in order, bounded look-ahead, and an end that leaves nothing behind."""
import contextlib
import itertools
import os
import signal
from collections import deque
from concurrent.futures.process import BrokenProcessPool

from dump.shards import under_torchrun
from tools.cli import InputError
from tools.processes import WorkerPool


def available_cores() -> int:
    """Cores that this process may use; under torchrun, its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"] if under_torchrun() else 1))


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
    pool = WorkerPool(workers)
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


def stop_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: temporary files go, the exit status is 130."""
    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # a shell starts what it runs in the background with SIGINT ignored
