"""Features of many images: on the CPU in worker processes, on a GPU in batches. What is done is not done again.

A recipe here is (feature type, settings, device), the arguments of `extractor`. A task is one image: it has a
`record_path`, where its features go; `image_size()`, (w, h) or None where that is unknown; `load()`, (image, ...);
`finish(loaded, Features)`, which writes the record and returns True, or something else if there is none.
"""
import contextlib
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dump.workers import deal, under_torchrun
from tools.cli import InputError, reason
from tools.features import FEATURE_TYPES, build_extractor
from tools.processes import in_order
from tools.records import Field, read_record


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


def weights_of(recipe: tuple) -> dict:
    """What features depend on besides the settings, for a manifest: {"weights": hash} of a network, else {}."""
    return {"weights": extractor(*recipe).weights_hash} if FEATURE_TYPES[recipe[0]].weights_file else {}


def is_whole(path: Path, fields: dict[str, Field], **lengths: int) -> bool:
    """Whether a record that `read_record` takes is there; one that is torn is removed, to be made again."""
    if not os.path.exists(path):  # unlike Path.exists, it takes a name that is too long
        return False
    try:
        read_record(path, fields, mmap=True, **lengths)
        return True
    except InputError:
        path.unlink()
        return False


def check_name(path: Path) -> None:
    """InputError if file systems do not allow the name of `path`, a file that is named after one in data."""
    if len(os.fsencode(path.name)) > 255 or len(os.fsencode(path)) > 4000:
        raise InputError("its name is too long for the file of its features: give the image a shorter one")


def _attempt(function, *arguments):
    """What the function returns, or, as a string, why this item is skipped: the boundary around each image."""
    try:
        return function(*arguments)
    except Exception as error:
        return reason(error)


def _extract_and_finish(recipe, task):
    loaded, threads = task.load(), contextlib.nullcontext()
    if FEATURE_TYPES[recipe[0]].weights_file:
        from tools.distributed import one_thread  # here, not above: workers that extract sift need no torch

        threads = one_thread()
    with threads:
        features = extractor(*recipe)(loaded[0])
    return task.finish(loaded, features)


def batches_of(tasks: list, recipe: tuple, shard: tuple[int, int] | None = None) -> list[list]:
    """Tasks -> lists of those whose features are extracted together, of a shard or all.

    On a GPU a batch has images of one size, and no more than `batch_pixels` if it has several; elsewhere it is one
    image. A batch has the same images whatever is done of them: this is why neither an interruption nor the number of
    shards changes a bit of the result.
    """
    pixels, by_size, batches = extractor(*recipe).batch_pixels, {}, []
    for task in tasks:
        by_size.setdefault(task.image_size() if pixels else None, []).append(task)
    for size, same in by_size.items():
        n = max(1, pixels // (size[0] * size[1])) if size else 1
        batches += [same[k:k + n] for k in range(0, len(same), n)]
    return deal(batches, shard)


def each_image(batches: list[list], recipe: tuple, is_done, pool, workers: int):
    """Extract features: yield (task, what became of it) for each task of the batches that is not done.

    What became of it is what task.finish returns, or, where it or task.load raises an error, the reason, a string. On
    the CPU the worker processes do all that. A network on a GPU stays in this process, and threads read ahead for it; a
    batch that is done in part is extracted as a whole once more.
    """
    network = extractor(*recipe)
    batches = [batch for batch in batches if not all(map(is_done, batch))]
    tasks = [task for batch in batches for task in batch]
    if not network.batch_pixels:
        work = functools.partial(_attempt, _extract_and_finish, recipe)
        yield from zip(tasks, in_order(pool, work, tasks, ahead=2 * workers))
        return
    readers = ThreadPoolExecutor(workers)
    try:
        images = in_order(readers, lambda task: _attempt(task.load), tasks,
                          ahead=2 * workers + max(map(len, batches), default=0))
        for batch in batches:
            loaded = list(itertools.islice(images, len(batch)))
            readable = [content[0] for content in loaded if not isinstance(content, str)]
            if len({image.shape for image in readable}) == 1:
                found = iter(network.extract_batch(readable))
            else:  # a header may promise another size than the image has
                found = map(network, readable)
            for task, content in zip(batch, loaded):
                features = None if isinstance(content, str) else next(found)
                if not is_done(task):
                    yield task, content if features is None else _attempt(task.finish, content, features)
    finally:
        readers.shutdown(cancel_futures=True)


def extract_missing(tasks: list, recipe: tuple, fields: dict[str, Field], pool, workers: int, shard=None,
                    title: str = "images") -> tuple[dict, int]:
    """Extract the features of the tasks of a shard, or all, whose record is not there or not whole.

    fields: of a record. Returns {record_path of this shard: what became of it, True if it was there}, and how many were
    not there.
    """
    dim, batches = FEATURE_TYPES[recipe[0]].dim, batches_of(tasks, recipe, shard)
    own = [task.record_path for batch in batches for task in batch]
    outcomes = {path: True for path in own if is_whole(path, fields, D=dim)}
    done = set(outcomes)
    results = each_image(batches, recipe, lambda task: task.record_path in done, pool, workers)
    for task, outcome in tqdm(results, title, len(own), initial=len(done), leave=False, disable=None):
        outcomes[task.record_path] = outcome
    return outcomes, len(own) - len(done)
