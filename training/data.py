"""Training samples (SPEC 6): from the records of a dump to batches.

Every sample is a function of (seed, number of the sample in the run), so a run gives the same samples for any number
of workers and processes, and goes on after a stop from the number alone.
"""
import signal
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nets.layers import normalize_keypoints
from tools.cli import InputError
from tools.geometry import colmap_to_opencv_K, essential_matrix, relative_pose, to_camera_coordinates
from tools.manifest import keypoint_path, load_dump, match_path
from tools.records import read_record


def choose_keypoints(matches: np.ndarray, n0: int, n1: int, max_keypoints: int, min_inliers: int, max_inliers: int,
                     random_inliers: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which keypoints of two views make a sample, and where its true matches are.

    matches (M, 2): true matches of views with n0 and n1 keypoints. A number of them drawn from min_inliers ..
    max_inliers (max_inliers itself without random_inliers; at most M, at least what the unmatched keypoints leave to
    fill), and unmatched keypoints of each side up to max_keypoints, shuffled. Returns chosen0, chosen1
    (max_keypoints,) and target (max_keypoints,): the place in chosen1 of each of chosen0's match, or -1.
    """
    free0 = np.setdiff1d(np.arange(n0), matches[:, 0], assume_unique=True)
    free1 = np.setdiff1d(np.arange(n1), matches[:, 1], assume_unique=True)
    wanted = int(rng.integers(min_inliers, max_inliers, endpoint=True)) if random_inliers else max_inliers
    needed = max_keypoints - min(len(free0), len(free1))
    n_matches = min(max(wanted, needed), len(matches), max_keypoints)
    kept = matches[rng.permutation(len(matches))[:n_matches]]
    sides, places = [], []
    for own, free in ((kept[:, 0], free0), (kept[:, 1], free1)):
        filled = np.concatenate([own, rng.permutation(free)[:max_keypoints - n_matches]])
        order = rng.permutation(max_keypoints)
        sides.append(filled[order])
        places.append(np.argsort(order)[:n_matches])  # where the true matches went
    target = np.full(max_keypoints, -1, np.int64)
    target[places[0]] = places[1]
    return sides[0], sides[1], target


def matching_mask(target: np.ndarray, n1: int) -> np.ndarray:
    """target (N0,): index of the match in view 1 or -1 -> (N0+1, N1+1) uint8, ones at matches and in the dustbins."""
    mask = np.zeros((len(target) + 1, n1 + 1), np.uint8)
    matched = target >= 0
    mask[np.flatnonzero(matched), target[matched]] = 1
    mask[:-1, -1] = ~matched
    mask[-1, :-1] = 1
    mask[-1, target[matched]] = 0
    return mask


def make_sample(views: list[dict], target: np.ndarray, T_0to1: np.ndarray | None) -> dict:
    """Two views' chosen keypoints -> the dict of arrays that training takes.

    views: dicts of keypoints (N, 2) pixels, scores (N,), descriptors (N, D), image_size (w, h), K (3, 3) in OpenCV's
    pixel convention. target (N,): match in view 1 or -1. T_0to1 (4, 4), or None where there is no pose: the sample
    then carries has_pose 0 and takes no part in a pose loss.
    """
    sample = {"matching_mask": matching_mask(target, len(views[1]["keypoints"]))}
    for v, view in zip("01", views):
        keypoints = np.ascontiguousarray(view["keypoints"], np.float32)
        image_size = np.asarray(view["image_size"], np.float32)
        sample[f"keypoints{v}"] = keypoints
        sample[f"norm_keypoints{v}"] = normalize_keypoints(torch.from_numpy(keypoints)[None],
                                                           torch.from_numpy(image_size)[None])[0].numpy()
        sample[f"camera_keypoints{v}"] = to_camera_coordinates(keypoints, view["K"]).astype(np.float32)
        sample[f"scores{v}"] = np.asarray(view["scores"], np.float32)
        sample[f"descriptors{v}"] = np.asarray(view["descriptors"], np.float32)
        sample[f"image_size{v}"] = image_size
        sample[f"K{v}"] = np.asarray(view["K"], np.float32)
    pose = np.eye(4) if T_0to1 is None else T_0to1
    sample["T_0to1"] = pose.astype(np.float32)
    sample["E"] = essential_matrix(pose).astype(np.float32)
    sample["has_pose"] = np.float32(T_0to1 is not None)
    return sample


class DumpPairs:
    """The pairs of a dump, by number: `draw(k)` names the k-th pair of an endless, shuffled sequence.

    Each draw takes `pairs_per_scene` pairs (all, where there are fewer) of every scene, shuffled; when it is used up,
    the next one begins.
    """

    def __init__(self, scenes: dict[str, int], pairs_per_scene: int, seed: int):
        self.scenes = scenes
        self.pairs_per_scene = pairs_per_scene
        self.seed = seed
        self.draw_size = sum(min(n, pairs_per_scene) for n in scenes.values())
        self._drawn = (None, [])  # the last draw and its number

    def _draw(self, number: int) -> list[tuple[str, int]]:
        if self._drawn[0] != number:
            self._drawn = (number, self._make_draw(number))
        return self._drawn[1]

    def _make_draw(self, number: int) -> list[tuple[str, int]]:
        rng = np.random.default_rng([self.seed, number])
        pairs = [(scene, int(i)) for scene, n in self.scenes.items() for i in rng.permutation(n)[:self.pairs_per_scene]]
        return [pairs[i] for i in rng.permutation(len(pairs))]

    def draw(self, k: int) -> tuple[str, int]:
        """Scene and index of match record number k of the run."""
        return self._draw(k // self.draw_size)[k % self.draw_size]


class DumpDataset(Dataset):
    """Samples from a dump: item k is the k-th sample of the run, whoever asks for it."""

    def __init__(self, dump_path, scenes=None, pairs_per_scene=80, max_keypoints=1024, min_inliers=32,
                 max_inliers=512, random_inliers=True, seed=0):
        """Raises InputError if the dump has no pairs or its images may have fewer than max_keypoints keypoints."""
        dump = load_dump(dump_path, scenes)
        self.path = dump_path
        self.feature_type = dump["feature_type"]
        self.incomplete = dump["incomplete"]
        least = dump["settings"]["min_keypoints"]
        if least < max_keypoints:
            raise InputError(f"{dump_path} admits images with {least} keypoints, a sample takes {max_keypoints}: "
                             f"dump with --min_keypoints {max_keypoints}, or train with max_keypoints {least}")
        self.pairs = DumpPairs(dump["scenes"], pairs_per_scene, seed)
        self.choice = (max_keypoints, min_inliers, max_inliers, random_inliers)
        self.seed = seed

    @property
    def scenes(self) -> list[str]:
        return list(self.pairs.scenes)

    def __getitem__(self, k: int) -> dict:
        scene, index = self.pairs.draw(k)
        pair = read_record(match_path(self.path, scene, index), mmap=True)
        records = [read_record(keypoint_path(self.path, scene, pair[f"image_path{v}"], self.feature_type), mmap=True)
                   for v in "01"]
        *chosen, target = choose_keypoints(pair["matches"], *(len(r["scores"]) for r in records), *self.choice,
                                           np.random.default_rng([self.seed, k, 1]))
        views = []
        for record, rows in zip(records, chosen):
            view = {name: record[name][rows] for name in ("keypoints", "scores", "descriptors")}
            views.append({**view, "image_size": record["image_size"], "K": colmap_to_opencv_K(record["intrinsics"])})
        return make_sample(views, target, relative_pose(pair["pose0"], pair["pose1"]))


class StepBatches(Sampler):
    """Sample numbers of each training step from `first_step` to `last_step`, for one process of the job.

    Step s takes samples s * batch_size .. (s + 1) * batch_size - 1, dealt out evenly over the processes.
    """

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size
            yield list(range(first + self.rank, first + self.batch_size, self.world_size))


def _init_worker(_):
    # Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer saves first, and still needs its batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def make_loader(dataset: Dataset, batches: StepBatches, workers: int, pin_memory: bool) -> DataLoader:
    """Batches (dicts of tensors) in order of their steps, made by `workers` processes (0 = in this one)."""
    # not forked from this process: a copy of one whose threads have run can hang in its first parallel loop
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=_init_worker,
                      multiprocessing_context="forkserver" if workers else None, pin_memory=pin_memory,
                      prefetch_factor=4 if workers else None)
