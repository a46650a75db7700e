"""Match images of one's own: matches, relative pose, a picture and a file of numbers for each pair.

    python3 -m eval.match_images a.jpg b.jpg --focal 3000
    python3 -m eval.match_images photos/                              # all pairs of the images in a folder
    python3 -m eval.match_images pairs.txt --image_dir images         # the pairs of a list

A list has one pair a line: two names, or SuperGlue's format with turns, K and pose (tools.pair_list). A pose takes
both cameras: --K0 and --K1, or --focal, or the K of a list, or else a guess from the focal length in the EXIF data.

Photographs are matched upright, as their EXIF orientation says, and no larger than --resize; all that is given and
returned (K, keypoints, sizes, pose) is for the images as stored, at full size, which is how OpenCV reads them with
cv2.IMREAD_IGNORE_ORIENTATION and how Pillow opens them.

For each pair, --save_path gets NAME0_NAME1.png and NAME0_NAME1.npz, which np.load reads without pickle;
docs/formats.md lists its arrays. Several pairs also get a table, pairs.csv, and a page, index.html. Each pair has a
verdict: trusted, doubtful, or none; without cameras it is on a fundamental matrix.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.image_matcher import ImageMatcher, focal_K
from eval.image_matches import ImageMatches, LoadedImage, describe_pose
from eval.match_report import count_verdicts, write_report
from eval.methods import MATCHERS
from tools.cli import MOST_KEYPOINTS, InputError, number, reason, report_skipped, run, whole_number
from tools.features import FEATURE_TYPES
from tools.files import IMAGE_SUFFIXES, check_file, check_folder, write_image
from tools.pair_list import Pair, read_pair_list
from tools.pose import ESTIMATORS
from tools.precision import PRECISIONS
from tools.visualize import write_strip

MODEL = "matching_method", "feature_type", "weights"  # of the settings of results


def match_images(image0, image1, K0=None, K1=None, **settings) -> ImageMatches:
    """Match two images and estimate their relative pose.

    image0, image1: paths, or arrays (H, W) or (H, W, 3) BGR uint8. K0, K1: (3, 3) for the images as stored, OpenCV's
    pixel convention, or None: guessed from the files' EXIF data, or no pose. settings: of `ImageMatcher`, which is
    better kept for more than one pair. InputError if an image cannot be read or there are no weights.
    """
    return ImageMatcher(**settings)(image0, image1, K0, K1)


def find_images(folder: Path) -> list[str]:
    """Names of the image files in a folder and below, sorted; links are followed, pictures made here left out."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else [name for name in folders if name[0] != "." and name != "__MACOSX"]
        found += [] if real in seen else [Path(where, name) for name in names]
        seen.add(real)
    return sorted(str(path.relative_to(folder)) for path in found
                  if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
                  and not _is_made_here(path))


def _is_made_here(picture: Path) -> bool:
    """Whether `write_pair` made a picture: its matches lie beside it."""
    matches = picture.with_name(picture.stem.removesuffix("_iterations") + ".npz")
    try:
        with zipfile.ZipFile(matches) as archive:
            return "matching_scores.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def find_pairs(inputs: list[str], image_dir: str | None) -> tuple[list[Pair], Path]:
    """What the command line names -> pairs, and the folder that their names are relative to."""
    first = Path(inputs[0])
    if image_dir is not None and (len(inputs) > 1 or first.is_dir()):
        raise InputError("--image_dir goes with a list of pairs")
    if len(inputs) == 1 and not first.is_dir():
        if first.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"one image, {first}, makes no pair: give two, a folder, or a list of pairs")
        if image_dir is not None and not Path(image_dir).is_dir():
            raise InputError(f"--image_dir: no such folder: {image_dir}")
        return read_pair_list(first), Path(image_dir or first.parent)
    if len(inputs) == 1:
        folder, names = first, find_images(first)
        if len(names) < 2:
            raise InputError(f"{first} holds {len(names)} images, and a pair takes two")
    else:
        wrong = next((name for name in inputs if Path(name).is_dir()), None)
        if wrong:
            raise InputError(f"{wrong} is a folder: give two or more images, or one folder, or one list of pairs")
        paths = [os.path.abspath(name) for name in inputs]
        folder = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
        names = [os.path.relpath(path, folder) for path in paths]
    return [Pair(*both) for both in itertools.combinations(names, 2)], folder


def output_names(pairs: list[Pair]) -> list[str]:
    """A file name without suffix for each pair, a/x.jpg and y.jpg giving a-x_y; those that coincide get a number."""
    names = {}  # in order, and quick to look up
    longest = 255 - len("_iterations.png")
    for pair in pairs:
        paths = [Path(image).with_suffix("") for image in (pair.image0, pair.image1)]
        stem = "_".join("-".join(path.relative_to(path.anchor).parts) for path in paths)
        if len(os.fsencode(stem)) > longest:  # than a file system takes
            number = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
            stem = f"{os.fsencode(stem)[:longest - 40].decode(errors='ignore')}_{number}"
        candidates = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        names[next(name for name in candidates if name not in names)] = pair
    return list(names)


@dataclass
class Cameras:
    """What the command line says of them: K0, K1 (3, 3), or a focal length in pixels for all images, or nothing."""

    K0: np.ndarray | None = None
    K1: np.ndarray | None = None
    focal: float | None = None

    def choose(self, pair: Pair, view0: LoadedImage, view1: LoadedImage) -> tuple:
        """K0 and K1 of a pair, those of its list before the command line's; None where nothing is given."""
        if pair.K0 is not None:
            return pair.K0, pair.K1
        if self.focal is not None:
            return focal_K(self.focal, view0.image_size), focal_K(self.focal, view1.image_size)
        return self.K0, self.K1


def write_pair(found: ImageMatches, path: Path, settings: dict, with_iterations: bool) -> list[str]:
    """Write the files of a pair, `path` with the suffixes .png and .npz and so on; returns their names.

    The npz comes last: its presence says that the pair is complete.
    """
    picture, strip, gif, numbers = (f"{path}{end}" for end in (".png", "_iterations.png", "_iterations.gif", ".npz"))
    write_image(picture, found.draw())
    files = [picture, numbers]
    if with_iterations and found.steps:
        write_strip(strip, found.draw_iterations())
        found.write_iterations_gif(gif)
        files[1:1] = [strip, gif]
    else:  # of an earlier run, they would mislead
        for stale in (strip, gif):
            Path(stale).unlink(missing_ok=True)
    found.save(numbers, settings)
    return files


def read_complete(path: Path, settings: dict, images: list[Path]) -> dict | None:
    """The summary that `write_pair` wrote to `path`; None unless it was made with these settings, and after the images
    and the weights were made."""
    sources = [*images, *([Path(settings["weights"])] if settings["weights"] else [])]
    try:
        made = min(Path(f"{path}{end}").stat().st_mtime for end in (".png", ".npz"))
        check_file(f"{path}.npz")
        with np.load(f"{path}.npz") as content:
            if {"precision": "float32", **json.loads(str(content["settings"]))} == settings and all(
                    source.stat().st_mtime <= made for source in sources):
                return json.loads(str(content["summary"]))
    except Exception:  # torn, or not ours: it is made again
        pass
    return None


def settings_used_before(save_path: Path, matching_method: str | None) -> dict:
    """Settings of the results of a method in a folder, so that it is resumed with their model and precision; empty if
    there are none. None: any method that need not be named."""
    methods = ("IMP", "EIMP", "LightGlue") if matching_method is None else (matching_method,)
    for path in sorted(save_path.glob("*.npz")):
        with contextlib.suppress(Exception):  # torn, or not ours
            with np.load(path) as content:
                settings = json.loads(str(content["settings"]))
            if settings["matching_method"] in methods:
                return settings
    return {}


def match_pairs(matcher: ImageMatcher, pairs: list[Pair], image_dir: Path, save_path: Path, cameras: Cameras,
                with_iterations: bool = False) -> tuple[dict[str, dict], int, list[tuple[str, str]]]:
    """Match pairs, write their files (`write_pair`) and the report; pairs that are complete are left as they are.

    Each image is read once, and kept for as long as pairs of it are to come. Returns the summaries by name of the
    pairs' files, how many of them were there already, and (name, reason) of the images that could not be read and of
    the pairs that could not be matched.
    """
    def settings(pair):
        return pair_settings(matcher, pair, image_dir, cameras, with_iterations)

    names = output_names(pairs)
    summaries = {name: read_complete(save_path / name, settings(pair),
                                     [image_dir / pair.image0, image_dir / pair.image1])
                 for pair, name in zip(pairs, names)}
    jobs = [(pair, name) for pair, name in zip(pairs, names) if summaries[name] is None]
    uses = Counter(key for pair, _ in jobs for key in image_keys(pair))
    views, failed = {}, {}
    for pair, name in tqdm(jobs, "pairs", disable=None):
        for key in image_keys(pair):
            if key not in views and key[0] not in failed:
                try:
                    views[key] = matcher.load(image_dir / key[0], key[1], key[0])
                except Exception as error:
                    failed[key[0]] = reason(error)
        view0, view1 = (views.get(key) for key in image_keys(pair))
        if view0 is not None and view1 is not None:
            try:
                found = matcher.match(view0, view1, *cameras.choose(pair, view0, view1), pair.T_0to1)
                write_pair(found, save_path / name, settings(pair), with_iterations)
            except Exception as error:
                failed[f"{pair.image0} {pair.image1}"] = reason(error)
            else:
                summaries[name] = found.summary()
        for key in image_keys(pair):
            uses[key] -= 1
            if not uses[key]:
                views.pop(key, None)
    summaries = {name: summary for name, summary in summaries.items() if summary is not None}
    if summaries:
        write_report(save_path, summaries)
    return summaries, len(pairs) - len(jobs), list(failed.items())


def image_keys(pair: Pair) -> list[tuple[str, int | None]]:
    """Name and turns of both images: the list's turns where it says more than names, else (None) those of EXIF."""
    is_told = pair.K0 is not None or pair.rot0 or pair.rot1
    return [(pair.image0, pair.rot0 if is_told else None), (pair.image1, pair.rot1 if is_told else None)]


def pair_settings(matcher: ImageMatcher, pair: Pair, image_dir: Path, cameras: Cameras, with_iterations: bool) -> dict:
    """All that a pair's files depend on, but for the content of files."""
    given = {f"given_{name}": None if value is None else np.asarray(value).tolist()
             for name, value in (*vars(cameras).items(), ("list_K0", pair.K0), ("list_K1", pair.K1),
                                 ("list_T_0to1", pair.T_0to1))}
    return {**matcher.settings, **given, "turns": [turns for _, turns in image_keys(pair)],
            "images": [os.path.abspath(image_dir / name) for name in (pair.image0, pair.image1)],
            "iterations_drawn": with_iterations}


def describe(found: ImageMatches) -> str:
    """What was found on a pair, as a few lines of text."""
    lines = []
    for view, K, source in ((found.view0, found.K0, found.K_source0), (found.view1, found.K1, found.K_source1)):
        focal = ""
        if source == "EXIF":
            focal = f", focal length {K[0, 0]:.0f} pixels guessed from EXIF"
        elif source == "unknown":
            focal = ", focal length not known: --focal or --K0 gives it"
        turned = ", turned upright" if view.turns else ""
        lines.append(f"{view.name}: {len(view.keypoints)} keypoints{turned}{focal}")
    line = f"{len(found.matches)} matches"
    if found.n_iterations is not None:
        line += f" after {found.n_iterations} of {found.n_layers} iterations"
        line += ": the pose stayed the same" if found.stopped_early else ""
    return "\n".join([*lines, line, describe_pose(found)])


def add_matcher_options(parser: argparse.ArgumentParser) -> None:
    """The options that `build_matcher` takes, which commands on images of one's own share."""
    parser.add_argument("--matching_method", choices=list(MATCHERS), metavar="METHOD",
                        help=f"one of {', '.join(MATCHERS)} (default: the best that there are weights for)")
    parser.add_argument("--feature_type", choices=list(FEATURE_TYPES), help="local features (default: likewise)")
    parser.add_argument("--weights", help="checkpoint (default: the best in weights/)")
    parser.add_argument("--feature_weights", metavar="FILE", help="of the network of the local features")
    parser.add_argument("--one_shot", action="store_true",
                        help="all matches of the last iteration, no poses on the way")
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="poselib",
                        help="of the pose (default: %(default)s)")
    parser.add_argument("--threshold", type=number(1e-6), default=1.0,
                        help="of the pose's inliers, pixels of the images as matched (default: %(default)s)")
    parser.add_argument("--max_keypoints", type=whole_number(1, MOST_KEYPOINTS), default=2000,
                        help="of an image (default: %(default)s)")
    parser.add_argument("--resize", type=whole_number(1), default=1600, metavar="PIXELS",
                        help="longer side at which images are matched, at most (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the pose estimator (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the matching network (default: that of the results "
                        "that are resumed, else float32)")


def camera_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """(3, 3)."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def build_matcher(args: argparse.Namespace, before: dict) -> ImageMatcher:
    """The `ImageMatcher` of the command line, and say which it is; before: settings of results that are resumed."""
    model = args.matching_method, args.feature_type, args.weights
    if not any(model):
        model = tuple(before.get(name) for name in MODEL)
    precision = args.precision or before.get("precision", "float32")
    matcher = ImageMatcher(*model, args.resize, args.max_keypoints, args.estimator, args.threshold, args.one_shot,
                           args.seed, args.device, args.feature_weights, precision)
    used = matcher.settings
    told = [used[name] for name in MODEL if used[name]]
    print(", ".join(told if used["precision"] == "float32" else [*told, used["precision"]]))
    return matcher


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.match_images", description=__doc__.split("\n\n")[0])
    parser.add_argument("images", nargs="+", metavar="INPUT",
                        help="two or more images, or a folder of them (all pairs of either), or a list of pairs")
    parser.add_argument("--image_dir", help="what the names in a list are relative to (default: its folder)")
    parser.add_argument("--K0", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"),
                        help="camera of the first image, for the image as stored; without --K1: of all images")
    parser.add_argument("--K1", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="camera of the second")
    parser.add_argument("--focal", type=number(1e-6), help="focal length of all images in pixels, instead of --K0")
    add_matcher_options(parser)
    parser.add_argument("--draw_iterations", action="store_true",
                        help="draw the iterations too: NAME0_NAME1_iterations.png and .gif")
    parser.add_argument("--save_path", default="runs/matches", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("K0", "K1"):
        value = getattr(args, name)
        if value is not None and not (np.isfinite(value).all() and min(value[:2]) > 0):
            parser.error(f"--{name}: fx and fy must be more than 0, and all four numbers finite")
    if args.K1 and not args.K0:
        parser.error("--K1 goes with --K0")
    if args.K0 and args.focal:
        parser.error("give --K0 or --focal, not both")
    iterates = args.matching_method is None or MATCHERS[args.matching_method].iterates
    if args.draw_iterations and (args.one_shot or not iterates):
        parser.error("--draw_iterations goes with a network, and not with --one_shot: nothing else has iterations")
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    save_path = Path(args.save_path)
    check_folder(save_path)
    pairs, image_dir = find_pairs(args.images, args.image_dir)
    if args.K1 and len(args.images) != 2:
        raise InputError("--K1 goes with two images; for more, --K0 alone is the camera of all, or a list says each")
    K0, K1 = (None if K is None else camera_matrix(*K) for K in (args.K0, args.K1 or args.K0))
    cameras = Cameras(K0, K1, args.focal)
    matcher = build_matcher(args, settings_used_before(save_path, args.matching_method))

    if len(pairs) == 1:
        (pair,) = pairs
        view0, view1 = (matcher.load(image_dir / name, turns, name) for name, turns in image_keys(pair))
        found = matcher.match(view0, view1, *cameras.choose(pair, view0, view1), pair.T_0to1)
        print(describe(found))
        if args.draw_iterations and not found.steps:
            print("no iterations to draw: they take both K, and keypoints in both images", file=sys.stderr)
        settings = pair_settings(matcher, pair, image_dir, cameras, args.draw_iterations)
        print(*write_pair(found, save_path / output_names(pairs)[0], settings, args.draw_iterations), sep="\n")
        return 0

    summaries, n_complete, failed = match_pairs(matcher, pairs, image_dir, save_path, cameras, args.draw_iterations)
    if not summaries:
        raise InputError(f"none of the {len(pairs)} pairs could be matched; the first reason: {failed[0][1]}")
    print(f"{len(summaries) - n_complete} pairs matched"
          + (f"; {n_complete} were there already" if n_complete else "")
          + f": {count_verdicts(summaries)}: {save_path / 'index.html'}")
    guessed = {pair[f"image{v}"] for pair in summaries.values() for v in "01" if pair[f"K_source{v}"] == "EXIF"}
    if guessed:
        print(f"the focal length of {len(guessed)} images was guessed from EXIF")
    n_unknown = sum("unknown" in (pair["K_source0"], pair["K_source1"]) for pair in summaries.values())
    if n_unknown:
        print(f"{n_unknown} pairs have no pose because a camera is not known: --focal or --K0 gives it")
    return report_skipped(failed, "images or pairs")


if __name__ == "__main__":
    sys.exit(run(main))
