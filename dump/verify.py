"""Read a finished dump again: `--verify`. Both functions return how much they read, and [(name, problem)]."""
import json
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from dump.matches import MIN_MATCHES
from tools.cli import InputError, describe_error, reason
from tools.features import FEATURE_TYPES
from tools.manifest import begun_scenes, keypoint_path, match_path, read_manifest, read_scene, scene_path
from tools.records import KEYPOINT_FIELDS, MATCH_FIELDS, check_matches, read_record


def _count_keypoints(path, manifest: dict) -> int:
    """Number of keypoints of a record; InputError says what is wrong with it."""
    record = read_record(path, KEYPOINT_FIELDS, D=FEATURE_TYPES[manifest["feature_type"]].dim)
    n, settings, dtype = len(record["keypoints"]), manifest["settings"], record["descriptors"].dtype
    if not np.isfinite(record["descriptors"]).all():
        raise InputError(f"{path} is damaged: its descriptors has values that are not finite")
    if n < settings["min_keypoints"]:
        raise InputError(f"{n} keypoints are fewer than min_keypoints")
    if dtype != settings["descriptor_dtype"]:
        raise InputError(f"descriptors are {dtype}")
    return n


def _check_match_record(path, n_keypoints: dict, feature_type: str) -> None:
    """InputError says what is wrong with a match record; n_keypoints: by name of the keypoint record."""
    record = read_record(path, MATCH_FIELDS)
    if len(record["matches"]) <= MIN_MATCHES:
        raise InputError(f"it has {len(record['matches'])} matches, more than {MIN_MATCHES} are needed")
    names = [keypoint_path("", "", record[f"image_path{v}"], feature_type).name for v in "01"]
    for name in names:
        if name not in n_keypoints:
            raise InputError(f"its keypoint record {name} is missing or damaged")
    check_matches(path, record["matches"], [n_keypoints[name] for name in names])


def _verify_scene(path, scene, manifest, problems) -> int:
    if not scene_path(path, scene).is_file():
        raise InputError("not complete: run the dump again")
    n_pairs, n_images = (read_scene(path, scene)[name] for name in ("pairs", "images"))
    keypoint_files = sorted((Path(path) / "keypoints" / scene).glob("*"))
    match_files = [match_path(path, scene, i) for i in range(n_pairs)]
    extra = set((Path(path) / "matches" / scene).glob("*")) - set(match_files)
    problems += [(file, "does not belong to the dump") for file in sorted(extra)]
    if len(keypoint_files) != n_images:
        problems.append((f"scene {scene}", f"{len(keypoint_files)} keypoint records, {n_images} expected"))
    n_keypoints = {}
    for file in keypoint_files + match_files:
        try:
            if file.parent.parent.name == "keypoints":
                n_keypoints[file.name] = _count_keypoints(file, manifest)
            else:
                _check_match_record(file, n_keypoints, manifest["feature_type"])
        except Exception as error:
            problems.append((file, reason(error)))
    return len(keypoint_files) + n_pairs


def verify_dump(path, scenes=None) -> tuple[int, list]:
    """Number of records of a training dump, and what is wrong.

    scenes: ids that must be complete; all begun ones if None. Raises InputError for a folder that is not a dump.
    """
    manifest = read_manifest(path)
    n_records, problems = 0, []
    for scene in tqdm(begun_scenes(path) if scenes is None else scenes, "scenes verified", disable=None):
        try:
            n_records += _verify_scene(path, scene, manifest, problems)
        except Exception as error:
            problems.append((f"scene {scene}", reason(error)))
    return n_records, problems


def verify_eval(path) -> tuple[int, list]:
    """Number of pairs of a finished HDF5 file of dump.dump, and what is wrong; InputError if it is not such a file."""
    geometry = {"K1": (3, 3), "K2": (3, 3), "R": (3, 3), "T": (3,), "e": (3, 3), "f": (3, 3)}
    groups = [*geometry, *(f"{name}{side}" for name in ("kpt", "desc", "size", "img_path") for side in (1, 2))]
    problems, checked = [], set()

    def check(name, group, shapes):
        for field, shape in shapes.items():
            found = group[field].shape if field in group else "missing"
            if found != shape:
                problems.append((name, f"{field} is {found}, not {shape}"))
            elif not np.isfinite(group[field][()]).all():
                problems.append((name, f"{field} has values that are not finite"))

    try:
        with h5py.File(path, "r") as file:
            n_pairs = json.loads(file["counts"].asstr()[()])["pairs"]
            dim, numbers = FEATURE_TYPES[file.attrs["feature_type"]].dim, [str(number) for number in range(n_pairs)]
            problems += [(group, f"{len(file.get(group, ()))} pairs, not 0 to {n_pairs - 1}") for group in groups
                         if set(file.get(group, ())) != set(numbers)]
            for number in tqdm(() if problems else numbers, "pairs verified", disable=None):
                pair = {group: file[group][number] for group in groups}
                check(f"pair {number}", pair, geometry)
                for side in (1, 2):
                    name = np.ravel(pair[f"img_path{side}"].asstr()[()])[0]
                    image = file["images"].get(name, {})
                    if name not in checked:
                        n = len(image["kpt"]) if "kpt" in image else 0
                        check(name, image, {"kpt": (n, 3), "desc": (n, dim), "size": (2,)}
                              | ({"depth": (n,)} if "depth" in image else {}))
                        checked.add(name)
                    problems += [(f"pair {number}", f"{field}{side} is not that of its image")
                                 for field in ("kpt", "desc", "size") if image.get(field) != pair[f"{field}{side}"]]
    except Exception as error:
        raise InputError(f"{path} is not a finished dump, or damaged ({describe_error(error)}): delete it and run again"
                         ) from None
    return n_pairs, problems
