"""What is reported about poses and matches."""
import numpy as np

from tools.geometry import essential_matrix, to_camera_coordinates


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """Angle of two vectors (3,) in degrees, 0 to 180; 0 if one has no length."""
    # arctan2, as arccos loses half the digits at the small angles that matter
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)))


def pose_error(T_0to1: np.ndarray, R: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """Errors of an estimated pose against T_0to1 (4, 4): R (3, 3), t (3,) up to scale -> (error_t, error_R) in degrees.

    The sign of t is not judged: error_t is at most 90. A true translation of length zero has no direction to miss:
    its error_t is 0.
    """
    angle = angle_between(T_0to1[:3, 3], np.ravel(t))
    # arcsin, as arccos loses half the digits at small angles
    chord = np.linalg.norm(T_0to1[:3, :3] - R) / np.sqrt(8)
    return float(min(angle, 180 - angle)), float(np.degrees(2 * np.arcsin(min(chord, 1))))


def pose_auc(errors, thresholds) -> list[float]:
    """Area under the recall curve of pose errors up to each threshold, divided by it: values in [0, 1].

    errors: degrees, one a pair, inf where no pose was found; thresholds: degrees.
    """
    return _auc(np.asarray(errors, np.float64)[None], thresholds)[:, 0].tolist()


def _auc(errors: np.ndarray, thresholds) -> np.ndarray:
    """`pose_auc` of many sets of errors (S, N) at once: (thresholds, S)."""
    errors = np.sort(errors, axis=1)
    # from one error to the next, recall rises along a straight line by 1 / N, and keeps what it gained
    middles = (errors + np.c_[np.zeros(len(errors)), errors[:, :-1]]) / 2 if errors.shape[1] else errors
    areas = [np.sum(np.where(errors < threshold, threshold - middles, 0), axis=1) for threshold in thresholds]
    return np.array([area / threshold for area, threshold in zip(areas, thresholds)]) / max(errors.shape[1], 1)


def bootstrap_interval(errors, thresholds, seed: int, samples: int = 1000, baseline=None) -> list[tuple[float, float]]:
    """95% intervals of `pose_auc` when the pairs are drawn anew with replacement: (low, high) for each threshold.

    errors (N,), or (S, N) of S runs over the same pairs, whose mean AUC it is then. baseline, alike: errors of another
    method on the same pairs; the intervals are then those of the AUC less its AUC, on the same draws.
    """
    errors = np.atleast_2d(np.asarray(errors, np.float64))
    n = errors.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n, (samples, n))

    def auc(runs):
        return np.mean([_auc(run[drawn], thresholds) for run in runs], axis=0)

    aucs = auc(errors) if baseline is None else auc(errors) - auc(np.atleast_2d(np.asarray(baseline, np.float64)))
    low, high = np.percentile(aucs, [2.5, 97.5], axis=1)
    return [(float(a), float(b)) for a, b in zip(low, high)]


def epipolar_error(x0: np.ndarray, x1: np.ndarray, E: np.ndarray) -> np.ndarray:
    """Mean distance of two points to each other's epipolar lines, in the units of the points.

    x0, x1: (N, 2) normalised camera coordinates; E (3, 3) with x1^T E x0 = 0. Returns (N,). A point on its epipole
    has no epipolar line: its error is inf.
    """
    x0, x1 = np.c_[x0, np.ones(len(x0))], np.c_[x1, np.ones(len(x1))]
    lines1, lines0 = x0 @ E.T, x1 @ E
    product = np.abs(np.sum(x1 * lines1, axis=1))
    norm0, norm1 = np.linalg.norm(lines0[:, :2], axis=1), np.linalg.norm(lines1[:, :2], axis=1)
    defined = (norm0 > 0) & (norm1 > 0)
    error = np.full(len(x0), np.inf)
    error[defined] = product[defined] * (1 / norm0[defined] + 1 / norm1[defined]) / 2
    return error


def match_errors(keypoints0, keypoints1, K0, K1, T_0to1: np.ndarray) -> np.ndarray:
    """`epipolar_error` (M,), in camera coordinates, of matched keypoints (M, 2) in pixels by the pose (4, 4)."""
    return epipolar_error(to_camera_coordinates(keypoints0, K0), to_camera_coordinates(keypoints1, K1),
                          essential_matrix(T_0to1))


def precision_at_recall(scores, correct, n_true: int, recall: float) -> float | None:
    """Precision at the highest score threshold whose matches reach `recall`; None if no threshold does.

    scores (M,) and correct (M,) bool: the predicted matches of all pairs, pooled, left out where a keypoint lacks
    depth; n_true: how many true correspondences all pairs have. Matches of equal score stand or fall
    together.
    """
    scores, correct = np.asarray(scores), np.asarray(correct, bool)
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(correct[order])
    ends_a_tie = np.r_[scores[1:] != scores[:-1], True][:len(scores)]
    # a tolerance, because a recall computed elsewhere as found / n_true must be reached by that very threshold
    reached = np.flatnonzero(ends_a_tie & (found >= recall * n_true - 1e-6))
    if n_true == 0 or not len(reached):
        return None
    return float(found[reached[0]] / (reached[0] + 1))
