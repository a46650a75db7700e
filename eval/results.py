"""What was found on a pair, judged by what is known of it."""
from dataclasses import asdict, dataclass, field

import numpy as np

from eval.hpatches import ACCURACY_THRESHOLDS, corner_error, reprojection_errors
from eval.iterative import PairMatches
from eval.pair_sets import EvalPair
from tools.correspondences import match_by_projection
from tools.geometry import opencv_to_colmap_K
from tools.metrics import match_errors, pose_error

PRECISION_THRESHOLD = 0.005  # epipolar error in camera coordinates below which a match counts as right
HOMOGRAPHY_PRECISION = 3.0  # pixels, the same in pictures of pairs that a homography relates
STAGES = ("features", "matching", "pose")  # of the seconds
WORST_ERROR = 1.0  # of a match in their mean, at most: the error of a point on its epipole is inf


@dataclass
class StepResult:
    """The loop after `iterations` iterations, where it read matches; None where the ground truth is not known.

    kept0/1: how many keypoints of each view were left. error_R, error_t: degrees, inf without a pose.
    """

    iterations: int
    kept0: int
    kept1: int
    n_matches: int
    n_inliers: int
    error_R: float | None = None
    error_t: float | None = None
    precision: float | None = None

    @property
    def error(self) -> float | None:
        """Pose error in degrees: the larger of both."""
        return None if self.error_R is None else max(self.error_R, self.error_t)


@dataclass
class PairResult:
    """One method on one pair; None where the ground truth that it takes is not known.

    error_R, error_t: degrees, inf without a pose; n_matches: those used for the pose, n_inliers of which agree with
    it; n_iterations: that a network ran. With depth: scores (M,) float32 and correct (M,) bool of all predicted
    matches between keypoints that have it, with n_true correspondences to find, of which n_used of those used were,
    n_correct rightly. stopped_early, steps: of the loop. seconds: by stage. epipolar_mean, epipolar_median: of the
    matches' errors in camera coordinates, each at most WORST_ERROR; None without matches, too. Where a homography is
    known: error_H, pixels, inf without an estimate; accuracy: shares of the matches within ACCURACY_THRESHOLDS.
    """

    index: int
    names: tuple[str, str]
    n_keypoints0: int
    n_keypoints1: int
    n_matches: int
    n_inliers: int
    seconds: dict
    error_R: float | None = None
    error_t: float | None = None
    precision: float | None = None
    matching_score: float | None = None
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    n_true: int | None = None
    n_used: int | None = None
    n_correct: int | None = None
    n_iterations: int | None = None
    stopped_early: bool | None = None
    steps: list[StepResult] = field(default_factory=list)
    epipolar_mean: float | None = None
    epipolar_median: float | None = None
    error_H: float | None = None
    accuracy: list[float] | None = None

    @property
    def error(self) -> float | None:
        """Pose error in degrees: the larger of both; of a homography in pixels."""
        if self.error_H is not None:
            return self.error_H
        return None if self.error_R is None else max(self.error_R, self.error_t)

    def to_json(self) -> dict:
        """Numbers, strings and lists; `from_json` gives back the same."""
        # the shortest decimals that read back as the same float32
        return {**asdict(self), "scores": [float(str(score)) for score in self.scores],
                "correct": [int(correct) for correct in self.correct]}

    @classmethod
    def from_json(cls, content: dict) -> "PairResult":
        """The inverse of `to_json`."""
        return cls(**{**content, "names": tuple(content["names"]),
                      "steps": [StepResult(**step) for step in content["steps"]],
                      "scores": np.array(content["scores"], np.float32), "correct": np.array(content["correct"], bool)})


def true_correspondences(pair: EvalPair) -> np.ndarray | None:
    """Index in view 1 of the keypoint that sees the same point, or -1, for each of view 0 (N0,); None without depth."""
    if pair.depth0 is None or pair.depth1 is None or pair.T_0to1 is None or pair.K0 is None:
        return None
    found = match_by_projection(
        pair.features0.keypoints, pair.depth0, opencv_to_colmap_K(pair.K0), np.eye(4),
        pair.features1.keypoints, pair.depth1, opencv_to_colmap_K(pair.K1), pair.T_0to1)
    true0 = np.full(len(pair.depth0), -1)
    true0[found[:, 0]] = found[:, 1]
    return true0


def epipolar_errors(pair: EvalPair, matches: np.ndarray) -> np.ndarray | None:
    """Epipolar errors (M,) of matches (M, 2) by the true pose, in camera coordinates; None if it is not known."""
    if pair.T_0to1 is None or pair.K0 is None:
        return None
    return match_errors(*pair.matched_keypoints(matches), pair.K0, pair.K1, pair.T_0to1)


def errors_to_draw(pair: EvalPair, matches: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Errors (M,) of matches (M, 2), None if the truth is not known, and below which one counts as right."""
    if pair.H_0to1 is not None:
        return reprojection_errors(*pair.matched_keypoints(matches), pair.H_0to1), HOMOGRAPHY_PRECISION
    return epipolar_errors(pair, matches), PRECISION_THRESHOLD


def _judge(result: PairResult | StepResult, pair: EvalPair, matches: np.ndarray, pose: tuple | None
           ) -> np.ndarray | None:
    """Set error_R, error_t and precision, if the truth is known; returns the epipolar errors (M,)."""
    errors = epipolar_errors(pair, matches)
    if errors is None:
        return None
    result.error_t, result.error_R = (np.inf, np.inf) if pose is None else pose_error(pair.T_0to1, *pose[:2])
    result.precision = int(np.sum(errors < PRECISION_THRESHOLD)) / max(len(matches), 1)
    return errors


def _n_inliers(pose: tuple | None) -> int:
    return 0 if pose is None else int(np.sum(pose[-1]))


def score_pair(pair: EvalPair, found: PairMatches, true0: np.ndarray | None, seconds_features: float) -> PairResult:
    """What is reported of a method on a pair; true0 as from `true_correspondences`."""
    matches = found.matches
    result = PairResult(pair.index, pair.names, len(pair.features0.scores), len(pair.features1.scores), len(matches),
                        _n_inliers(found.pose), {"features": seconds_features, **found.seconds},
                        n_iterations=found.n_iterations, stopped_early=found.stopped_early)
    if pair.H_0to1 is not None:
        result.error_H = np.inf if found.pose is None else corner_error(
            found.pose[0], pair.H_0to1, pair.features0.image_size)
        errors = reprojection_errors(*pair.matched_keypoints(matches), pair.H_0to1)
        result.accuracy = [int(np.sum(errors <= pixels)) / max(len(matches), 1) for pixels in ACCURACY_THRESHOLDS]
    errors = _judge(result, pair, matches, found.pose)
    if errors is not None:
        result.matching_score = int(np.sum(errors < PRECISION_THRESHOLD)) / max(result.n_keypoints0, 1)
        if len(errors):
            errors = np.minimum(errors, WORST_ERROR)
            result.epipolar_mean, result.epipolar_median = float(np.mean(errors)), float(np.median(errors))
    for step in found.steps:
        scored = StepResult(step.iteration + 1, len(step.kept0), len(step.kept1), len(step.matches),
                            _n_inliers(step.pose))
        _judge(scored, pair, step.matches, step.pose)
        result.steps.append(scored)
    if true0 is not None:
        index0, index1 = found.all_matches.T
        judged = (pair.depth0[index0] > 0) & (pair.depth1[index1] > 0)
        correct = true0[index0] == index1
        result.scores, result.correct = found.all_scores[judged].astype(np.float32), correct[judged]
        result.n_true = int(np.sum(true0 >= 0))
        result.n_used = int(np.sum(judged & found.used))
        result.n_correct = int(np.sum(correct & judged & found.used))
    return result
