"""Iterative matching and pose estimation: a network's iterations, until the pose stays the same."""
import time
from dataclasses import dataclass

import numpy as np
import torch

from tools.geometry import make_pose
from tools.metrics import angle_between, pose_error

READ_THRESHOLD = 0.1  # score of a match on the way, for the pose of that iteration
MIN_MATCHES = 25  # fewer say too little of the pose
SAME_POSE = 1.5  # degrees, of rotation and of translation
POOL_THRESHOLD = 0.2  # of EIMP in this loop, where keypoints are gone for good


@dataclass
class IterationStep:
    """One iteration at which matches were read.

    iteration: 0-based. kept0 (K0,), kept1 (K1,) int64: indices of the input's keypoints that were present then. matches
    (M, 2) int64: indices into the input's keypoints; scores (M,). pose: R (3, 3), t (3,), inliers (M,) bool of this
    iteration; None if there were too few matches or the estimator failed.
    """

    iteration: int
    kept0: np.ndarray
    kept1: np.ndarray
    matches: np.ndarray
    scores: np.ndarray
    pose: tuple | None


@dataclass
class IterativeMatch:
    """What the loop made of a pair.

    matches (M, 2) int64: indices into the input's keypoints; scores (M,); pose: R (3, 3), t (3,), inliers (M,) bool, or
    None. n_iterations: how many were run; stopped_early: because two poses in a row agreed, so matches are the inliers
    of the last one. steps: the iterations at which matches were read. seconds: of matching and of pose.
    """

    matches: np.ndarray
    scores: np.ndarray
    pose: tuple | None
    n_iterations: int
    stopped_early: bool
    steps: list[IterationStep]
    seconds: dict


def is_read(t: int, n_layers: int) -> bool:
    """Whether the loop reads matches at iteration t (0-based) of n_layers: 3, 5, 7, ... and the last."""
    return t == n_layers - 1 or (t >= 3 and t % 2 == 1)


def same_pose(pose: tuple | None, other: tuple | None) -> bool:
    """Whether two poses (R, t, ...) differ by at most SAME_POSE in rotation and in translation, whose sign counts."""
    if pose is None or other is None:
        return False
    _, error_R = pose_error(make_pose(*other[:2]), *pose[:2])
    return max(angle_between(other[1], pose[1]), error_R) <= SAME_POSE


@torch.no_grad()
def match_iteratively(matcher, data: dict, estimate, use_uncertainty: bool = False, threshold: float = 0.2,
                      n_layers: int | None = None, published: bool = False) -> IterativeMatch:
    """Match one pair and estimate its pose iteratively.

    matcher: IMP, EIMP or GM (`nets.build_matcher`) in evaluation mode; data: as it takes it, B = 1; estimate: matches
    (M, 2), scores (M,) -> R, t, inliers (M,) or None; it gets no scores for the pose at the end of a loop that never
    stopped (see `tools.pose.estimate_pose`). use_uncertainty: EIMP pools by a threshold in proportion to the share of
    inliers, so that more keypoints stay where the pose is doubtful. threshold: score of the matches that are returned
    if the pose never stayed the same. n_layers: iterations at most (None: all that the network has). published: as the
    published program, pool with use_uncertainty alone, and also views of exactly n_min_tokens keypoints.
    """
    n_layers = matcher.n_layers if n_layers is None else n_layers
    seconds, steps, last_pose = {"matching": 0.0, "pose": 0.0}, [], None
    if not data["descriptors0"].shape[1] or not data["descriptors1"].shape[1]:
        return IterativeMatch(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), None, 0, False, steps, seconds)

    def timed_estimate(*arguments):
        start = time.perf_counter()
        pose = estimate(*arguments)
        seconds["pose"] += time.perf_counter() - start
        return pose

    start = time.perf_counter()
    for state in matcher.iterate(data, n_layers):
        if not is_read(state.iteration, n_layers):
            continue
        all_matches, all_scores = _read(state)
        read = all_scores > READ_THRESHOLD
        step = IterationStep(state.iteration, state.indices0.cpu().numpy(), state.indices1.cpu().numpy(),
                             all_matches[read], all_scores[read], None)
        steps.append(step)
        if len(step.matches) < MIN_MATCHES:
            last_pose = None
            continue
        step.pose = timed_estimate(step.matches, step.scores)
        inlier_ratio = 0.0 if step.pose is None else float(np.mean(step.pose[2]))
        if inlier_ratio > 0 and same_pose(step.pose, last_pose):
            seconds["matching"] = time.perf_counter() - start - seconds["pose"]
            R, t, inliers = step.pose
            pose = R, t, np.ones(int(np.sum(inliers)), bool)
            return IterativeMatch(step.matches[inliers], step.scores[inliers], pose, state.iteration + 1, True, steps,
                                  seconds)
        last_pose = step.pose if inlier_ratio > 0 else None
        if matcher.pools and state.iteration < n_layers - 1 and (use_uncertainty or not published):
            # the published program counted the dustbin as a keypoint
            state.remove(POOL_THRESHOLD * inlier_ratio if use_uncertainty and inlier_ratio > 0 else POOL_THRESHOLD,
                         matcher.n_min_tokens - published)

    final = all_scores > threshold
    seconds["matching"] = time.perf_counter() - start - seconds["pose"]
    pose = timed_estimate(all_matches[final])
    return IterativeMatch(all_matches[final], all_scores[final], pose, n_layers, False, steps, seconds)


def _read(state) -> tuple[np.ndarray, np.ndarray]:
    """All mutual matches of a state: indices into the input's keypoints (M, 2) int64, scores (M,)."""
    matches0, _, scores0, _ = state.matches(0.0)
    matches0, scores0 = matches0[0].cpu().numpy(), scores0[0].cpu().numpy()
    matched = np.flatnonzero(matches0 >= 0)
    return np.stack([matched, matches0[matched]], axis=1), scores0[matched]
