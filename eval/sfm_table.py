"""What methods of matching make of one scene in COLMAP, as a table; docs/sfm.md has one.

    python3 -m dump.import_rgbd --sequence_path kitchen --save_path data/kitchen --scene kitchen --first 700
    python3 -m eval.sfm_table data/kitchen/scene_info/kitchen.0.npz data/kitchen runs/sfm

Ground truth is a scene_info file, as dump.import_rgbd, dump.make_scenes and dump.preprocess_megadepth write it. All
pairs of its images are matched with their true cameras, and COLMAP maps them. Each method has a folder of OUT with
the database, the models and table.json; a method that has the last one is not run again. A pair is wrong if its
rotation or the direction of its translation is more than 10 degrees off, where the database gives them: no pose where
the inliers do not determine one, and no direction of a short baseline. It has wrong matches if more than half of its
inliers are wrong by the true pose. Errors of camera centres are those of the largest model, after the best similarity
transform, in units of the ground truth.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

from eval.colmap_database import Database
from eval.export_colmap import ImageSet, export, map_images
from eval.image_matcher import ImageMatcher
from eval.results import PRECISION_THRESHOLD
from tools.cli import InputError, report_skipped, run, whole_number
from tools.extras import import_pycolmap
from tools.files import check_folder, read_json, write_json
from tools.geometry import colmap_to_opencv_K, relative_pose
from tools.metrics import match_errors, pose_error
from tools.scene_info import load_scene_info

WRONG = 10.0  # degrees
METHODS = {
    "NN_ratio": {"matching_method": "NN_ratio", "feature_type": "sift"},
    "IMP": {"matching_method": "IMP", "feature_type": "sift"},
    "LightGlue one-shot": {"matching_method": "LightGlue", "feature_type": "aliked", "one_shot": True},
    "LightGlue": {"matching_method": "LightGlue", "feature_type": "aliked"},
}
COUNTED = {"verified": "verified pairs", "posed": "with pose", "directed": "with direction", "wrong": "wrong",
           "wrong_rotation": "in rotation", "mismatched": "wrong matches"}
COLUMNS = {**COUNTED, "images": "images", "points": "points", "track_length": "track length",
           "reprojection_error": "reprojection error (px)", "center_error": "error of camera centres",
           "seconds": "CPU seconds"}
INLIERS = {f"at least {least} inliers": least for least in (30, 60, 100)}


def judge_pairs(database: Database, poses: dict[str, np.ndarray]) -> dict:
    """How many pairs COUNTED has of each kind; also in that order, in one text, of pairs with at least so many inliers.

    poses (4, 4): world-to-camera, by name.
    """
    names = {image_id: name for name, image_id in database.ids.items()}
    keypoints = {name: database.db.read_keypoints(image_id)[:, :2] for name, image_id in database.ids.items()}
    K = {name: database.camera(name).calibration_matrix() for name in keypoints}
    judged = []
    for pair, geometry in zip(*database.db.read_two_view_geometries()):
        pair, matches = [names[i] for i in database.colmap.pair_id_to_image_pair(pair)], geometry.inlier_matches
        true, found = relative_pose(*(poses[name] for name in pair)), geometry.cam2_from_cam1
        directed = wrong = wrong_rotation = False
        if found is not None:
            T = found.matrix()
            error_t, error_R = pose_error(true, T[:, :3], T[:, 3])
            directed, wrong_rotation = T[:, 3].any(), error_R > WRONG
            wrong = wrong_rotation or (directed and error_t > WRONG)
        points = (keypoints[name][matches[:, view]] for view, name in enumerate(pair))
        errors = match_errors(*points, *(K[name] for name in pair), true)
        judged.append((len(matches), True, found is not None, directed, wrong, wrong_rotation,
                       np.mean(errors < PRECISION_THRESHOLD) < 0.5))
    judged = np.array(judged, int).reshape(-1, 1 + len(COUNTED))

    def count(least):
        return judged[judged[:, 0] >= least, 1:].sum(axis=0).tolist()

    row = dict(zip(COUNTED, count(0)))
    return row | {name: ", ".join(map(str, count(least))) for name, least in INLIERS.items()}


def judge_model(path: Path, poses: dict[str, np.ndarray]) -> float | None:
    """Median error of the camera centres of a model; None if it has fewer than three images."""
    colmap = import_pycolmap()
    images = list(colmap.Reconstruction(path).images.values())
    found = np.array([image.projection_center() for image in images if image.has_pose])
    true = np.array([np.linalg.inv(poses[image.name])[:3, 3] for image in images if image.has_pose])
    transform = colmap.estimate_sim3d(found, true) if len(found) > 2 else None
    if transform is None:
        return None
    moved = transform.scale * found @ transform.rotation.matrix().T + transform.translation
    return float(np.median(np.linalg.norm(moved - true, axis=1)))


def run_method(settings: dict, images: ImageSet, poses: dict, out: Path) -> tuple[dict, list]:
    """One row of the table, and what could not be matched; settings: of the `ImageMatcher`."""
    out.mkdir(parents=True, exist_ok=True)
    resumed, start = (out / "settings.json").exists(), time.process_time()
    matcher = ImageMatcher(**settings)
    failed = export(images, out, matcher)
    row = {"seconds": None if resumed else time.process_time() - start}
    models = map_images(images.folder, out)
    with Database(out / "database.db") as database:
        row |= judge_pairs(database, poses)
    if models:
        largest = max(models, key=lambda model: model["images"])
        row |= largest | {"center_error": judge_model(out / largest["name"], poses)}
    return row, failed


def format_table(rows: dict[str, dict], columns: dict[str, str]) -> str:
    """Markdown; columns: key of a row -> heading. A method that found no model has dashes."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        return "-" if value is None else str(value)

    lines = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(key)) for key in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("eval.sfm_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("scene_info", metavar="SCENE_INFO", help="file of the scene, with true cameras and poses")
    parser.add_argument("image_dir", metavar="IMAGES", help="what the image paths in it are relative to")
    parser.add_argument("out", metavar="OUT", help="folder of the results")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--every", type=whole_number(1), default=1, metavar="N", help="take every N-th image alone")
    parser.add_argument("--max_keypoints", type=whole_number(1), default=2000,
                        help="of an image (default: %(default)s)")
    args = parser.parse_args(argv)
    import_pycolmap()
    out, info = Path(args.out), load_scene_info(args.scene_info)
    check_folder(out)
    chosen = [i for i in range(len(info["image_paths"])) if info["poses"][i] is not None][::args.every]
    names = [str(info["image_paths"][i]) for i in chosen]
    poses = {name: info["poses"][i] for name, i in zip(names, chosen)}
    K = {name: colmap_to_opencv_K(info["intrinsics"][i]) for name, i in zip(names, chosen)}
    if len(names) < 2:
        raise InputError(f"{args.scene_info} has {len(names)} images to take, and a pair takes two")
    rows, failed = {}, []
    for method in args.methods:
        folder = out / method.replace(" ", "_")
        file, asked = folder / "table.json", {"names": names, "max_keypoints": args.max_keypoints}
        there = read_json(file) if file.exists() else {}
        if {key: there.get(key) for key in asked} == asked:
            rows[method] = there["row"]
            continue
        images = ImageSet(Path(args.image_dir), sorted(names), K=K)
        rows[method], skipped = run_method({**METHODS[method], "max_keypoints": args.max_keypoints}, images, poses,
                                           folder)
        failed += skipped
        if not skipped:
            write_json(file, {**asked, "row": rows[method]})
    print(f"{len(names)} images, {math.comb(len(names), 2)} pairs")
    print(format_table(rows, COLUMNS))
    print(f"{', '.join(COUNTED.values())}:")
    print(format_table(rows, {name: name for name in INLIERS}))
    return report_skipped(failed, "images or pairs")


if __name__ == "__main__":
    sys.exit(run(main))
