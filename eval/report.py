"""What was found on each pair -> numbers per method, a table, and the files of a run (SPEC 14)."""
import csv
import platform
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch

from eval.metrics import bootstrap_interval, pose_auc, precision_at_recall
from tools.files import atomic_path, write_json
from tools.visualize import plot_curves

AUC_THRESHOLDS = (5, 10, 20)  # degrees
STAGES = ("features", "matching", "pose")


@dataclass
class PairResult:
    """One method on one pair; None where the ground truth that it takes is not known.

    error_R, error_t: degrees, inf without a pose; matches (M, 2): the indices used for the pose; inliers (M,) bool;
    epipolar_errors (M,); scores and correct: all predicted matches between keypoints with depth, with n_true
    correspondences to find, of which n_used of those used were, n_correct rightly; seconds: by stage.
    """

    index: int
    names: tuple[str, str]
    n_keypoints0: int
    n_keypoints1: int
    matches: np.ndarray
    matching_scores: np.ndarray
    inliers: np.ndarray
    seconds: dict
    error_R: float | None = None
    error_t: float | None = None
    epipolar_errors: np.ndarray | None = None
    precision: float | None = None
    matching_score: float | None = None
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    n_true: int | None = None
    n_used: int | None = None
    n_correct: int | None = None

    @property
    def error(self) -> float | None:
        """Pose error in degrees: the larger of both."""
        return None if self.error_R is None else max(self.error_R, self.error_t)


def pose_errors(results: list[PairResult]) -> list[float]:
    """Pose errors of the pairs whose pose is known."""
    return [result.error for result in results if result.error is not None]


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarize(results: dict[str, list[PairResult]], seed: int) -> dict[str, dict]:
    """Numbers per method. With depth, the first method's recall is the one at which all methods' precision is given.

    Shares and AUCs in [0, 1]; precision and matching score are means over pairs, the ones against depth are pooled.
    """
    summary, baseline_recall = {}, None
    for method, rows in results.items():
        errors = pose_errors(rows)
        numbers = {"pairs": len(rows), "pairs_with_pose": len(errors)}
        if errors:
            numbers["auc"] = dict(zip(map(str, AUC_THRESHOLDS), pose_auc(errors, AUC_THRESHOLDS)))
            intervals = bootstrap_interval(errors, AUC_THRESHOLDS, seed)
            numbers["auc_interval"] = dict(zip(map(str, AUC_THRESHOLDS), intervals))
            numbers["pose_found"] = float(np.mean(np.isfinite(errors)))
        numbers["precision"] = _mean(row.precision for row in rows)
        numbers["matching_score"] = _mean(row.matching_score for row in rows)
        numbers["matches"] = _mean(len(row.matches) for row in rows)
        numbers["inliers"] = _mean(np.sum(row.inliers) for row in rows)
        numbers["keypoints"] = _mean((row.n_keypoints0 + row.n_keypoints1) / 2 for row in rows)
        numbers["ms"] = {stage: 1000 * _mean(row.seconds[stage] for row in rows) for stage in STAGES}

        with_depth = [row for row in rows if row.n_true is not None]
        n_true = sum(row.n_true for row in with_depth)
        if n_true:
            n_used, n_correct = sum(row.n_used for row in with_depth), sum(row.n_correct for row in with_depth)
            recall = n_correct / n_true
            baseline_recall = recall if baseline_recall is None else baseline_recall
            scores = np.concatenate([row.scores for row in with_depth])
            correct = np.concatenate([row.correct for row in with_depth])
            numbers["against_depth"] = {
                "pairs": len(with_depth), "true_correspondences": n_true, "recall": recall,
                "precision": n_correct / n_used if n_used else None,
                "baseline_recall": baseline_recall,
                "precision_at_baseline_recall": precision_at_recall(scores, correct, n_true, baseline_recall)}
        summary[method] = numbers
    return summary


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def format_table(summary: dict[str, dict]) -> str:
    """The numbers per method as aligned plain text; shares in percent."""
    with_depth = [numbers["against_depth"] for numbers in summary.values() if "against_depth" in numbers]
    header = ["method", *(f"AUC@{threshold} [95%]" for threshold in AUC_THRESHOLDS), "precision", "m.score", "matches"]
    notes = ["precision: by epipolar error; m.score: matching score; ms: milliseconds per pair"]
    if with_depth:
        recall = _percent(with_depth[0]["baseline_recall"])
        header += ["recall*", "prec*", f"prec*@{recall}"]
        notes.append(f"*: against the correspondences by depth; prec*@{recall}: at that recall")
    header += [f"{stage} ms" for stage in STAGES]
    table = [header]
    for method, numbers in summary.items():
        row = [method]
        for threshold in map(str, AUC_THRESHOLDS):
            if "auc" not in numbers:
                row.append("-")
                continue
            low, high = (round(100 * bound) for bound in numbers["auc_interval"][threshold])
            row.append(f"{_percent(numbers['auc'][threshold])} [{low}, {high}]")
        row += [_percent(numbers["precision"]), _percent(numbers["matching_score"]), f"{numbers['matches']:.0f}"]
        if with_depth:
            against = numbers.get("against_depth", {})
            row += [_percent(against.get(key)) for key in ("recall", "precision", "precision_at_baseline_recall")]
        row += [f"{numbers['ms'][stage]:.1f}" for stage in STAGES]
        table.append(row)
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))) for row in table]
    return "\n".join([*lines, "; ".join(notes)])


def write_results(path, settings: dict, summary: dict, skipped: list) -> None:
    """Write results.json: settings, versions, the numbers per method, the pairs left out."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "opencv": cv2.__version__}
    write_json(path, {"settings": settings, "versions": versions, "methods": summary,
                      "skipped": [{"pair": name, "reason": reason} for name, reason in skipped]})


def write_pairs_csv(path, results: dict[str, list[PairResult]]) -> None:
    """Write a line per pair and method; empty where the ground truth is not known."""
    header = ["pair", "image0", "image1", "method", "error", "error_R", "error_t", "keypoints0", "keypoints1",
              "matches", "inliers", "precision", "matching_score", "true", "used_with_depth", "correct",
              *(f"ms_{stage}" for stage in STAGES)]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for method, rows in results.items():
            for row in rows:
                writer.writerow([row.index, *row.names, method, row.error, row.error_R, row.error_t, row.n_keypoints0,
                                 row.n_keypoints1, len(row.matches), int(np.sum(row.inliers)), row.precision,
                                 row.matching_score, row.n_true, row.n_used, row.n_correct,
                                 *(round(1000 * row.seconds[stage], 3) for stage in STAGES)])


def plot_pose_recall(path, results: dict[str, list[PairResult]]) -> None:
    """Write a PNG: share of pairs (percent) whose pose error is at most x degrees, one curve a method."""
    degrees = np.linspace(0, AUC_THRESHOLDS[-1], 401)
    curves = {}
    for method, rows in results.items():
        errors = np.sort(pose_errors(rows))
        curves[method] = (degrees, 100 * np.searchsorted(errors, degrees, side="right") / len(errors))
    plot_curves(path, curves, "pose error (degrees)", "pairs below it (%)", ylim=(0, 100))
