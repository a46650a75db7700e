"""Offline step: a training dump of the original IMP code -> one of ours, to train on.

    python3 -m dump.import_dump OLD NEW [--feature_type sift]

OLD holds pickled dicts: keypoints_<feature>/<scene>/<image file name>_<feature>.npy, matches_sep_<feature>/<scene>/
<i>.npy (or matches_<feature>/<scene>.npy, the same pairs in one file). They are read without running code. Run it again
to resume: complete scenes and keypoint records that are there are kept. What cannot be read is left out and listed.
"""
import argparse
import sys
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from dump.keypoints import write_keypoints
from dump.matches import MIN_MATCHES
from dump.workers import run_scenes
from tools.cli import InputError, reason, report_skipped, run
from tools.features import FEATURE_TYPES
from tools.files import remove_strays, write_json
from tools.manifest import FORMAT, VERSION, claim, keypoint_path, match_path, read_scene, scene_path
from tools.records import KEYPOINT_FIELDS, read_record, write_record
from tools.safe_pickle import load_npy, numbers
from tools.scene_info import check_camera, check_name

MIN_KEYPOINTS = 1024
# what the original does not say of itself: its defaults; overlaps are NaN in the records
SETTINGS = {"made_by": "original", "max_keypoints": 4096, "min_keypoints": MIN_KEYPOINTS, "inlier_th": 5,
            "overlap": "unknown"}


class _Fields(dict):
    """A pickled dict of the original."""

    def __missing__(self, name):
        raise InputError(f"it lacks {name}")


def _load_dict(path) -> _Fields:
    content = load_npy(path)
    content = content.item() if content.shape == () else None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no pickled dict, as the original's dumps do")
    return _Fields(content)


def _import_keypoints(old: dict, target, file_name: str, feature_type: str, dtype: str) -> None:
    """Write a keypoint dict of the original as a record of ours."""
    keypoints = numbers(old["keypoints"], None, 2, name="keypoints")
    n = len(keypoints)
    size = numbers(old["image_size"], None, name="image_size")
    if len(size) < 2 or not (np.abs(size) < 2 ** 31).all():
        raise InputError("its image_size is no height and width")
    K, pose = check_camera(old["intrinsics"], old["pose"])
    image_path = check_name(old["image_path"])
    if f"{PurePosixPath(image_path).name}_{feature_type}.npy" != file_name:
        raise InputError(f"it is of the image {image_path}")
    if n < MIN_KEYPOINTS:
        raise InputError(f"{n} keypoints are fewer than {MIN_KEYPOINTS}")
    shapes = {"scores": (n,), "depth": (n,), "descriptors": (n, FEATURE_TYPES[feature_type].dim)}
    write_keypoints(target, dtype, {
        "image_path": image_path, "depth_path": check_name(old["depth_path"]), "image_size": size[1::-1],
        "intrinsics": K, "pose": pose, "keypoints": keypoints,
        **{name: numbers(old[name], *shape, name=name) for name, shape in shapes.items()}})


def _match_record(old: dict, n_keypoints: dict[str, int]) -> dict:
    """A pair of the original -> a match record of ours; n_keypoints: of each image by file name."""
    paths = [check_name(old[f"image_path{v}"]) for v in "12"]
    (K0, pose0), (K1, pose1) = (check_camera(old[f"intrinsics{v}"], old[f"pose{v}"]) for v in "12")
    sides = []
    for v, path in zip("12", paths):
        n = n_keypoints.get(PurePosixPath(path).name)
        if n is None:
            raise InputError(f"the keypoints of {path} are missing or were left out")
        side = numbers(old[f"matched_ids{v}"], None, name=f"matched_ids{v}")
        if not ((side >= 0) & (side < n)).all():
            raise InputError(f"matched_ids{v} name keypoints that {path}, of {n}, does not have")
        sides.append(side.astype(np.int32))
    if len(sides[0]) != len(sides[1]):
        raise InputError(f"{len(sides[0])} matched_ids1 for {len(sides[1])} matched_ids2")
    matches = np.stack(sides, axis=1)
    for v in (0, 1):  # of several matches of one keypoint, the first
        matches = matches[np.sort(np.unique(matches[:, v], return_index=True)[1])]
    if len(matches) <= MIN_MATCHES:
        raise InputError(f"it has {len(matches)} matches, more than {MIN_MATCHES} are needed")
    return {"image_path0": paths[0], "image_path1": paths[1], "intrinsics0": K0, "intrinsics1": K1, "pose0": pose0,
            "pose1": pose1, "matches": matches, "overlap": np.nan}


def _old_pairs(old, scene: str, feature_type: str) -> list[tuple[str, object]]:
    """(name, function that reads it) of each pair of a scene, in order."""
    folder = Path(old) / f"matches_sep_{feature_type}" / scene
    files = sorted((path for path in folder.glob("*.npy") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if files:
        return [(f"{scene}/{path.name}", lambda path=path: _load_dict(path)) for path in files]
    path = Path(old) / f"matches_{feature_type}" / f"{scene}.npy"
    if not path.is_file():
        raise InputError(f"no pairs in {folder} or {path}")
    return [(f"{scene} pair {i}", lambda pair=pair: _Fields(pair)) for i, pair in enumerate(load_npy(path).ravel())]


def _check_count(old, scene: str, feature_type: str, n_pairs: int) -> None:
    """Say it if the original's count of a scene's pairs is another."""
    for path in (Path(old) / f"nmatches_{feature_type}" / f"{scene}_{feature_type}.npy",
                 Path(old) / f"mega_scene_nmatches_{feature_type}.npy"):
        if not path.is_file():
            continue
        try:
            count = load_npy(path).item()
            count = count.get(scene, n_pairs) if isinstance(count, dict) else count
            problem = "" if np.array_equal(count, n_pairs) else f"says {count} pairs"
        except Exception as error:
            problem = reason(error)
        if problem:
            print(f"note: scene {scene} has {n_pairs} pairs; {path.name}: {problem}", file=sys.stderr)


def import_scene(old, new, scene: str, feature_type: str, dtype: str) -> dict:
    """Import one scene; its counts, which are also NEW/scenes/<scene>.json: pairs, images, skipped [[name, reason]]."""
    pairs, skipped, n_keypoints, done = _old_pairs(old, scene, feature_type), [], {}, 0
    _check_count(old, scene, feature_type, len(pairs))
    files = sorted((Path(old) / f"keypoints_{feature_type}" / scene).glob(f"*_{feature_type}.npy"))
    remove_strays(Path(new) / "keypoints" / scene)
    remove_strays(Path(new) / "matches" / scene)
    for path in tqdm(files, f"{scene} images", leave=False, disable=None):
        image = path.name.removesuffix(f"_{feature_type}.npy")
        target = keypoint_path(new, scene, image, feature_type)
        try:
            if not target.exists():
                _import_keypoints(_load_dict(path), target, path.name, feature_type, dtype)
            n_keypoints[image] = len(read_record(target, KEYPOINT_FIELDS, mmap=True)["scores"])
        except Exception as error:
            skipped.append([f"{scene}/{path.name}", reason(error)])
    for name, read in tqdm(pairs, f"{scene} pairs", leave=False, disable=None):
        try:
            record = _match_record(read(), n_keypoints)
        except Exception as error:
            skipped.append([name, reason(error)])
            continue
        write_record(match_path(new, scene, done), record)
        done += 1
    counts = {"pairs": done, "images": len(n_keypoints), "skipped": skipped}
    write_json(scene_path(new, scene), counts)
    return counts


def import_dump(old, new, feature_type: str | None = None, dtype: str = "float16") -> tuple[dict, list]:
    """Import a dump of the original -> {scene: counts as from import_scene}, and [(scene, why it is left out)].

    feature_type: None: the one that OLD has. InputError if OLD is not such a dump, or NEW was made by something else.
    """
    found = [name for name in FEATURE_TYPES if (Path(old) / f"keypoints_{name}").is_dir()]
    if feature_type is None and len(found) > 1:
        raise InputError(f"{old} holds {' and '.join(found)}: choose with --feature_type")
    if not found or feature_type not in (None, *found):
        raise InputError(f"{old} is not a dump of the original IMP code: no keypoints_{feature_type or 'spp'} in it")
    feature_type = feature_type or found[0]
    claim(new, {"format": FORMAT, "version": VERSION, "feature_type": feature_type,
                "settings": {**SETTINGS, "descriptor_dtype": dtype}})
    scenes = sorted(folder.name for folder in (Path(old) / f"keypoints_{feature_type}").iterdir() if folder.is_dir())
    return run_scenes(scenes, new, lambda scene: (
        read_scene(new, scene) if scene_path(new, scene).is_file()
        else import_scene(old, new, scene, feature_type, dtype)), remedy="wait for it")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="dump.import_dump", description=__doc__.splitlines()[0])
    parser.add_argument("old", help="folder that holds keypoints_spp/ or keypoints_sift/")
    parser.add_argument("new", help="folder of the dump to write")
    parser.add_argument("--feature_type", choices=("spp", "sift"), help="default: the one there is")
    parser.add_argument("--descriptor_dtype", choices=("float16", "float32"), default="float16")
    args = parser.parse_args(argv)
    scenes, failed = import_dump(args.old, args.new, args.feature_type, args.descriptor_dtype)
    n_images, n_pairs = (sum(counts[name] for counts in scenes.values()) for name in ("images", "pairs"))
    print(f"{len(scenes)} scenes, {n_images} images, {n_pairs} pairs in {args.new}")
    skipped = [(f"scene {scene}", problem) for scene, problem in failed]
    return report_skipped(skipped + [tuple(entry) for counts in scenes.values() for entry in counts["skipped"]],
                          "scenes, images or pairs")


if __name__ == "__main__":
    sys.exit(run(main))
