"""Match the pairs of a set, estimate their poses and report how good both are (SPEC 12-14).

    python3 -m eval.eval_imp --matching_method NN_ratio IMP --dataset yfcc --feature_type sift
    python3 -m eval.eval_imp --matching_method NN_ratio --pairs pairs.txt --image_dir images --feature_type sift

The first method is the baseline: where depth is known, precision against the true correspondences is given at its
recall. Results go to --save_path: results.json, pairs.csv, pose_recall.png and pairs_*.png.
"""
import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from eval.matchers import MATCHERS, NETWORKS, MatcherSettings
from eval.metrics import epipolar_error, pose_auc, pose_error
from eval.pair_sets import EvalPair, Hdf5PairSet, ListPairSet, upright_images
from eval.pose import ESTIMATORS, estimate_pose
from eval.report import (
    PairResult,
    format_table,
    plot_pose_recall,
    pose_errors,
    summarize,
    write_pairs_csv,
    write_results,
)
from tools.cli import InputError, report_skipped, run
from tools.config import read_yaml
from tools.correspondences import match_by_projection
from tools.features import DESCRIPTOR_DIM, build_extractor
from tools.files import write_image
from tools.geometry import essential_matrix, opencv_to_colmap_K, to_camera_coordinates
from tools.pair_list import read_pair_list
from tools.visualize import draw_matches

PRECISION_THRESHOLD = 0.005  # epipolar error in camera coordinates below which a match counts as right
DEFAULT_POSE_THRESHOLD = {"yfcc": 1.0, "scannet": 3.0, None: 3.0}  # pixels


@dataclass
class Outcome:
    """What a method made of a pair.

    all_matches (M, 2) and all_scores (M,): whatever it matched; used (M,) bool: those it stands by; pose: R, t and
    inliers (U,) among the used, or None; seconds: of matching and of pose.
    """

    all_matches: np.ndarray
    all_scores: np.ndarray
    used: np.ndarray
    pose: tuple | None
    seconds: dict


def to_data(pair: EvalPair, device="cpu") -> dict[str, torch.Tensor]:
    """A pair as a batch of one, for a matcher: descriptors, scores, keypoints and image_size of both views."""
    data = {}
    for view, features in (("0", pair.features0), ("1", pair.features1)):
        for name in ("descriptors", "scores", "keypoints", "image_size"):
            values = np.asarray(getattr(features, name), np.float32)
            data[name + view] = torch.from_numpy(values)[None].to(device)
    return data


def match_one_shot(matcher, data: dict, estimate) -> Outcome:
    """Match once, keep what scores above the matcher's threshold, and estimate one pose.

    estimate: matches (M, 2) -> R, t, inliers or None.
    """
    start = time.perf_counter()
    if data["keypoints0"].shape[1] and data["keypoints1"].shape[1]:
        out = matcher(data)
        matches0, scores0 = out["matches0"].cpu().numpy(), out["matching_scores0"].cpu().numpy()
    else:  # a view without keypoints
        matches0, scores0 = np.full(data["keypoints0"].shape[1], -1), np.zeros(data["keypoints0"].shape[1], np.float32)
    matched = np.flatnonzero(matches0 >= 0)
    all_matches, all_scores = np.stack([matched, matches0[matched]], axis=1), scores0[matched]
    used = all_scores > getattr(matcher, "threshold", 0.0)
    after_matching = time.perf_counter()
    pose = estimate(all_matches[used])
    seconds = {"matching": after_matching - start, "pose": time.perf_counter() - after_matching}
    return Outcome(all_matches, all_scores, used, pose, seconds)


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


def score_pair(pair: EvalPair, outcome: Outcome, true0: np.ndarray | None, seconds_features: float) -> PairResult:
    """What is reported of a method on a pair; true0 as from `true_correspondences`."""
    matches = outcome.all_matches[outcome.used]
    inliers = np.zeros(len(matches), bool) if outcome.pose is None else outcome.pose[2]
    result = PairResult(pair.index, pair.names, len(pair.features0.scores), len(pair.features1.scores), matches,
                        outcome.all_scores[outcome.used], inliers, {"features": seconds_features, **outcome.seconds})
    if pair.T_0to1 is not None and pair.K0 is not None:
        result.error_t = result.error_R = np.inf
        if outcome.pose is not None:
            result.error_t, result.error_R = pose_error(pair.T_0to1, *outcome.pose[:2])
        x0 = to_camera_coordinates(pair.features0.keypoints[matches[:, 0]], pair.K0)
        x1 = to_camera_coordinates(pair.features1.keypoints[matches[:, 1]], pair.K1)
        result.epipolar_errors = epipolar_error(x0, x1, essential_matrix(pair.T_0to1))
        n_right = int(np.sum(result.epipolar_errors < PRECISION_THRESHOLD))
        result.precision = n_right / max(len(matches), 1)
        result.matching_score = n_right / max(result.n_keypoints0, 1)
    if true0 is not None:
        index0, index1 = outcome.all_matches.T
        judged = (pair.depth0[index0] > 0) & (pair.depth1[index1] > 0)
        correct = true0[index0] == index1
        result.scores, result.correct = outcome.all_scores[judged], correct[judged]
        result.n_true = int(np.sum(true0 >= 0))
        result.n_used = int(np.sum(judged & outcome.used))
        result.n_correct = int(np.sum(correct & judged & outcome.used))
    return result


def evaluate(pair_set, matchers: dict, threshold: float, estimator: str = "magsac", seed: int = 0, device="cpu",
             limit: int | None = None) -> tuple[dict[str, list[PairResult]], list[tuple[str, str]]]:
    """Run matchers {name: matcher} on the pairs of a set (eval.pair_sets).

    threshold: of the pose estimator, in pixels; limit: that many pairs, spread evenly over the set.
    Returns the results per method, and (name, reason) of the pairs that could not be read.
    """
    results, skipped = {name: [] for name in matchers}, []
    positions = np.arange(len(pair_set))
    if limit is not None and limit < len(positions):
        positions = np.unique(np.linspace(0, len(positions) - 1, limit).round().astype(int))
    progress = tqdm(positions, "pairs", disable=None)
    for position in progress:
        start = time.perf_counter()
        try:
            pair = pair_set[position]
        except InputError as error:
            skipped.append((pair_set.name(position), str(error)))
            continue
        seconds_features = time.perf_counter() - start
        data, true0 = to_data(pair, device), true_correspondences(pair)

        def estimate(matches, pair=pair):
            if pair.K0 is None:
                return None
            return estimate_pose(pair.features0.keypoints[matches[:, 0]], pair.features1.keypoints[matches[:, 1]],
                                 pair.K0, pair.K1, threshold, estimator, seed)

        for name, matcher in matchers.items():
            outcome = match_one_shot(matcher, data, estimate)
            results[name].append(score_pair(pair, outcome, true0, seconds_features))
        errors = pose_errors(results[name])
        if errors:
            progress.set_postfix_str(f"{name} AUC@10 {100 * pose_auc(errors, [10])[0]:.1f}")
    return results, skipped


def write_pictures(folder, pair_set, results: dict[str, list[PairResult]], count: int) -> list[tuple[str, str]]:
    """Draw pairs from the easiest to the hardest for the last method, all methods below each other, as pairs_*.png.

    Pairs without a known pose are ordered by their number of matches. Returns (name, reason) of pictures not drawn.
    """
    rows = list(results.values())[-1]
    ranking = sorted(range(len(rows)), key=lambda i: (rows[i].error is None, rows[i].error or 0, -len(rows[i].matches)))
    chosen = [ranking[place] for place in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]
    names = ["easy", *(f"middle{number}" for number in range(1, len(chosen) - 1)), "hard"]
    for pattern in ("pairs_easy.png", "pairs_middle*.png", "pairs_hard.png"):  # of an earlier run, they would mislead
        for stale in Path(folder).glob(pattern):
            stale.unlink()
    failed = []
    for name, i in zip(names, chosen):
        try:
            pair = pair_set[rows[i].index]
            images = upright_images(pair)
        except InputError as error:
            failed.append((f"pairs_{name}.png", str(error)))
            continue
        strips = []
        for method, of_method in results.items():
            row = of_method[i]
            title = [f"{method}   {row.names[0]}   {row.names[1]}"]
            if row.error is not None:
                title.append(f"rotation {row.error_R:.1f}, translation {row.error_t:.1f} degrees off; "
                             f"{int(np.sum(row.inliers))} inliers" if np.isfinite(row.error) else "no pose found")
            strips.append(draw_matches(
                *images, pair.features0.keypoints[row.matches[:, 0]], pair.features1.keypoints[row.matches[:, 1]],
                title, row.epipolar_errors, row.matching_scores, PRECISION_THRESHOLD))
        write_image(Path(folder) / f"pairs_{name}.png", cv2.vconcat(strips))
    return failed


def build_pair_set(args):
    """The set that the command line names; InputError says what is missing."""
    if args.pairs:
        if not args.image_dir:
            raise InputError("--pairs needs --image_dir, the folder that the names in the list are relative to")
        settings = {"max_keypoints": args.max_keypoints}
        if args.feature_type == "sift":
            settings |= {"contrast_threshold": args.contrast_threshold, "unique_locations": args.unique_locations}
        return ListPairSet(read_pair_list(args.pairs), args.image_dir, build_extractor(args.feature_type, **settings),
                           args.resize, args.depth_dir)
    config_path = args.config or f"configs/{args.dataset}_eval_{args.feature_type}.yaml"
    path, image_dir = args.hdf5, args.image_dir
    if not (path and image_dir):
        config = read_yaml(config_path)
        for key, value in (("dataset", args.dataset), ("feature_type", args.feature_type)):
            if config.get(key, value) != value:
                raise InputError(f"{config_path} is for {key} {config[key]}, not {value}")
        path, image_dir = path or config.get("output"), image_dir or config.get("raw_data_dir")
    if not path or not image_dir:
        raise InputError(f"{config_path} lacks {'raw_data_dir' if path else 'output'}")
    if not Path(path).is_file():
        raise InputError(f"no features at {path}: make them with python3 -m dump.dump --config {config_path}")
    pair_set = Hdf5PairSet(path, image_dir)
    if pair_set.descriptor_dim != DESCRIPTOR_DIM[args.feature_type]:
        raise InputError(f"{path} holds descriptors of {pair_set.descriptor_dim} channels, "
                         f"{args.feature_type} has {DESCRIPTOR_DIM[args.feature_type]}: check --feature_type")
    return pair_set


def build_matchers(args) -> dict:
    """The matchers that the command line names, in its order."""
    if args.weights and sum(method in NETWORKS for method in args.matching_method) > 1:
        raise InputError("--weights goes with one network: evaluate the others by a command of their own")
    settings = MatcherSettings(args.feature_type, args.dataset, args.weights, args.use_dual_softmax, args.ratio,
                               args.match_threshold, args.n_layers, args.device)
    return {method: MATCHERS[method](settings) for method in args.matching_method}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.eval_imp", description=__doc__.split("\n\n")[0])
    parser.add_argument("--matching_method", nargs="+", required=True, choices=list(MATCHERS), metavar="METHOD",
                        help=f"one or more of {', '.join(MATCHERS)}; the first is the baseline")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", choices=("yfcc", "scannet"), help="features and pairs from dump.dump's HDF5 file")
    source.add_argument("--pairs", help="pair list with ground truth; features are extracted from the images")
    parser.add_argument("--feature_type", choices=list(DESCRIPTOR_DIM), required=True, help="local features")
    parser.add_argument("--config", help="YAML file of dump.dump (default: configs/{dataset}_eval_{feature}.yaml)")
    parser.add_argument("--hdf5", help="file of dump.dump, if not the one the config names")
    parser.add_argument("--image_dir", help="images of the pair list, or of --hdf5")
    parser.add_argument("--depth_dir", help="depth maps of the pair list's images: a/b.h5 or a/b.png for a/b.jpg")
    parser.add_argument("--weights", help="checkpoint (default: the method's file under weights/)")
    parser.add_argument("--use_dual_softmax", action="store_true", help="dual softmax instead of Sinkhorn")
    parser.add_argument("--n_layers", type=int, help="iterations of the network (default: all)")
    parser.add_argument("--match_threshold", type=float, default=0.2,
                        help="score of a network's match (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.8, help="of NN_ratio (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="of the pose estimator, pixels (default: 1 for yfcc, else 3)")
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="magsac",
                        help="of the pose (default: %(default)s)")
    parser.add_argument("--max_keypoints", type=int, default=2000,
                        help="pair list: keypoints of an image (default: %(default)s)")
    parser.add_argument("--contrast_threshold", type=float, default=1e-5,
                        help="pair list: of sift (default: %(default)s)")
    parser.add_argument("--unique_locations", action="store_true", help="pair list: one sift keypoint per place")
    parser.add_argument("--resize", type=int, nargs="+", metavar="PIXELS",
                        help="pair list: width and height, or the longer side, to extract features at")
    parser.add_argument("--limit", type=int, help="evaluate that many pairs, spread evenly over the set")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the pose estimator and of the intervals (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=4,
                        help="how many pairs to draw, easy to hard (default: %(default)s)")
    parser.add_argument("--save_path", help="folder of the results (default: runs/eval/{set}_{feature})")
    args = parser.parse_args(argv)
    if args.resize and (len(args.resize) > 2 or min(args.resize) < 1):
        parser.error("--resize takes a width and a height, or the longer side, in pixels")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit is a number of pairs, 1 or more")
    if args.threshold is None:
        args.threshold = DEFAULT_POSE_THRESHOLD[args.dataset]
    if args.save_path is None:
        args.save_path = f"runs/eval/{args.dataset or Path(args.pairs).stem}_{args.feature_type}"
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    pair_set, matchers = build_pair_set(args), build_matchers(args)
    results, skipped = evaluate(pair_set, matchers, args.threshold, args.estimator, args.seed, args.device, args.limit)
    if not results[args.matching_method[0]]:
        raise InputError(f"none of the pairs could be read; the first: {skipped[0][0]}: {skipped[0][1]}")
    summary = summarize(results, args.seed)
    print(format_table(summary))
    folder = Path(args.save_path)
    write_results(folder / "results.json", vars(args), summary, skipped)
    write_pairs_csv(folder / "pairs.csv", results)
    if any(numbers["pairs_with_pose"] for numbers in summary.values()):
        plot_pose_recall(folder / "pose_recall.png", results)
    not_drawn = write_pictures(folder, pair_set, results, args.pictures)
    print(f"results: {folder}")
    return max(report_skipped(skipped, "pairs"), report_skipped(not_drawn, "pictures"))


if __name__ == "__main__":
    sys.exit(run(main))
