"""The match records of a training dump: pairs of keypoint records -> correspondences by depth and pose."""
import functools

import numpy as np
from tqdm import tqdm

from dump.features import is_whole
from tools.cli import InputError
from tools.correspondences import match_by_projection
from tools.manifest import match_path
from tools.processes import in_order
from tools.records import KEYPOINT_FIELDS, MATCH_FIELDS, read_record, write_record

MIN_WITH_DEPTH = 20  # keypoints of an image of a pair: more than that
MIN_MATCHES = 20  # of a pair: more than that
PAIRS_AT_ONCE = 16
VIEWS_KEPT = 256


@functools.lru_cache(maxsize=VIEWS_KEPT)
def read_view(path):
    """(keypoints, depth, K, pose) of a keypoint record, and how many keypoints have depth."""
    record = read_record(path, KEYPOINT_FIELDS, mmap=True)
    view = [np.array(record[name]) for name in ("keypoints", "depth", "intrinsics", "pose")]
    return view, np.count_nonzero(view[1] > 0)


def match_pairs(pairs: list):
    """Pairs of keypoint record paths -> for each the matches (M, 2), or why there are too few, as a string."""
    outcomes = []
    for path0, path1 in pairs:
        (view0, known0), (view1, known1) = read_view(path0), read_view(path1)
        if min(known0, known1) <= MIN_WITH_DEPTH:
            outcomes.append("few_keypoints_with_depth")
            continue
        matches = match_by_projection(*view0, *view1)
        outcomes.append(matches if len(matches) > MIN_MATCHES else "few_matches")
    return outcomes


def match_numbers(save_path, scene: str) -> list[int]:
    """Numbers of a scene's match records that are there, sorted."""
    return sorted(int(path.stem) for path in match_path(save_path, scene, 0).parent.glob("*.npy")
                  if path.stem.isdecimal())


def _resume(save_path, scene: str, pairs: np.ndarray, tasks: dict) -> tuple[int, int]:
    """(number of whole match records from 0 on, index of the pair to try next); those after a gap are removed."""
    numbers, done = match_numbers(save_path, scene), 0
    while done < len(numbers) and numbers[done] == done and is_whole(match_path(save_path, scene, done), MATCH_FIELDS):
        done += 1
    for number in numbers[done:]:
        match_path(save_path, scene, number).unlink(missing_ok=True)
    if not done:
        return 0, 0
    last = match_path(save_path, scene, done - 1)
    record = read_record(last, MATCH_FIELDS)
    names = record["image_path0"], record["image_path1"]
    for k, (i, j) in enumerate(pairs):
        if (tasks[i].image_path, tasks[j].image_path) == names:
            return done, k + 1
    raise InputError(f"{last} holds a pair that this scene does not have: the data changed since it was begun; "
                     f"delete {last.parent} and run again")


def write_matches(save_path, scene: str, pairs, overlap, tasks: dict, pool, workers: int) -> tuple[int, int]:
    """Write the match records of a scene that are missing -> how many there are, and how many pairs were tried now.

    pairs: (P, 2) images, tried in this order, so that the last record says where to resume; overlap: (P,).
    tasks: image -> its ImageTask; each has a keypoint record.
    """
    read_view.cache_clear()
    done, position = _resume(save_path, scene, pairs, tasks)
    starts = range(position, len(pairs), PAIRS_AT_ONCE)
    jobs = ([(tasks[i].record_path, tasks[j].record_path) for i, j in pairs[k:k + PAIRS_AT_ONCE]] for k in starts)
    with tqdm(desc=f"{scene} pairs", total=len(pairs), initial=position, leave=False, disable=None) as progress:
        for k, found in zip(starts, in_order(pool, match_pairs, jobs, ahead=4 * workers)):
            for (i, j), shared, matches in zip(pairs[k:], overlap[k:], found):
                if isinstance(matches, str):
                    continue
                write_record(match_path(save_path, scene, done), {
                    "image_path0": tasks[i].image_path, "image_path1": tasks[j].image_path,
                    "intrinsics0": tasks[i].intrinsics, "intrinsics1": tasks[j].intrinsics,
                    "pose0": tasks[i].pose, "pose1": tasks[j].pose, "matches": matches, "overlap": shared})
                done += 1
            progress.update(len(found))
    return done, len(pairs) - position
