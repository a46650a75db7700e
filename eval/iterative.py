"""Matching a pair, one-shot or iteratively: a network's iterations, with a pose on the way, until it stays the same."""
from dataclasses import dataclass, field

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
class PairMatches:
    """What was found on a pair, one-shot or iteratively.

    all_matches (M, 2) int64, indices into the input's keypoints, and all_scores (M,): all that was matched; used (M,)
    bool: those above the threshold, which the pose is of. pose: R (3, 3), t (3,), inliers (U,) bool among the used, or
    None. n_iterations: that were run, None if the matcher has none. Iterative matching only: stopped_early, because two
    poses in a row agreed, so that the matches are the inliers of the last one; steps, at which matches were read.
    seconds: of matching and of pose (`eval.methods.Method`).
    """

    all_matches: np.ndarray
    all_scores: np.ndarray
    used: np.ndarray
    pose: tuple | None = None
    n_iterations: int | None = None
    stopped_early: bool | None = None
    steps: list[IterationStep] = field(default_factory=list)
    seconds: dict = field(default_factory=dict)

    @property
    def matches(self) -> np.ndarray:
        """(U, 2) int64: those used."""
        return self.all_matches[self.used]

    @property
    def scores(self) -> np.ndarray:
        """(U,)."""
        return self.all_scores[self.used]


def match_one_shot(matcher, data: dict) -> PairMatches:
    """Match a pair once, without a pose; matcher: `eval.methods.Matcher`, data: as it takes it."""
    n0, n1 = data["keypoints0"].shape[1], data["keypoints1"].shape[1]
    out = {"matches0": torch.full((n0,), -1), "matching_scores0": torch.zeros(n0)}
    if n0 and n1:
        out |= matcher.match(data)
    matches, scores = _pairs(out["matches0"], out["matching_scores0"])
    return PairMatches(matches, scores, scores > matcher.threshold,
                       n_iterations=out.get("n_iterations", matcher.n_iterations))


def _pairs(matches0: torch.Tensor, scores0: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """matches0 (N0,), -1 where there is none, and scores0 (N0,) -> matches (M, 2) int64, scores (M,)."""
    matches0, scores0 = matches0.cpu().numpy(), scores0.cpu().numpy()
    matched = np.flatnonzero(matches0 >= 0)
    return np.stack([matched, matches0[matched]], axis=1), scores0[matched]


@dataclass(frozen=True)
class Schedule:
    """When the loop reads matches: after iteration `first` (0-based), then after each `every`-th, and after the last.

    It stops when two poses in a row differ by at most same_pose degrees. The default is the paper's: 3, 5, 7, ...
    """

    first: int = 3
    every: int = 2
    same_pose: float = SAME_POSE

    def reads(self, t: int, n_layers: int) -> bool:
        """Whether matches are read after iteration t of n_layers."""
        return t == n_layers - 1 or (t >= self.first and (t - self.first) % self.every == 0)


PUBLISHED_SCHEDULE = Schedule()


def same_pose(pose: tuple | None, other: tuple | None, degrees: float = SAME_POSE) -> bool:
    """Whether two poses (R, t, ...) differ by at most so much in rotation and in translation, whose sign counts."""
    if pose is None or other is None:
        return False
    _, error_R = pose_error(make_pose(*other[:2]), *pose[:2])
    return max(angle_between(other[1], pose[1]), error_R) <= degrees


@torch.no_grad()
def match_iteratively(network, data: dict, estimate, use_uncertainty: bool = False, threshold: float = 0.2,
                      n_layers: int | None = None, published: bool = False,
                      schedule: Schedule = PUBLISHED_SCHEDULE) -> PairMatches:
    """Match one pair and estimate its pose iteratively.

    network: in evaluation mode, has n_layers and `iterate(data, n_layers)`, whose states have `iteration`, `indices0/1`
    and `matches(threshold)`, see `nets.matchers.MatchingState`; where its `pools` is True also n_min_tokens, and the
    states `remove(threshold, n_min_tokens)`; where its `has_exit` is True, the loop also ends where the states'
    `is_confident()` says that more iterations will hardly change a match. data: as it takes it, B = 1. estimate:
    matches (M, 2), scores (M,), quick -> R, t, inliers (M,) or None; the search is quick (see
    `tools.pose.estimate_pose`) but for the pose at the end of a loop in which no two poses agreed (no scores then).
    use_uncertainty: pool by a threshold in proportion to the share of inliers, so that more keypoints stay where the
    pose is doubtful. threshold: score of the matches that are returned if the pose never stayed the same. n_layers:
    iterations at most (None: all that the network has). published: as the published program, pool with use_uncertainty
    alone, and also views of exactly n_min_tokens keypoints. schedule: when to read matches.
    """
    n_layers = network.n_layers if n_layers is None else n_layers
    steps, last_pose = [], None
    if not data["descriptors0"].shape[1] or not data["descriptors1"].shape[1]:
        return PairMatches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), np.zeros(0, bool), None, 0, False)

    for state in network.iterate(data, n_layers):
        if not schedule.reads(state.iteration, n_layers):
            continue
        matches0, _, scores0, _ = state.matches(0.0)
        all_matches, all_scores = _pairs(matches0[0], scores0[0])
        read = all_scores > READ_THRESHOLD
        step = IterationStep(state.iteration, state.indices0.cpu().numpy(), state.indices1.cpu().numpy(),
                             all_matches[read], all_scores[read], None)
        steps.append(step)
        enough = len(step.matches) >= MIN_MATCHES
        if enough:
            step.pose = estimate(step.matches, step.scores, quick=True)
        inlier_ratio = 0.0 if step.pose is None else float(np.mean(step.pose[2]))
        if inlier_ratio > 0 and same_pose(step.pose, last_pose, schedule.same_pose):
            R, t, inliers = step.pose
            agree = np.ones(int(np.sum(inliers)), bool)
            return PairMatches(step.matches[inliers], step.scores[inliers], agree, (R, t, agree), state.iteration + 1,
                               True, steps)
        last_pose = step.pose if inlier_ratio > 0 else None
        if getattr(network, "has_exit", False) and state.is_confident():
            break
        if enough and network.pools and state.iteration < n_layers - 1 and (use_uncertainty or not published):
            # the published program counted the dustbin as a keypoint
            state.remove(POOL_THRESHOLD * inlier_ratio if use_uncertainty and inlier_ratio > 0 else POOL_THRESHOLD,
                         network.n_min_tokens - published)

    final = all_scores > threshold
    matches = all_matches[final]
    return PairMatches(matches, all_scores[final], np.ones(len(matches), bool), estimate(matches),
                       state.iteration + 1, False, steps)
