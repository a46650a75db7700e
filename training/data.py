"""Training samples: from pairs of views, of a dump or made on the fly, to batches.

Every sample is a function of (seed, number of the sample in the run), so a run gives the same samples for any number
of workers and processes, and resumes after a stop from the number alone.
"""
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from nets.layers import normalize_keypoints
from tools.cli import reason
from tools.correspondences import ONLINE_INLIER_TH, match_by_projection, unmatched_by_projection
from tools.features import FEATURE_TYPES
from tools.geometry import colmap_to_opencv_K, essential_matrix, relative_pose, to_camera_coordinates
from tools.manifest import keypoint_path, load_dump, match_path
from tools.processes import start_worker
from tools.records import KEYPOINT_FIELDS, MATCH_FIELDS, check_matches, read_record

# not forked from this process: a copy of one whose threads have run can hang in its first parallel loop
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
MAX_TRIES = 20  # pairs for one sample


@dataclass
class Pair:
    """Two views before keypoints are chosen."""

    name: str  # in messages
    views: list[dict]  # keypoints (N, 2), scores (N,), descriptors (N, D), image_size (w, h), K (3, 3), OpenCV's pixels
    matches: np.ndarray  # (M, 2), the true ones
    T_0to1: np.ndarray | None  # (4, 4); None: unknown
    image_paths: tuple[str, str]  # relative to where the images are
    unmatched: tuple[np.ndarray, np.ndarray] | None = None  # (N,) bool each; None: all that are in none of `matches`


@dataclass(frozen=True)
class Labels:
    """How keypoints with depth are labelled, in pixels.

    A true match lies within inlier_th of where it should be; a keypoint is unmatched if nothing lies within
    outlier_th, and what is between, or has no depth, is left out of samples. outlier_th 0: all else is unmatched.
    """

    inlier_th: float = ONLINE_INLIER_TH
    outlier_th: float = 0.0

    def label(self, camera0: tuple, camera1: tuple) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """matches and unmatched as in `Pair`, of two views; a camera: keypoints, depth (N,), K (COLMAP's), pose."""
        matches = match_by_projection(*camera0, *camera1, self.inlier_th)
        if not self.outlier_th:
            return matches, None
        # the depth of the other view says nothing
        return matches, tuple(unmatched_by_projection(*camera, other[0], *other[2:], self.outlier_th)
                              for camera, other in ((camera0, camera1), (camera1, camera0)))


@dataclass(frozen=True)
class Choice:
    """Which keypoints of a pair make a sample: see `choose_keypoints`; and which pairs do not.

    min_keypoints: of each view; min_matches: of the pair.
    """

    max_keypoints: int = 1024
    min_inliers: int = 32
    max_inliers: int = 512
    random_inliers: bool = True
    min_keypoints: int = 0
    min_matches: int = 0

    def refuses(self, pair: Pair) -> str:
        """Why a pair makes no sample; "" if it does."""
        fewest = min(len(view["scores"]) for view in pair.views)
        if fewest < self.min_keypoints:
            return f"{pair.name} has {fewest} keypoints in a view, {self.min_keypoints} are needed"
        if len(pair.matches) < self.min_matches:
            return f"{pair.name} has {len(pair.matches)} true matches, {self.min_matches} are needed"
        return ""


def choose_keypoints(matches: np.ndarray, n0: int, n1: int, choice: Choice, rng: np.random.Generator,
                     unmatched=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which keypoints of two views make a sample, and where its true matches are.

    matches (M, 2): true matches of views with n0 and n1 keypoints; unmatched as in `Pair`. A number of matches drawn
    from min_inliers .. max_inliers (without random_inliers all; more where unmatched keypoints are few), and unmatched
    keypoints up to max_keypoints, shuffled. Returns chosen0 (N0,), chosen1 (N1,); and target (N0,): the place in
    chosen1 of each of chosen0's match, or -1.
    """
    candidates = (np.arange(n0), np.arange(n1)) if unmatched is None else map(np.flatnonzero, unmatched)
    free0, free1 = (np.setdiff1d(rows, own, assume_unique=True) for rows, own in zip(candidates, matches.T))
    wanted = len(matches)
    if choice.random_inliers:
        wanted = int(rng.integers(choice.min_inliers, choice.max_inliers, endpoint=True))
    needed = choice.max_keypoints - min(len(free0), len(free1))
    n_matches = min(max(wanted, needed), len(matches), choice.max_keypoints)
    kept = matches[rng.permutation(len(matches))[:n_matches]]
    sides, places = [], []
    for own, free in ((kept[:, 0], free0), (kept[:, 1], free1)):
        filled = np.concatenate([own, rng.permutation(free)[:choice.max_keypoints - n_matches]])
        order = rng.permutation(len(filled))
        sides.append(filled[order])
        places.append(np.argsort(order)[:n_matches])  # where the true matches went
    target = np.full(len(sides[0]), -1, np.int64)
    target[places[0]] = places[1]
    return sides[0], sides[1], target


def padded_targets(target: np.ndarray, n1: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """target (N0,): index of the match in view 1 or -1 -> target0, target1 (size,) int64 as `nets.losses.Targets`.

    n1: keypoints of view 1. A keypoint without a match is in the dustbin, `size`; padding, up to size, is -1.
    """
    target0, target1 = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
    matched = np.flatnonzero(target >= 0)
    target0[:len(target)], target1[:n1] = size, size
    target0[matched], target1[target[matched]] = target[matched], matched
    return target0, target1


def _padded(values: np.ndarray, size: int, dtype=np.float32) -> np.ndarray:
    padded = np.zeros((size, *values.shape[1:]), dtype)
    padded[:len(values)] = values
    return padded


def make_sample(views: list[dict], target: np.ndarray, T_0to1: np.ndarray | None, size: int) -> dict:
    """Two views' chosen keypoints -> the dict of arrays that training takes.

    views: as in `Pair`, with at most `size` keypoints; target (N0,): match in view 1 or -1. T_0to1 (4, 4), or None
    where there is no pose: has_pose is then 0. Where a view has fewer than size keypoints, both are padded with zeros,
    and mask0, mask1 (size,) tell which are real. Descriptors stay of the type they are stored in.
    """
    counts = [len(view["scores"]) for view in views]
    sample = dict(zip(("target0", "target1"), padded_targets(target, counts[1], size)))
    for v, view, count in zip("01", views, counts):
        keypoints = np.ascontiguousarray(view["keypoints"], np.float32)
        image_size = np.asarray(view["image_size"], np.float32)
        normalized = normalize_keypoints(torch.from_numpy(keypoints)[None], torch.from_numpy(image_size)[None])[0]
        sample[f"keypoints{v}"] = _padded(keypoints, size)
        sample[f"norm_keypoints{v}"] = _padded(normalized.numpy(), size)
        sample[f"camera_keypoints{v}"] = _padded(to_camera_coordinates(keypoints, view["K"]), size)
        sample[f"scores{v}"] = _padded(view["scores"], size)
        sample[f"descriptors{v}"] = _padded(view["descriptors"], size, view["descriptors"].dtype)
        sample[f"image_size{v}"] = image_size
        sample[f"K{v}"] = np.asarray(view["K"], np.float32)
        if min(counts) < size:
            sample[f"mask{v}"] = np.arange(size) < count
    pose = np.eye(4) if T_0to1 is None else T_0to1
    sample["T_0to1"] = pose.astype(np.float32)
    sample["E"] = essential_matrix(pose).astype(np.float32)
    sample["has_pose"] = np.float32(T_0to1 is not None)
    return sample


class Draws:
    """Items of groups, by number: `draw(k)` names the k-th of an endless, shuffled sequence.

    Each draw takes `per_group` items (all, where there are fewer) of every group, shuffled; when it is used up, the
    next one begins.
    """

    def __init__(self, groups: dict[str, int], per_group: int, seed: int):
        """groups: name and number of items of each."""
        self.groups, self.per_group, self.seed = groups, per_group, seed
        self.size = sum(min(n, per_group) for n in groups.values())
        self._number, self._items = None, []  # of the last draw

    def draw(self, k: int, attempt: int = 0) -> tuple[str, int]:
        """Group and index of the k-th item; any other, by chance, if attempt is not 0."""
        if attempt:
            k = int(np.random.default_rng([self.seed, k, attempt]).integers(self.size))
        number, place = divmod(k, self.size)
        if number != self._number:
            rng = np.random.default_rng([self.seed, number])
            items = [(group, int(i)) for group, n in self.groups.items() for i in rng.permutation(n)[:self.per_group]]
            self._number, self._items = number, [items[i] for i in rng.permutation(len(items))]
        return self._items[place]


class DumpSource:
    """Pairs of a dump's records."""

    pairs_per_item = 1  # of what is drawn

    def __init__(self, dump_path, scenes=None, pairs_per_scene: int = 80, seed: int = 0, labels: Labels | None = None):
        """scenes: ids; None: all. labels: None takes the dump's matches, and all other keypoints as unmatched.

        Raises InputError if the dump has no pairs.
        """
        dump = load_dump(dump_path, scenes)
        self.name, self.path, self.labels = str(dump_path), dump_path, labels
        self.feature_type, self.scenes = dump["feature_type"], list(dump["scenes"])
        self.min_keypoints = dump["settings"]["min_keypoints"]  # that its images have at least
        self.draws = Draws(dump["scenes"], pairs_per_scene, seed)

    def pair(self, k: int, attempt: int) -> Pair:
        """The pair of sample k of the run; InputError if a record is damaged."""
        scene, index = self.draws.draw(k, attempt)
        path = match_path(self.path, scene, index)
        pair = read_record(path, MATCH_FIELDS)
        views, cameras = [], []
        for v in "01":
            record = read_record(keypoint_path(self.path, scene, pair[f"image_path{v}"], self.feature_type),
                                 KEYPOINT_FIELDS, D=FEATURE_TYPES[self.feature_type].dim)
            view = {name: record[name] for name in ("keypoints", "scores", "descriptors", "image_size")}
            views.append({**view, "K": colmap_to_opencv_K(record["intrinsics"])})
            cameras.append((record["keypoints"], record["depth"], record["intrinsics"], pair[f"pose{v}"]))
        check_matches(path, pair["matches"], [len(view["scores"]) for view in views])
        matches, unmatched = self.labels.label(*cameras) if self.labels else (pair["matches"], None)
        return Pair(str(path), views, matches, relative_pose(pair["pose0"], pair["pose1"]),
                    (pair["image_path0"], pair["image_path1"]), unmatched)


class Samples(Dataset):
    """The samples of a run: item k is the k-th, whoever asks for it.

    An item is a dict as from `make_sample`, the pair's `name` and `image_paths`, and `skipped`: (source, reason) of the
    pairs that could not be read, in whose place it stands. A pair that the choice refuses is replaced as well. When
    MAX_TRIES pairs in a row are of no use, the item is {"failed": why}.
    """

    def __init__(self, sources: list, choice: Choice, seed: int = 0, weights=None, group: int = 1):
        """sources: DumpSource and those of training.online; weights: shares in the samples; None: the same; group:
        samples in a row that are from the same source, as training.online wants it."""
        self.sources, self.choice, self.seed, self.group = sources, choice, seed, group
        weights = np.ones(len(sources)) if weights is None else np.asarray(weights, np.float64)
        self.shares = weights / weights.sum()
        self.scenes = [scene for source in sources for scene in source.scenes]
        self.draw_size = sum(source.draws.size * source.pairs_per_item for source in sources)  # pairs

    def __getitem__(self, k: int) -> dict:
        skipped = []
        for attempt in range(MAX_TRIES):
            which = np.random.default_rng([self.seed, k // self.group, attempt, 2])
            source = self.sources[which.choice(len(self.sources), p=self.shares)]
            try:
                pair = source.pair(k, attempt)
            except Exception as error:
                why = reason(error)
                skipped.append((source.name, why))
                continue
            why = self.choice.refuses(pair)
            if not why:
                break
        else:
            return {"failed": f"{MAX_TRIES} pairs in a row make no sample; the last: {why}"}
        *chosen, target = choose_keypoints(pair.matches, *(len(view["scores"]) for view in pair.views), self.choice,
                                           np.random.default_rng([self.seed, k, 1 + attempt]), pair.unmatched)
        views = [{**view, **{name: view[name][rows] for name in ("keypoints", "scores", "descriptors")}}
                 for view, rows in zip(pair.views, chosen)]
        sample = make_sample(views, target, pair.T_0to1, self.choice.max_keypoints)
        return {**sample, "name": pair.name, "image_paths": pair.image_paths, "skipped": skipped}


def step_batches(first_step: int, last_step: int, batch_size: int, rank: int = 0, world_size: int = 1
                 ) -> Iterator[range]:
    """Sample numbers of each training step from `first_step` to `last_step`, for one process of the job.

    Step s takes samples s * batch_size .. (s + 1) * batch_size - 1, a block of them in each process, as neighbours may
    be made of the same views.
    """
    share = batch_size // world_size
    for step in range(first_step, last_step):
        first = step * batch_size + rank * share
        yield range(first, first + share)


def collate(samples: list[dict]) -> dict:
    """Items of `Samples` -> a dict of tensors (B, ...), with names [str], image_paths and skipped [(source, reason)].

    {"failed": why} if there is no sample to be had.
    """
    failed = [sample for sample in samples if "failed" in sample]
    if failed:
        return failed[0]
    full = np.ones(len(samples[0]["scores0"]), bool)
    masks = {"mask0": full, "mask1": full} if any("mask0" in sample for sample in samples) else {}
    others = ("name", "image_paths", "skipped")
    arrays = [{**masks, **{key: sample[key] for key in sample if key not in others}} for sample in samples]
    for name in ("descriptors0", "descriptors1"):
        dtype = np.result_type(*(sample[name] for sample in arrays))
        arrays = [{**sample, name: sample[name].astype(dtype, copy=False)} for sample in arrays]
    return {**default_collate(arrays), "names": [sample["name"] for sample in samples],
            "image_paths": [sample["image_paths"] for sample in samples],
            "skipped": [entry for sample in samples for entry in sample["skipped"]]}


def _init_worker(_):
    start_worker()
    # a scheduler's SIGTERM reaches the whole group; the trainer saves first, and still needs its batch
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def make_loader(dataset: Dataset, batches: Iterator[range], workers: int, pin_memory: bool) -> DataLoader:
    """Batches as from `collate` of the samples that `step_batches` gives, made by `workers` processes (0 = this one).
    """
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=_init_worker,
                      multiprocessing_context=_START if workers else None, pin_memory=pin_memory,
                      collate_fn=collate, prefetch_factor=4 if workers else None)


def end_workers(batches) -> None:
    """End the sample-making processes of an iterator of `make_loader`, whatever they are at.

    They ignore SIGTERM, by which Python ends them at exit: it would wait for them for ever.
    """
    if hasattr(batches, "_shutdown_workers"):  # there are processes; torch has no public name for it
        batches._shutdown_workers()
        for process in batches._workers:
            process.kill()
