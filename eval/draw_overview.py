r"""Draw how a pair is matched, for the top of the README: overview.png and iterations.gif.

    python3 -m eval.draw_overview

The pair is one of those that `make demo` evaluates on; alone, their images are made by

    python3 -m dump.make_scenes --save_path runs/demo/test_scenes --scenes 4 --first_scene 1000 --images_per_scene 10 \
        --pairs 25 --layouts yfcc scannet

For pictures like these of one's own images:
`python3 -m eval.match_images a.jpg b.jpg --draw_iterations`.
"""
import argparse
import sys
from pathlib import Path

from eval.image_matcher import ImageMatcher
from eval.image_matches import describe_pose
from eval.methods import MATCHERS
from tools.cli import MOST_KEYPOINTS, InputError, run, whole_number
from tools.files import check_folder
from tools.pair_list import read_pair_list
from tools.visualize import STRIP_COLUMNS, write_strip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("eval.draw_overview", description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", help="checkpoint (default: the best in weights/)")
    parser.add_argument("--matching_method", choices=[name for name, kind in MATCHERS.items() if kind.iterates],
                        default="LightGlue", help="(default: %(default)s)")
    parser.add_argument("--pairs", default="assets/overview_pair.txt",
                        help="pair list with ground truth, of which the first is drawn (default: %(default)s)")
    parser.add_argument("--image_dir", default="runs/demo/test_scenes/scannet",
                        help="what the names in it are relative to (default: %(default)s)")
    parser.add_argument("--max_keypoints", type=whole_number(1, MOST_KEYPOINTS), default=1000,
                        help="of an image (default: %(default)s)")
    parser.add_argument("--save_path", default="assets", help="folder of the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    check_folder(args.save_path)
    pair = read_pair_list(args.pairs)[0]
    if pair.T_0to1 is None:
        raise InputError(f"{args.pairs}: the first pair has no pose, which the errors drawn take")
    if not Path(args.image_dir).is_dir():
        raise InputError(f"no images at {args.image_dir}: `make demo` makes those of the README")
    matcher = ImageMatcher(args.matching_method, weights=args.weights, max_keypoints=args.max_keypoints)
    view0, view1 = (matcher.load(Path(args.image_dir) / name, turns, name)
                    for name, turns in ((pair.image0, pair.rot0), (pair.image1, pair.rot1)))
    found = matcher.match(view0, view1, pair.K0, pair.K1, pair.T_0to1)
    overview, gif = Path(args.save_path) / "overview.png", Path(args.save_path) / "iterations.gif"
    write_strip(overview, found.draw_iterations(STRIP_COLUMNS))
    found.write_iterations_gif(gif)
    print(describe_pose(found), overview, gif, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
