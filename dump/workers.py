"""Work shared among processes, and among machines (--shard I/N, or torchrun's processes); the loop over scenes."""
import os
import re
import time
from pathlib import Path

from tools.cli import InputError, reason
from tools.locks import locked


def add_scene_shard(parser) -> None:
    parser.add_argument("--shard", metavar="I/N", help="just the scenes I, I+N, I+2N, ..., I = 0 .. N-1, one shard a "
                                                       "machine; under torchrun each process takes its own")


def under_torchrun() -> bool:
    """Whether this process is one of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`I/N` -> (I, N), I = 0 .. N-1; without text this process's place under torchrun, or None for all of the work."""
    if text is None:
        return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if under_torchrun() else None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {text}: expected I/N, where I is a number from 0 to N-1")
    return int(match[1]), int(match[2])


def deal(items, shard: tuple[int, int] | None) -> list:
    """The items of shard (i, n): every n-th from the i-th on; all without a shard."""
    index, n = shard or (0, 1)
    return list(items)[index::n]


def run_scenes(scenes, folder, process, busy: str = "another process writes",
                   remedy: str = "wait for it, or give each its own --shard") -> tuple[dict, list]:
    """Call process(scene) for each scene, with its lock in the folder: {scene: result}, [(scene, why it is skipped)].

    busy, remedy: for the message of InUse if another process holds a lock.
    """
    results, skipped = {}, []
    for scene in scenes:
        try:
            with locked(Path(folder) / f".{scene}.lock", f"{busy} scene {scene} of {folder}: {remedy}"):
                results[scene] = process(scene)
        except Exception as error:
            skipped.append((scene, reason(error)))
    return results, skipped


def wait_for_all(point: str) -> None:
    """Under torchrun, return when all its processes have come to this point; elsewhere, at once.

    They must end together: torchrun kills the others when one ends with status 1, because something was skipped.
    """
    if not under_torchrun():
        return
    from torch.distributed import rendezvous  # here, not above: it takes seconds to load

    store, _, world_size = next(rendezvous("env://"))
    store.add(point, 1)
    while store.add(point, 0) < world_size:
        time.sleep(0.5)


def available_cores() -> int:
    """Cores that this process may use; under torchrun, its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"] if under_torchrun() else 1))
