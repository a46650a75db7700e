"""Worker processes of the dumps: results in order, bounded look-ahead, and an end that leaves nothing behind."""
import contextlib
import functools
import itertools
import os
import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dump.shards import deal, under_torchrun
from tools.cli import InputError, reason
from tools.features import FEATURE_TYPES, build_extractor
from tools.processes import WorkerPool
from tools.records import Field, read_record


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


@functools.lru_cache(maxsize=1)
def _extractor(feature_type, settings):
    return build_extractor(feature_type, **dict(settings))


def extractor(feature_type: str, settings: dict, device: str = "auto"):
    """The extractor with these settings, built once per process.

    device: for networks only; `auto` is a GPU if there is one, under torchrun the one for this process.
    """
    if FEATURE_TYPES[feature_type].weights_file:
        if device == "auto" and under_torchrun():
            from tools.distributed import choose_devices

            devices = choose_devices([])
            device = str(devices[int(os.environ["LOCAL_RANK"]) % len(devices)])
        settings = {**settings, "device": device}
    return _extractor(feature_type, tuple(sorted(settings.items())))


def weights_of(feature_type: str, settings: dict, device: str = "auto") -> dict:
    """What features depend on besides the settings, for a manifest: {"weights": hash} of a network, else {}."""
    if not FEATURE_TYPES[feature_type].weights_file:
        return {}
    return {"weights": extractor(feature_type, settings, device).weights_hash}


def is_whole(path: Path, fields: dict[str, Field], **lengths: int) -> bool:
    """Whether a record that `read_record` takes is there; one that is torn is removed, to be made again."""
    if not path.exists():
        return False
    try:
        read_record(path, fields, mmap=True, **lengths)
        return True
    except InputError:
        path.unlink()
        return False


def check_name(path: Path) -> Path:
    """`path`, a file that is named after one in data; InputError if file systems do not allow such a name."""
    if len(os.fsencode(path.name)) > 255 or len(os.fsencode(path)) > 4000:
        raise InputError("its name is too long for the file of its features: give the image a shorter one")
    return path


@contextlib.contextmanager
def _one_thread(recipe):
    """A network on the CPU rounds in another way for each number of threads: it gets one, wherever it is."""
    if not FEATURE_TYPES[recipe[0]].weights_file:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attempt(function, *arguments):
    """What the function returns, or, as a string, why this item is skipped: the boundary around each image."""
    try:
        return function(*arguments)
    except Exception as error:
        return reason(error)


def _extract_and_finish(load, finish, recipe, task):
    loaded = load(task)
    with _one_thread(recipe):
        features = extractor(*recipe)(loaded[0])
    return finish(task, loaded, features)


def batches_of(tasks: list, recipe: tuple, size, shard: tuple[int, int] | None = None) -> list[list]:
    """Tasks of one image each -> lists of those whose features are extracted together, of a shard or all.

    recipe: arguments of `extractor`. size: task -> (w, h) of its image, or None where that is unknown. On a GPU a batch
    has images of one size, and no more than Spp.batch_pixels if it has several; elsewhere it is one image. A batch has
    the same images whatever is done of them: this is why neither an interruption nor the number of shards changes a bit
    of the result.
    """
    pixels = extractor(*recipe).batch_pixels
    if not pixels:
        return deal(([task] for task in tasks), shard)
    by_size = {}
    for task in tasks:
        by_size.setdefault(size(task), []).append(task)
    batches = []
    for of_size, same in by_size.items():
        n = max(1, pixels // (of_size[0] * of_size[1])) if of_size else 1
        batches += [same[k:k + n] for k in range(0, len(same), n)]
    return deal(batches, shard)


def _extract_batch(network, images):
    # a header may promise another size than the image has
    if len({image.shape for image in images}) == 1 and len(images) > 1:
        return network.extract_batch(images)
    return [network(image) for image in images]


def each_image(pool, workers: int, recipe: tuple, batches: list[list], is_done, load, finish):
    """Extract features: yield (task, what became of it) for each task that is not done.

    batches: as from batches_of. load: task -> (image (H, W) uint8, ...). finish: (task, loaded, Features) -> what
    became of it. Where one of them raises an error, what became of it is the reason, a string.

    On the CPU the worker processes do all that. A network on a GPU stays in this process, and threads read ahead for
    it; a batch that is done in part is extracted as a whole once more.
    """
    network = extractor(*recipe)
    batches = [[(task, is_done(task)) for task in batch] for batch in batches]
    batches = [batch for batch in batches if not all(done for _, done in batch)]
    tasks = [task for batch in batches for task, _ in batch]
    if not network.batch_pixels:
        work = functools.partial(_attempt, _extract_and_finish, load, finish, recipe)
        yield from zip(tasks, in_order(pool, work, tasks, ahead=2 * workers))
        return
    readers = ThreadPoolExecutor(workers)
    try:
        images = in_order(readers, functools.partial(_attempt, load), tasks,
                          ahead=2 * workers + max(map(len, batches), default=0))
        for batch in batches:
            loaded = list(itertools.islice(images, len(batch)))
            found = iter(_extract_batch(network, [content[0] for content in loaded if not isinstance(content, str)]))
            for (task, done), content in zip(batch, loaded):
                features = None if isinstance(content, str) else next(found)
                if not done:
                    yield task, content if features is None else _attempt(finish, task, content, features)
    finally:
        readers.shutdown(cancel_futures=True)


def stop_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: temporary files go, the exit status is 130."""
    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # a shell starts what it runs in the background with SIGINT ignored
