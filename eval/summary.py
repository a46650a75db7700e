"""What was found on each pair -> numbers per method, tables, plots and the files of a run."""
import csv
import platform
from importlib.metadata import version

import cv2
import numpy as np
import torch

from eval.hpatches import ACCURACY_THRESHOLDS
from eval.methods import Method, PoseSetting
from eval.results import STAGES, PairResult
from eval.run import Results, pose_errors
from tools.files import atomic_path, write_json
from tools.metrics import bootstrap_interval, pose_auc, precision_at_recall
from tools.visualize import plot, plot_curves

AUC_THRESHOLDS = (5, 10, 20)  # degrees
HOMOGRAPHY_THRESHOLDS = (1, 3, 5)  # pixels, of corner errors and of matches
VERSION = 2  # of results.json


def _mean(values, function=np.mean) -> float | None:
    known = [value for value in values if value is not None]
    return float(function(known)) if known else None


def select(results: dict[str, list[PairResult]], prefix: str) -> dict[str, list[PairResult]]:
    """The results of the pairs whose images have names that start so."""
    return {method: [row for row in rows if row.names[0].startswith(prefix)] for method, rows in results.items()}


def _thresholds(rows: list[PairResult]) -> tuple[int, ...]:
    """At which AUC is given, of pose errors or of corner errors."""
    return AUC_THRESHOLDS if all(row.error_H is None for row in rows) else HOMOGRAPHY_THRESHOLDS


def _auc(errors: list[list[float]], seed: int, thresholds=AUC_THRESHOLDS, baseline=None) -> dict:
    """Mean AUC of some runs over the same pairs at each threshold, and its 95% interval; {} without errors.

    baseline: errors of another method on these pairs, for the interval of the gain over it.
    """
    if not errors[0]:
        return {}
    names = list(map(str, thresholds))
    aucs = np.mean([pose_auc(run, thresholds) for run in errors], axis=0)
    numbers = {"auc": dict(zip(names, aucs.tolist())),
               "auc_interval": dict(zip(names, bootstrap_interval(errors, thresholds, seed)))}
    if baseline is not None:
        gains = bootstrap_interval(errors, thresholds, seed, baseline=baseline)
        numbers["auc_gain_interval"] = dict(zip(names, gains))
    return numbers


def summarize(results: dict[str, list[PairResult]], seed: int, others=()) -> dict[str, dict]:
    """Numbers per method. With depth, the first method's recall is the one at which all methods' precision is given.

    others: results of the same pairs with other seeds of the estimator; AUCs are means over all. Shares and AUCs in
    [0, 1]; precision and matching score are means over pairs, the ones against depth are pooled. epipolar_error, in
    camera coordinates: mean over pairs of the mean of a pair's matches, and median of the medians. Of the loop also
    what `summarize_iterations` gives (by_iteration). auc_gain_interval: of the AUC less the first method's, by a
    bootstrap over the same pairs. Of homographies: AUC of the corner error, and match_accuracy, {pixels: mean over
    pairs of the share of matches that the true homography maps within so many}.
    """
    summary, baseline, baseline_recall = {}, None, None
    for method, rows in results.items():
        errors = pose_errors(rows)
        with_depth = [row for row in rows if row.n_true is not None]
        runs = [errors, *(pose_errors(other[method]) for other in others)]
        same_pairs = np.shape(baseline) == np.shape(runs)
        numbers = {"pairs": len(rows), "pairs_with_pose": len(errors),
                   **_auc(runs, seed, _thresholds(rows), baseline if same_pairs else None)}
        baseline = runs if baseline is None else baseline
        if errors:
            numbers["pose_found"] = float(np.mean(np.isfinite(errors)))
        if rows and rows[0].accuracy is not None:
            accuracy = np.mean([row.accuracy for row in rows], axis=0).tolist()
            numbers["match_accuracy"] = dict(zip(map(str, ACCURACY_THRESHOLDS), accuracy))
        numbers["precision"] = _mean(row.precision for row in rows)
        numbers["matching_score"] = _mean(row.matching_score for row in rows)
        numbers["epipolar_error"] = {"mean": _mean(row.epipolar_mean for row in rows),
                                     "median": _mean((row.epipolar_median for row in rows), np.median)}
        numbers["matches"] = _mean(row.n_matches for row in rows)
        numbers["inliers"] = _mean(row.n_inliers for row in rows)
        numbers["keypoints"] = _mean((row.n_keypoints0 + row.n_keypoints1) / 2 for row in rows)
        numbers["iterations"] = _mean(row.n_iterations for row in rows)
        numbers["ms"] = {stage: 1000 * _mean(row.seconds[stage] for row in rows) for stage in STAGES}
        if any(row.stopped_early is not None for row in rows):
            numbers["stopped_early"] = _mean(row.stopped_early for row in rows)
            numbers["keypoints_kept"] = _mean((row.steps[-1].kept0 + row.steps[-1].kept1) / 2
                                              for row in rows if row.steps)
            numbers["by_iteration"] = summarize_iterations(rows, seed)

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


def summarize_iterations(rows: list[PairResult], seed: int) -> list[dict]:
    """What the loop would give if it ended after so many iterations, for each number at which it reads matches.

    iterations; running: share of the pairs that get that far; stopped: share that ends just there because two poses
    agreed; keypoints_kept: mean of both views over the pairs that get that far; auc, auc_interval and precision: of the
    poses read then, and for pairs that end there or have ended before, of their last.
    """
    numbers = []
    for iterations in sorted({step.iterations for row in rows for step in row.steps}):
        sources, kept, n_stopped = [], [], 0
        for row in rows:
            step = next((step for step in row.steps if step.iterations == iterations), None)
            ends = step is not None and step is row.steps[-1]
            sources.append(row if step is None or ends else step)
            if step is not None:
                kept.append((step.kept0 + step.kept1) / 2)
            n_stopped += bool(ends and row.stopped_early)
        numbers.append({"iterations": iterations, "running": len(kept) / len(rows), "stopped": n_stopped / len(rows),
                        "keypoints_kept": float(np.mean(kept)), **_auc([pose_errors(sources)], seed),
                        "precision": _mean(source.precision for source in sources)})
    return numbers


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _rounded(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _auc_cells(numbers: dict) -> dict[str, str]:
    cells = {} if "auc" in numbers else {f"AUC@{threshold} [95%]": "-" for threshold in AUC_THRESHOLDS}
    for threshold, value in numbers.get("auc", {}).items():
        low, high = (round(100 * bound) for bound in numbers["auc_interval"][threshold])
        cells[f"AUC@{threshold} [95%]"] = f"{_percent(value)} [{low}, {high}]"
    return cells


def align(rows: list[dict[str, str]]) -> list[str]:
    """Rows {column: cell} -> lines, the columns' names above; the first column to the left, the others to the right."""
    table = [list(rows[0]), *(row.values() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.rjust(width) if column else cell.ljust(width)
                      for column, (cell, width) in enumerate(zip(row, widths))) for row in table]


def format_table(summary: dict[str, dict]) -> str:
    """The numbers per method as aligned plain text; shares in percent."""
    recalls = [numbers["against_depth"]["baseline_recall"] for numbers in summary.values()
               if "against_depth" in numbers]
    with_iterations = any(numbers["iterations"] is not None for numbers in summary.values())
    homographies = any("match_accuracy" in numbers for numbers in summary.values())
    notes = ["AUC: of the corner error; MMA: mean matching accuracy; both at pixels; ms: milliseconds per pair"
             if homographies else "precision: by epipolar error; m.score: matching score; ms: milliseconds per pair"]
    if recalls:
        recall = _percent(recalls[0])
        notes.append(f"*: against the correspondences by depth; prec*@{recall}: at that recall")
    if with_iterations:
        notes.append("kept: keypoints of a view at the last iteration of the loop")
    table = []
    for method, numbers in summary.items():
        row = {"method": method, **_auc_cells(numbers)}
        if homographies:
            row |= {f"MMA@{pixels}": _percent(numbers["match_accuracy"][str(pixels)])
                    for pixels in HOMOGRAPHY_THRESHOLDS}
        else:
            row |= {"precision": _percent(numbers["precision"]), "m.score": _percent(numbers["matching_score"])}
        row["matches"] = _rounded(numbers["matches"])
        if recalls:
            against = numbers.get("against_depth", {})
            row |= {"recall*": _percent(against.get("recall")), "prec*": _percent(against.get("precision")),
                    f"prec*@{recall}": _percent(against.get("precision_at_baseline_recall"))}
        if with_iterations:
            row |= {"iterations": _rounded(numbers["iterations"], 1), "kept": _rounded(numbers.get("keypoints_kept"))}
        table.append(row | {f"{stage} ms": _rounded(numbers["ms"][stage], 1) for stage in STAGES})
    first, *rest = summary
    gains = []
    for method in rest:
        for threshold, interval in list(summary[method].get("auc_gain_interval", {}).items())[-1:]:
            low, high = (100 * bound for bound in interval)
            gains.append(f"AUC@{threshold} of {method} less that of {first}: 95% in [{low:+.1f}, {high:+.1f}]")
    return "\n".join([*align(table), *gains, *notes])


def format_iterations(numbers: dict) -> str:
    """What `summarize` tells of a loop, as aligned plain text."""
    return "\n".join(align([{"if ended after": f"{row['iterations']} iterations", **_auc_cells(row),
                    "precision": _percent(row["precision"]), "running": _percent(row["running"]),
                    "stopped": _percent(row["stopped"]), "kept": _rounded(row["keypoints_kept"])}
                   for row in numbers["by_iteration"]]))


def write_results(path, settings: dict, summaries: dict[tuple[PoseSetting, str | None], dict], skipped: list,
                  **notes) -> None:
    """Write results.json: version, settings, versions, a table per estimator and part of the set, the pairs left out,
    and notes."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "opencv": cv2.__version__, "poselib": version("poselib")}
    tables = [{"estimator": setting.estimator, "threshold": setting.threshold, **({"part": part} if part else {}),
               "methods": summary} for (setting, part), summary in summaries.items()]
    write_json(path, {"version": VERSION, "settings": settings, "versions": versions, "tables": tables, **notes,
                      "skipped": [{"pair": name, "reason": reason} for name, reason in skipped]})


def write_csv(path, rows: list[dict]) -> None:
    """Write rows of the same keys as a table, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _each(results: Results):
    """Yield the first columns of a table, and the result, of each setting, method and pair."""
    for setting, by_method in results.items():
        for method, rows in by_method.items():
            for row in rows:
                yield {"pair": row.index, "image0": row.names[0], "image1": row.names[1], "method": method,
                       "estimator": setting.estimator, "threshold": setting.threshold}, row


def write_pairs_csv(path, results: Results) -> None:
    """Write a line per pair, method and estimator; empty where the ground truth is not known."""
    write_csv(path, [{
        **key, "error": row.error, "error_R": row.error_R, "error_t": row.error_t, "keypoints0": row.n_keypoints0,
        "keypoints1": row.n_keypoints1, "matches": row.n_matches, "inliers": row.n_inliers, "precision": row.precision,
        "matching_score": row.matching_score, "epipolar_mean": row.epipolar_mean,
        "epipolar_median": row.epipolar_median, "true": row.n_true, "used_with_depth": row.n_used,
        "correct": row.n_correct, "iterations": row.n_iterations, "stopped_early": row.stopped_early,
        **({} if row.accuracy is None else {f"within_{n}_px": row.accuracy[n - 1] for n in HOMOGRAPHY_THRESHOLDS}),
        **{f"ms_{stage}": round(1000 * row.seconds[stage], 3) for stage in STAGES}} for key, row in _each(results)])


def write_iterations_csv(path, results: Results) -> None:
    """Write a line for each time that the loop read the matches of a pair."""
    write_csv(path, [{
        **key, "iterations": step.iterations, "kept0": step.kept0, "kept1": step.kept1, "matches": step.n_matches,
        "inliers": step.n_inliers, "error": step.error, "error_R": step.error_R, "error_t": step.error_t,
        "precision": step.precision} for key, row in _each(results) for step in row.steps])


def _named(results: Results) -> dict[str, list[PairResult]]:
    """{label: rows} of every method, with the estimator where there are several."""
    return {method if len(results) == 1 else f"{method}, {setting}": rows
            for setting, by_method in results.items() for method, rows in by_method.items()}


def plot_pose_recall(path, results: Results) -> None:
    """Write a PNG: share of pairs (percent) whose pose error (or corner error) is at most x, one curve a method."""
    thresholds, curves = AUC_THRESHOLDS, {}
    for label, rows in _named(results).items():
        thresholds, errors = _thresholds(rows), np.sort(pose_errors(rows))
        x = np.linspace(0, thresholds[-1], 401)
        curves[label] = (x, 100 * np.searchsorted(errors, x, side="right") / len(errors))
    plot_curves(path, curves, "pose error (degrees)" if thresholds == AUC_THRESHOLDS else "corner error (pixels)",
                "pairs below it (%)", ylim=(0, 100))


def plot_iterations_used(path, results: Results) -> None:
    """Write a PNG: share of pairs (percent) by how many iterations the loop ran, a bar for each method beside others.

    The hatched part of a bar is pairs in which no two poses in a row agreed.
    """
    loops = {label: rows for label, rows in _named(results).items() if any(row.steps for row in rows)}
    used = sorted({step.iterations for rows in loops.values() for row in rows for step in row.steps})
    width, ran_on = 0.8 / len(loops), {"facecolor": "none", "hatch": "////"}
    with plot(path, legend_above=True) as (axes,):
        for place, (label, rows) in enumerate(loops.items()):
            x = np.arange(len(used)) + (place - (len(loops) - 1) / 2) * width
            agreed, others = (np.array([100 * np.mean([row.n_iterations == n and row.stopped_early is stopped
                                                       for row in rows]) for n in used]) for stopped in (True, False))
            axes.bar(x, agreed, width * 0.92, label=label, color=f"C{place}")
            axes.bar(x, others, width * 0.92, bottom=agreed, edgecolor=f"C{place}", **ran_on)
        axes.bar([0], [0], edgecolor="gray", label="no two poses agreed", **ran_on)
        axes.set(xlabel="iterations used", ylabel="pairs (%)", xticks=np.arange(len(used)), xticklabels=used)


def plot_time_auc(path, summary: dict[str, dict], methods: dict[str, Method]) -> None:
    """Write a PNG: AUC@10 (percent) over milliseconds per pair, of matching and pose.

    summary: as from `summarize`; methods: networks are drawn, each one's one-shot methods (fewest
    iterations first) as a curve, its loops as stars.
    """
    def draw(axes, methods, label, digits, **style):
        rows = [summary[method] for method in methods]
        x = [row["ms"]["matching"] + row["ms"]["pose"] for row in rows]
        y = np.array([100 * row["auc"]["10"] for row in rows])
        low, high = 100 * np.array([row["auc_interval"]["10"] for row in rows]).T
        axes.errorbar(x, y, np.maximum([y - low, high - y], 0), elinewidth=0.6, label=label, **style)
        for row, *point in zip(rows, x, y):
            axes.annotate(f"{row['iterations']:.{digits}f}", point, xytext=(4, 4), fontsize=8,
                          textcoords="offset points", color=style["color"])

    with plot(path, legend_above=True) as (axes,):
        networks = dict.fromkeys(method.matcher.name for method in methods.values() if method.matcher.n_layers)
        for place, network in enumerate(networks):
            one_shot, loops = ([name for name, method in methods.items() if method.matcher.name == network
                                and method.iterative is iterative] for iterative in (False, True))
            name = f"{network} one-shot" if methods[one_shot[0]].matcher.iterates else network
            draw(axes, one_shot, name, 0, color=f"C{place}", fmt="o-", markersize=4, linewidth=1.5)
            for loop in loops:
                draw(axes, [loop], loop, 1, color=f"C{place}", fmt="*", markersize=13)
        axes.set(xlabel="matching and pose (ms per pair); numbers: iterations", ylabel="AUC@10 (%), 95% interval",
                 xlim=(0, None))
