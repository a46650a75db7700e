"""Match the pairs of a set, estimate their poses and report how good both are.

    python3 -m eval.eval_imp --matching_method NN_ratio IMP --dataset yfcc --feature_type sift
    python3 -m eval.eval_imp --matching_method IMP EIMP --use_iterative --dataset scannet --feature_type spp
    python3 -m eval.eval_imp --matching_method NN_ratio --pairs pairs.txt --image_dir images --feature_type sift
    python3 -m eval.eval_imp --matching_method NN_ratio IMP --dataset hpatches --image_dir hpatches --feature_type sift

With --use_iterative each network has a second row, `IMP iterative`: matching and pose estimation together, beside the
same network one-shot. The first method is the baseline: where depth is known, precision against the true
correspondences is given at its recall. Results go to --save_path: results.json, pairs.csv, pose_recall.png and
pairs_*.png; of the loop also iterations.csv and iterations_used.png. An interrupted run resumes when started again.
"""
import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import torch

from eval import summary
from eval.hpatches import SPLITS, HPatchesPairSet
from eval.iterative import PairMatches
from eval.journal import Journal
from eval.methods import MATCHERS, MatcherSettings, Method, PoseSetting, default_feature_type
from eval.pair_sets import EvalPair, Hdf5PairSet, ListPairSet, read_scannet_pairs, upright_images
from eval.results import PairResult, errors_to_draw
from eval.run import Results, evaluate, run_pair
from tools.cli import MOST_KEYPOINTS, InputError, number, reason, report_skipped, run, whole_number
from tools.config import read_config
from tools.distributed import choose_device
from tools.extras import import_pycolmap
from tools.features import FEATURE_TYPES, build_extractor
from tools.files import check_folder, file_hash, write_image
from tools.original import from_dump_config, from_eval_config, is_dump_config, is_eval_config
from tools.pair_list import read_pair_list
from tools.pose import ESTIMATORS, HOMOGRAPHY_ESTIMATORS, PUBLISHED_ESTIMATOR
from tools.precision import PRECISIONS, check_precision
from tools.scannet import read_scannet_camera
from tools.scene_info import read_megadepth1500
from tools.visualize import draw_matches

DATASETS = ("yfcc", "scannet", "megadepth1500", "hpatches")
DEFAULT_POSE_THRESHOLD = {"yfcc": 1.0, "megadepth1500": 1.0, "scannet": 3.0, "hpatches": 3.0, None: 3.0}  # pixels
JOURNAL = "journal.jsonl"
# an unfinished run may resume with another value: it changes which pairs are done, how fast, and what is drawn of them
FREE_TO_CHANGE = ("limit", "workers", "pictures", "save_path")
MEGADEPTH1500_SCENES = ("0015", "0022")


def write_pictures(folder, pair_set, methods: dict[str, Method], results: dict[str, list[PairResult]],
                   setting: PoseSetting, count: int, device="cpu") -> list[tuple[str, str]]:
    """Draw pairs from the easiest to the hardest for the last method, all methods below each other, as pairs_*.png.

    results: those of `evaluate` with `setting`. Pairs without a known pose are ordered by their number of matches.
    Returns (name, reason) of pictures not drawn.
    """
    *_, last = results.values()
    ranking = sorted(range(len(last)), key=lambda i: (last[i].error is None, last[i].error or 0, -last[i].n_matches))
    chosen = [ranking[place] for place in np.unique(np.linspace(0, len(last) - 1, count).round().astype(int))]
    names = ["easy", *(f"middle{number}" for number in range(1, len(chosen) - 1)), "hard"]
    for pattern in ("pairs_easy.png", "pairs_middle*.png", "pairs_hard.png"):  # of an earlier run, they would mislead
        for stale in Path(folder).glob(pattern):
            stale.unlink()
    failed = []
    for name, i in zip(names, chosen):
        try:
            pair = pair_set[last[i].index]
            images, (by_method,) = upright_images(pair), run_pair(pair, methods, [setting], device).values()
            strips = [_draw_pair(pair, images, method, found, results[method][i])
                      for method, found in by_method.items()]
            write_image(Path(folder) / f"pairs_{name}.png", cv2.vconcat(strips))
        except Exception as error:
            failed.append((f"pairs_{name}.png", reason(error)))
    return failed


def _draw_pair(pair: EvalPair, images, method: str, found: PairMatches, result: PairResult) -> np.ndarray:
    title = [f"{method}   {'   '.join(pair.names)}"]
    if result.error is not None:
        off = (f"rotation {result.error_R:.1f}, translation {result.error_t:.1f} degrees" if pair.H_0to1 is None else
               f"corners {result.error:.1f} px")
        title.append(f"{off} off; {result.n_inliers} inliers" if np.isfinite(result.error) else
                     f"no {'pose' if pair.H_0to1 is None else 'homography'} found")
    errors, threshold = errors_to_draw(pair, found.matches)
    inliers = np.zeros(len(found.matches), bool) if found.pose is None else found.pose[-1]
    return draw_matches(*images, *pair.matched_keypoints(found.matches), title, errors, inliers, threshold)


def build_pair_set(args):
    """The set that the command line names; InputError says what is missing."""
    if args.dataset == "hpatches":
        if not args.image_dir:
            raise InputError("--dataset hpatches needs --image_dir, the folder of its sequences i_* and v_*")
        return HPatchesPairSet(args.image_dir, _build_extractor(args))
    if args.pairs:
        return _build_list_set(args)
    if args.dataset == "megadepth1500":
        raise InputError("--dataset megadepth1500 needs --pairs, the folder of 0015_0.1_0.3.npz and the like, and "
                         "--image_dir, MegaDepth's root")
    config_path = args.config or f"configs/{args.dataset}_eval_{args.feature_type}.yaml"
    path, image_dir, config = args.hdf5, args.image_dir, {}
    if args.config or not (path and image_dir):
        config = read_config(config_path)
        for is_theirs, translate in ((is_eval_config, from_eval_config), (is_dump_config, from_dump_config)):
            if is_theirs(config):  # the original's
                config = translate(config, str(config_path))
        for key, value in (("dataset", args.dataset), ("feature_type", args.feature_type)):
            if config.get(key, value) != value:
                raise InputError(f"{config_path} is for {key} {config[key]}, not {value}")
        path, image_dir = path or config.get("output"), image_dir or config.get("raw_data_dir")
    if not isinstance(path, str) or not isinstance(image_dir, str):
        raise InputError(f"{config_path} lacks {'raw_data_dir' if isinstance(path, str) else 'output'}")
    if not os.path.isfile(path):
        raise InputError(f"no features at {path}: make them with python3 -m dump.dump --config {config_path}")
    limit, max_keypoints = config.get("limit"), config.get("max_keypoints")
    args.limit, args.max_keypoints = args.limit or limit, max_keypoints or args.max_keypoints
    return Hdf5PairSet(path, image_dir, FEATURE_TYPES[args.feature_type].dim, max_keypoints)


def _build_list_set(args) -> ListPairSet:
    if not args.image_dir:
        raise InputError("--pairs needs --image_dir, the folder that the names of its images are relative to")
    camera = None
    if args.dataset == "megadepth1500":
        pairs = read_megadepth1500(args.pairs)
    elif args.dataset == "scannet":
        pairs, camera = read_scannet_pairs(args.pairs), lambda name: read_scannet_camera(args.image_dir, name)
    else:
        pairs = read_pair_list(args.pairs)
    return ListPairSet(pairs, args.image_dir, _build_extractor(args), args.resize, args.depth_dir, camera)


def _build_extractor(args):
    settings = FEATURE_TYPES[args.feature_type].eval_settings
    settings = {**settings, **{key: value for key, value in vars(args).items() if key in settings}}
    return build_extractor(args.feature_type, args.feature_weights, device=args.device, **settings)


def build_methods(args) -> dict[str, Method]:
    """What the command line names, in its order: {row of the table: Method}."""
    name, count = Counter(args.matching_method).most_common(1)[0]
    if count > 1:
        raise InputError(f"--matching_method names {name} {count} times: name it once, and give other --weights a run "
                         "of their own")
    networks = [name for name in args.matching_method if MATCHERS[name].takes_weights]
    weights = args.weights or [None]
    if args.weights and (not networks or len(weights) not in (1, len(networks))):
        raise InputError(f"--weights names {len(weights)} files for the networks {', '.join(networks) or '(none)'}: "
                         "give one for each, in their order, or one for all")
    weights = dict(zip(networks, weights if len(weights) > 1 else weights * len(networks)))
    schedule = {} if args.schedule is None else {"first": args.schedule[0] - 1, "every": args.schedule[1]}
    schedule |= {} if args.same_pose is None else {"same_pose": args.same_pose}
    methods = {}
    for name in args.matching_method:
        method = Method(MATCHERS[name](MatcherSettings(
            args.feature_type, args.dataset, weights.get(name), args.use_dual_softmax, args.ratio,
            args.match_threshold, args.n_layers, args.device, not args.no_pruning, args.precision)))
        matcher = method.matcher
        matcher.schedule = replace(matcher.schedule, **schedule)
        if args.plot_time_auc and matcher.iterates:
            for n_iterations in range(3, matcher.n_iterations, 2):
                methods[f"{name} {n_iterations} iterations"] = method.with_iterations(n_iterations)
        methods[name] = method
        if args.use_iterative and matcher.iterates:
            uncertain = args.use_uncertainty and matcher.network.pools
            row = f"{name} iterative{', uncertainty' if uncertain else ''}"
            methods[row] = replace(method, iterative=True, use_uncertainty=uncertain,
                                   published=args.protocol == "published")
    return methods


def warn_of_training_scenes(pair_set, methods: dict[str, Method]) -> dict[str, list[str]]:
    """Say on stderr which weights were trained on scenes that the set tests, and which do not say what they know.

    A scene is tested if a folder in the name of an image has its name. Returns {weight file: scenes}.
    """
    folders = {part for name in pair_set.image_names() for part in PurePosixPath(name).parts[:-1]}
    scenes_by_path = {str(method.matcher.path): method.matcher.scenes for method in methods.values()
                      if method.matcher.path}
    found = {}
    for path, scenes in scenes_by_path.items():
        tested = sorted(folders & set(scenes or ()))
        if tested:
            found[path] = tested
            print(f"warning: {path} was trained on {', '.join(tested[:5])}{', ...' if len(tested) > 5 else ''}, which "
                  "this set tests: its numbers do not tell how it does on other scenes", file=sys.stderr)
        elif scenes is None and folders >= set(MEGADEPTH1500_SCENES):
            print(f"note: {path} does not say which scenes it was trained on; the usual list has "
                  f"{' and '.join(MEGADEPTH1500_SCENES)}, which this set tests", file=sys.stderr)
    return found


def journal_settings(args, pair_set, methods: dict[str, Method]) -> dict:
    """What results depend on: options, and path, size and time of change of the files that are read."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    paths = sorted({Path(method.matcher.path) for method in methods.values() if method.matcher.path})
    pairs = Path(args.pairs or pair_set.path)
    paths += sorted(pairs.iterdir()) if pairs.is_dir() else [pairs]
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return {**settings, "files": stamps, "torch": torch.__version__, "opencv": cv2.__version__}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.eval_imp", description=__doc__.split("\n\n")[0])
    parser.add_argument("--matching_method", nargs="+", required=True, choices=list(MATCHERS), metavar="METHOD",
                        help=f"one or more of {', '.join(MATCHERS)}; the first is the baseline")
    parser.add_argument("--dataset", choices=DATASETS,
                        help="yfcc, scannet: features and pairs from dump.dump's HDF5 file, unless --pairs is given; "
                        "hpatches: homographies, of the sequences in --image_dir")
    parser.add_argument("--pairs", help="pair list with ground truth; features are extracted from the images of "
                        "--image_dir. With --dataset scannet: its list, with the cameras of the folders "
                        "<scene>/{img,intrinsic,extrinsic}; with megadepth1500: the folder of its .npz files")
    parser.add_argument("--feature_type", choices=list(FEATURE_TYPES),
                        help="local features (default: aliked for LightGlue, else spp)")
    parser.add_argument("--protocol", choices=("default", "published"), default="default",
                        help="published: as the published program: MAGSAC++ with 1000 iterations, a match in front of "
                        "both cameras an inlier, pooling in the loop with --use_uncertainty alone")
    parser.add_argument("--use_iterative", action="store_true",
                        help="also match iteratively with each network, until the pose stays the same")
    parser.add_argument("--use_uncertainty", action="store_true",
                        help="in this loop, let EIMP keep more keypoints where few matches agree with the pose")
    parser.add_argument("--schedule", type=whole_number(1), nargs=2, metavar=("FIRST", "EVERY"),
                        help="of this loop: look at matches after so many iterations, then after each EVERY more "
                        "(default: 4 2, of LightGlue 2 1)")
    parser.add_argument("--same_pose", type=number(0), metavar="DEGREES", help="and end it when two poses in a row "
                        "differ by no more (default: 1.5, of LightGlue 0.5)")
    parser.add_argument("--no_pruning", action="store_true",
                        help="in this loop, let LightGlue keep all keypoints")
    parser.add_argument("--config", help="YAML file of dump.dump, or one that the original evaluated with (default: "
                        "configs/{dataset}_eval_{feature}.yaml)")
    parser.add_argument("--hdf5", help="file of dump.dump, if not the one the config names")
    parser.add_argument("--image_dir", help="images of the pair list, of --hdf5, or of hpatches")
    parser.add_argument("--depth_dir", help="depth maps of the pair list's images: a/b.h5 or a/b.png for a/b.jpg")
    parser.add_argument("--weights", nargs="+", metavar="FILE",
                        help="checkpoint of the networks, or one for each (default: the method's file under weights/)")
    parser.add_argument("--feature_weights", metavar="FILE", help="pair list: of the network of the local features")
    parser.add_argument("--use_dual_softmax", action="store_true", help="dual softmax instead of Sinkhorn")
    parser.add_argument("--n_layers", type=int, help="iterations of the network (default: all)")
    parser.add_argument("--match_threshold", type=number(0, 1),
                        help="score of a network's match (default: 0.2, of LightGlue 0.1)")
    parser.add_argument("--ratio", type=number(0, 1), default=0.8, help="of NN_ratio (default: %(default)s)")
    parser.add_argument("--threshold", type=number(1e-6), nargs="+", metavar="PIXELS",
                        help="of the pose estimator, a table for each (default: 1 for yfcc and megadepth1500, else 3)")
    parser.add_argument("--estimator", choices=[*ESTIMATORS, "all"], default="magsac",
                        help="of the pose; all: a table for each that is installed (default: %(default)s)")
    parser.add_argument("--max_keypoints", type=whole_number(1, MOST_KEYPOINTS), default=2000,
                        help="pair list: keypoints of an image (default: %(default)s)")
    parser.add_argument("--contrast_threshold", type=number(0), default=1e-5,
                        help="pair list: of sift (default: %(default)s)")
    parser.add_argument("--unique_locations", action="store_true", help="pair list: one sift keypoint per place")
    parser.add_argument("--resize", type=whole_number(1), nargs="+", metavar="PIXELS",
                        help="pair list: width and height, or the longer side, to extract features at")
    parser.add_argument("--limit", type=whole_number(1),
                        help="evaluate that many pairs, spread evenly over the set")
    parser.add_argument("--seed", type=whole_number(0), default=0,
                        help="of the pose estimator and of the intervals (default: %(default)s)")
    parser.add_argument("--estimator_seeds", type=whole_number(1), default=1, metavar="N",
                        help="estimate each pose N times, with the seeds from --seed on: AUCs are means over them, all "
                        "else is of the first (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the networks; the descriptors "
                        "between layers and assignment stay in float32 (default: %(default)s)")
    parser.add_argument("--workers", type=whole_number(0), default=0, help="processes that estimate poses while the "
                        "network runs; 0: one after the other, for times that can be compared (default: %(default)s)")
    parser.add_argument("--plot_time_auc", action="store_true",
                        help="also run each network with 3, 5, 7, ... iterations, and plot AUC over time")
    parser.add_argument("--pictures", type=whole_number(0), default=4,
                        help="how many pairs to draw, easy to hard (default: %(default)s)")
    parser.add_argument("--save_path", help="folder of the results (default: runs/eval/{set}_{feature})")
    args = parser.parse_args(argv)
    if not args.dataset and not args.pairs:
        parser.error("name a set: --dataset, or --pairs and --image_dir")
    if args.resize and len(args.resize) > 2:
        parser.error("--resize takes a width and a height, or the longer side, in pixels")
    if args.use_uncertainty and not args.use_iterative:
        parser.error("--use_uncertainty goes with --use_iterative")
    if args.protocol == "published" and args.estimator != "magsac":
        parser.error("--protocol published goes with --estimator magsac")
    if args.dataset == "hpatches":
        for option in ("pairs", "config", "hdf5", "resize", "depth_dir", "use_iterative", "plot_time_auc"):
            if getattr(args, option):
                parser.error(f"--{option} does not go with --dataset hpatches, which has homographies and no cameras")
        if args.protocol == "published" or args.estimator not in (*HOMOGRAPHY_ESTIMATORS, "all"):
            parser.error(f"--dataset hpatches takes the --estimator {', '.join(HOMOGRAPHY_ESTIMATORS)} or all")
    args.feature_type = args.feature_type or default_feature_type(args.matching_method)
    device = choose_device(args.device)
    args.device, args.precision = str(device), check_precision(args.precision, device)
    if args.threshold is None:
        args.threshold = [DEFAULT_POSE_THRESHOLD[args.dataset]]
    if args.save_path is None:
        args.save_path = f"runs/eval/{args.dataset or Path(args.pairs).stem}_{args.feature_type}"
    return args


def run_methods(args, pair_set, methods: dict[str, Method]) -> tuple[Results, list]:
    """Evaluate as the command line says: results, and pairs skipped."""
    if args.estimator == "pycolmap":
        import_pycolmap()  # says what is missing before the work
    estimators = [args.estimator]
    if args.protocol == "published":
        estimators = [PUBLISHED_ESTIMATOR]
    elif args.estimator == "all":
        known = HOMOGRAPHY_ESTIMATORS if args.dataset == "hpatches" else ESTIMATORS
        estimators = [name for name in known if name != "pycolmap" or find_spec(name)]
    settings = [PoseSetting(estimator, threshold, args.seed + k) for estimator in estimators
                for threshold in args.threshold for k in range(args.estimator_seeds)]
    with Journal(Path(args.save_path) / JOURNAL, journal_settings(args, pair_set, methods)) as journal:
        return evaluate(pair_set, methods, settings, args.device, args.limit, args.workers, journal)


def by_first_seed(results: Results, seed: int) -> tuple[Results, dict[PoseSetting, list]]:
    """Results with the first seed, and for each of these settings those with the other seeds."""
    first = {setting: by_method for setting, by_method in results.items() if setting.seed == seed}
    others = {setting: [by_method for other, by_method in results.items()
                        if other != setting and replace(other, seed=seed) == setting] for setting in first}
    return first, others


def main(argv=None) -> int:
    args = parse_arguments(argv)
    check_folder(args.save_path)
    pair_set, methods = build_pair_set(args), build_methods(args)
    paths = {name: str(method.matcher.path) for name, method in methods.items() if method.matcher.path}
    hashes = {path: file_hash(path) for path in set(paths.values())}
    notes = {"weights": {name: {"path": path, "sha256": hashes[path]} for name, path in paths.items()}}
    trained_on = warn_of_training_scenes(pair_set, methods)
    results, skipped = run_methods(args, pair_set, methods)
    if not any(next(iter(results.values())).values()):
        raise InputError(f"none of the pairs could be read; the first: {skipped[0][0]}: {skipped[0][1]}")
    results, others = by_first_seed(results, args.seed)
    parts = SPLITS if args.dataset == "hpatches" else {None: ""}
    tables = {(setting, part): summary.summarize(summary.select(by_method, prefix), args.seed,
                                                 [summary.select(other, prefix) for other in others[setting]])
              for setting, by_method in results.items() for part, prefix in parts.items()
              if any(summary.select(by_method, prefix).values())}
    for (setting, part), table in tables.items():
        print(f"{setting}, {part}" if part else setting, summary.format_table(table), sep="\n")
        for method, numbers in table.items():
            if numbers.get("by_iteration"):
                print(f"\n{method}", summary.format_iterations(numbers), sep="\n")
        print()
    if args.protocol == "published":
        print("protocol: published (its published figures could not be checked with this program)")
    if args.workers:
        print(f"times: with {args.workers} processes at work beside the network; compare those of --workers 0")
    if trained_on:
        notes["trained_on_tested_scenes"] = trained_on

    folder = Path(args.save_path)
    summary.write_results(folder / "results.json", vars(args), tables, skipped, **notes)
    summary.write_pairs_csv(folder / "pairs.csv", results)
    (first, _), table = next(iter(tables.items()))
    drawn = {name: method for name, method in methods.items() if not method.shortened}
    scored = any(numbers["pairs_with_pose"] for numbers in table.values())
    if scored:
        summary.plot_pose_recall(folder / "pose_recall.png", {
            setting: {name: by_method[name] for name in drawn} for setting, by_method in results.items()})
    if any(numbers.get("by_iteration") for numbers in table.values()):
        summary.write_iterations_csv(folder / "iterations.csv", results)
        summary.plot_iterations_used(folder / "iterations_used.png", results)
    if args.plot_time_auc and scored:
        summary.plot_time_auc(folder / "time_auc.png", table, methods)
    not_drawn = write_pictures(folder, pair_set, drawn, results[first], first, args.pictures, args.device)
    (folder / JOURNAL).unlink(missing_ok=True)  # all is written: there is nothing left to resume
    print(f"results: {folder}")
    items = "sequences" if args.dataset == "hpatches" else "pairs"
    return max(report_skipped(skipped, items), report_skipped(not_drawn, "pictures"))


if __name__ == "__main__":
    sys.exit(run(main))
