"""Images -> a COLMAP database with our features, matches and verified pairs, and a model if asked for.

    python3 -m eval.export_colmap IMAGES OUT --map                      # all pairs of the images in a folder
    python3 -m eval.export_colmap IMAGES OUT --sequential 10            # a video: each frame with the next ten
    python3 -m eval.export_colmap IMAGES OUT --rematch old/database.db  # keypoints of COLMAP, matches of ours

OUT gets database.db, for COLMAP 4; with --map the models 0, 1, ... of COLMAP's incremental mapper, and models.json. The
same command resumes an interrupted run: the database is unfinished.db until every pair is in it. docs/sfm.md says what
is in the database, and how cameras are chosen.
"""
import argparse
import contextlib
import itertools
import math
import os
import shutil
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.colmap_database import Database, known_K, two_view_geometry
from eval.image_matcher import ImageMatcher, focal_K
from eval.image_matches import LoadedImage
from eval.match_images import add_matcher_options, build_matcher, camera_matrix, find_images
from tools.cli import InputError, number, reason, report_skipped, run, whole_number
from tools.extras import import_pycolmap
from tools.files import atomic_path, below, check_file, check_folder, read_json, remove_strays, write_json
from tools.geometry import is_camera_matrix, opencv_to_colmap_K
from tools.locks import locked
from tools.manifest import check_fields, check_settings, is_count, is_list_of
from tools.pair_list import read_pair_list

FORMAT, VERSION = "imp-colmap", 1
GUESSED_FOCAL = 1.2  # of the longer side, as COLMAP guesses
# of settings.json, what a later run may have more of, or otherwise
OPEN_FIELDS = {"K": (lambda value: isinstance(value, dict), {}), "turns": (lambda value: isinstance(value, dict), {}),
               "pairs": (lambda value: value is None or is_list_of(str, str)(value), None),
               "threads": (lambda value: value is None or (is_count(value) and 0 < value < 2 ** 16), None)}


@dataclass
class ImageSet:
    """The images to export and the pairs of them to match.

    folder: of the images; names: relative to it, in the order of their ids. pairs: of names, None for all. turns
    (np.rot90 that make an image upright; one that is not there: as its EXIF data say) and K (3, 3), OpenCV's
    convention: by name, where they are given; focal in pixels: of all others, None if it is not known.
    """

    folder: Path
    names: list[str]
    pairs: list[tuple[str, str]] | None = None
    turns: dict[str, int] = field(default_factory=dict)
    K: dict[str, np.ndarray] = field(default_factory=dict)
    focal: float | None = None

    def add_pair_list(self, path) -> None:
        """Take pairs, and what it says of turns and cameras, from a pair list; InputError if it contradicts itself."""
        self.pairs = []
        for pair in read_pair_list(path):
            self.pairs.append((pair.image0, pair.image1))
            for name, turns, K in ((pair.image0, pair.rot0, pair.K0), (pair.image1, pair.rot1, pair.K1)):
                below(self.folder, name)
                told = K is not None or pair.rot0 or pair.rot1
                turns_differ = told and self.turns.setdefault(name, turns) != turns
                if turns_differ or (K is not None and not np.array_equal(self.K.setdefault(name, K), K)):
                    raise InputError(f"{path} gives {name} two cameras: its turns and K must be the same everywhere")
        self.names = sorted({name for pair in self.pairs for name in pair})

    def camera(self, view: LoadedImage):
        """The pycolmap.Camera of an image: as given, by EXIF, or guessed."""
        w, h = view.image_size
        K = self.K.get(view.name)
        if K is not None and K[0, 1]:
            raise InputError(f"its K has a skew of {K[0, 1]:g}, which COLMAP's cameras cannot have")
        focal = self.focal or view.focal
        known = K is not None or focal is not None
        matrix = opencv_to_colmap_K(focal_K(focal or GUESSED_FOCAL * max(w, h), (w, h)) if K is None else K)
        fx, fy, cx, cy = (float(value) for value in (matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]))
        model, params = ("SIMPLE_RADIAL", [fx, cx, cy, 0.0]) if K is None else ("PINHOLE", [fx, fy, cx, cy])
        return import_pycolmap().Camera(model=model, width=w, height=h, params=params, has_prior_focal_length=known)


def nearest_pairs(descriptors: list[np.ndarray], k: int) -> list[tuple[int, int]]:
    """Index pairs i < j of images of which one is among the k most similar of the other.

    descriptors: (N, D) local descriptors of each image. Its global descriptor is their mean, less that of all images.
    """
    means = np.stack([local.mean(axis=0) if len(local) else np.zeros(local.shape[1]) for local in descriptors])
    means -= means.mean(axis=0)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    similarity = means @ means.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :min(k, len(means) - 1)]
    return sorted({(min(i, j), max(i, j)) for i, row in enumerate(nearest.tolist()) for j in row})


def choose_pairs(images: ImageSet, database: Database, dim: int, sequential, nearest) -> list[tuple[str, str]]:
    """The pairs of names to match, in the order of image ids; images that could not be read are left out."""
    ids = database.ids
    if images.pairs is not None:
        wanted = {tuple(sorted(pair, key=ids.get)) for pair in images.pairs
                  if all(name in ids for name in pair) and pair[0] != pair[1]}
        return sorted(wanted, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    names = [name for name in images.names if name in ids]
    if sequential:
        return [(names[i], other) for i in range(len(names)) for other in names[i + 1:i + 1 + sequential]]
    if nearest and len(names) > 1:
        pairs = nearest_pairs([database.descriptors(name, dim) for name in names], nearest)
        return [(names[i], names[j]) for i, j in pairs]
    return list(itertools.combinations(names, 2))


class Export:
    """One run of the command: the images and pairs that `database` lacks are added to it.

    failed: (name, reason) of the images that could not be read, and of the pairs that could not be matched.
    """

    def __init__(self, images: ImageSet, matcher: ImageMatcher, database: Database, rematch: bool,
                 min_inliers: int | None):
        self.images, self.matcher, self.database = images, matcher, database
        self.rematch, self.min_inliers = rematch, min_inliers
        self.feature_type = matcher.settings["feature_type"]
        self.views: dict[str, LoadedImage] = {}
        self.failed: dict[str, str] = {}

    def add_images(self) -> None:
        """Extract and write the features of the images that are not there."""
        for name in tqdm([name for name in self.images.names if name not in self.database.ids], "images", disable=None):
            try:
                view = self._load(name)
                camera = self.images.camera(view)
            except Exception as error:
                self.failed[name] = reason(error)
            else:
                self.database.add_image(view, camera, self.feature_type)
                self.views[name] = view

    def add_pairs(self, pairs: list[tuple[str, str]]) -> None:
        """Match and write the pairs that are not there; an image is kept for as long as pairs of it are to come."""
        todo = [pair for pair in pairs if not self.database.has_pair(*pair)]
        uses = Counter(name for pair in todo for name in pair)
        self.views = {name: view for name, view in self.views.items() if uses[name]}
        for pair in tqdm(todo, "pairs", disable=None):
            views = [self._view(name) for name in pair]
            if None not in views:
                cameras = [self.database.camera(name) for name in pair]
                try:
                    found = self.matcher.match(*views, *map(known_K, cameras))
                    geometry = two_view_geometry(found, *cameras, self.min_inliers or math.ceil(found.least_inliers),
                                                 self.matcher.settings["seed"])
                except Exception as error:
                    self.failed[" ".join(pair)] = reason(error)
                else:
                    self.database.add_pair(*pair, found.matches, geometry)
            for name in pair:
                uses[name] -= 1
                if not uses[name]:
                    self.views.pop(name, None)

    def _view(self, name: str) -> LoadedImage | None:
        """An image that is in the database, read again if an earlier run added it; None if it cannot be read."""
        if name not in self.views and name not in self.failed:
            try:
                self.views[name] = self._load(name)
            except Exception as error:
                self.failed[name] = reason(error)
                return None
            if not self.database.has_keypoints(self.views[name]):
                raise InputError(f"{name} has other keypoints than in the database, which another device or library "
                                 "found: write elsewhere")
        return self.views.get(name)

    def _load(self, name: str) -> LoadedImage:
        if self.rematch:
            return self.database.load(name, self.feature_type, self.matcher.resize)
        view = self.matcher.load(self.images.folder / name, self.images.turns.get(name), name)
        return replace(view, picture=view.picture[:1, :1])  # nothing is drawn


def image_names(path) -> list[str]:
    """Names of the images in a database of ours; InputError if it is damaged, as a power cut may leave it."""
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as connection:
        if connection.execute("pragma quick_check").fetchone() == ("ok",):
            return [name for name, in connection.execute("select name from images")]
    raise InputError(f"{path} is damaged: delete {Path(path).parent} to start anew")


def copy_to_rematch(source, target) -> None:
    """Copy a database, without its matches and two-view geometries, atomically; the source is only read."""
    check_file(source, "database")
    with atomic_path(target) as temporary:
        try:
            uri = f"{Path(source).resolve().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as old, \
                    contextlib.closing(sqlite3.connect(temporary)) as new:
                old.backup(new)
                new.execute("delete from matches")
                new.execute("delete from two_view_geometries")
                new.commit()
        except sqlite3.Error as error:
            raise InputError(f"{source} is not a database of COLMAP: {error}") from None


def closed(settings: dict) -> dict:
    """Settings that a later run has to have, too."""
    return {**settings, "threads": None, "K": None, "turns": None, "pairs": settings["pairs"] and "of a list"}


def add_settings(made: dict, settings: dict, images: ImageSet, there: list[str], out: Path) -> dict:
    """`settings`, with what `made` says of images that are not asked for any more.

    there: names in the database. InputError if one of these has another camera now, or the list lost pairs.
    """
    asked = set(map(tuple, settings["pairs"] or []))
    lost = next((pair for pair in made["pairs"] or [] if tuple(pair) not in asked), None)
    if lost:
        raise InputError(f"{out} has the pair {' '.join(lost)}, which is not in the list: add it, or write elsewhere")
    settings, names = dict(settings), set(images.names)
    for key in ("K", "turns"):
        settings[key] = {name: old for name, old in made[key].items() if name not in names} | settings[key]
        for name in there:
            old, new = made[key].get(name), settings[key].get(name)
            if old != new:
                raise InputError(f"{out} was made with {key} {old} of {name}, now it is {new}: give the same settings, "
                                 "or write elsewhere")
    return settings


def claim(out: Path, settings: dict, images: ImageSet, rematch=None) -> Path:
    """Mark the folder `out` as made with `settings`, or check that it was, and that no image changed since.

    images, rematch: as `export` takes them. Returns the database to fill.
    """
    file, final, unfinished = (out / name for name in ("settings.json", "database.db", "unfinished.db"))
    if file.exists():
        made = check_fields(read_json(file), OPEN_FIELDS, file)
        check_settings(closed(made), closed(settings), out)
    elif final.exists():
        raise InputError(f"{out} holds a database that was not made here: write elsewhere")
    else:
        unfinished.unlink(missing_ok=True)
    path = final if final.exists() else unfinished
    if path.exists():
        there = image_names(path)
        settings = add_settings(made, settings, images, there, out)
        sources = [images.folder / name for name in there]
        sources += [Path(settings["weights"])] if settings["weights"] else []
        for source in [] if rematch else sources:
            if source.exists() and source.stat().st_mtime > file.stat().st_mtime:
                raise InputError(f"{source} was changed after {out} was made from it: write elsewhere")
    elif rematch:
        copy_to_rematch(rematch, path)
    write_json(file, settings)
    return path


def export(images: ImageSet, out: Path, matcher: ImageMatcher, sequential: int | None = None,
           nearest: int | None = None, rematch=None, min_inliers: int | None = None) -> list[tuple[str, str]]:
    """Fill `out`/database.db; what is there is kept. Returns (name, reason) of images and pairs that were left out.

    sequential: match each image with so many that follow it; nearest: with so many of the most similar; neither, and no
    pairs in `images`: all pairs. rematch: a database whose keypoints are matched, instead of extracting new ones.
    min_inliers: of a two-view geometry; None: as many as make a pair trusted (docs/own_images.md).
    """
    pairs = None if images.pairs is None else sorted(map(list, images.pairs))
    settings = {**matcher.settings, "format": f"{FORMAT} {VERSION}", "images": os.path.abspath(images.folder),
                "focal": images.focal, "K": {name: K.tolist() for name, K in sorted(images.K.items())},
                "turns": images.turns, "pairs": pairs, "sequential": sequential, "nearest": nearest,
                "rematch": rematch and os.path.abspath(rematch), "min_inliers": min_inliers,
                "threads": torch.get_num_threads()}
    path = claim(out, settings, images, rematch)
    with Database(path) as database:
        if rematch and images.pairs is None:
            images.names = list(database.ids)
        job = Export(images, matcher, database, rematch is not None, min_inliers)
        job.add_images()
        if len(database.ids) < 2:
            raise InputError(f"{len(database.ids)} images can be read, and a pair takes two"
                             + "".join(f"; {name}: {why}" for name, why in list(job.failed.items())[:1]))
        job.add_pairs(choose_pairs(images, database, matcher.extractor.dim, sequential, nearest))
        n_images, n_pairs = database.counts()
        print(f"{n_images} images, {n_pairs} pairs with matches, {database.db.num_verified_image_pairs()} of them "
              f"verified: {out / 'database.db'}")
    # the last rows are beside the file as long as another program, COLMAP's window say, has it open
    with contextlib.closing(sqlite3.connect(path, timeout=1)) as connection:
        if connection.execute("pragma wal_checkpoint(truncate)").fetchone()[0]:
            raise InputError(f"another program is reading {path}: close it and run this again")
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(path, out / "database.db")
    return list(job.failed.items())


def map_images(folder: Path, out: Path, seed: int = 0) -> list[dict]:
    """Make models of `out`/database.db with COLMAP's incremental mapper, as `out`/0, `out`/1, ..., the largest first.

    Returns what `out`/models.json holds: name, images, points, track_length and reprojection_error (pixels) of each. It
    is written last, so that models of this very database are left as they are.
    """
    colmap, report = import_pycolmap(), out / "models.json"
    with Database(out / "database.db") as database:
        content = {"format": "imp-colmap-models", "version": VERSION, "seed": seed, "database": database.counts()}
    if report.exists():
        there = check_fields(read_json(report), {"models": (lambda value: isinstance(value, list), None)}, report)
        if {**there, "models": None} == {**content, "models": None}:
            return there["models"]
    work = out / "mapping"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    # several threads add up in any order, and the last digits differ from run to run
    options = colmap.IncrementalPipelineOptions(random_seed=seed, num_threads=1)
    models = colmap.incremental_mapping(out / "database.db", folder, work, options)
    report.unlink(missing_ok=True)
    for old in out.glob("[0-9]*"):
        shutil.rmtree(old)
    content["models"] = []
    # COLMAP keeps its first attempt, however small, beside a model of more images
    for name, (index, model) in enumerate(sorted(models.items(), key=lambda item: -item[1].num_reg_images())):
        os.replace(work / str(index), out / str(name))
        content["models"].append({
            "name": str(name), "images": model.num_reg_images(), "points": model.num_points3D(),
            "track_length": model.compute_mean_track_length(),
            "reprojection_error": model.compute_mean_reprojection_error()})
    write_json(report, content)
    shutil.rmtree(work, ignore_errors=True)
    return content["models"]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.export_colmap", description=__doc__.split("\n\n")[0])
    parser.add_argument("images", metavar="IMAGES", help="folder of the images")
    parser.add_argument("out", metavar="OUT", help="folder of the database and the models")
    parser.add_argument("--map", action="store_true", help="make models with COLMAP's incremental mapper, too")
    parser.add_argument("--focal", type=number(1e-6), help="focal length of all images in pixels")
    parser.add_argument("--K", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"),
                        help="camera of all images, for the images as stored, OpenCV's pixel convention")
    parser.add_argument("--pairs", metavar="LIST", help="match the pairs of a list, with its cameras if it has some")
    parser.add_argument("--sequential", type=whole_number(1), metavar="W", help="match each image with the next W")
    parser.add_argument("--nearest", type=whole_number(1), metavar="K",
                        help="match each image with the K most similar, by its local descriptors")
    parser.add_argument("--rematch", metavar="DATABASE", help="match the keypoints of a database; it is only read")
    parser.add_argument("--min_inliers", type=whole_number(5),
                        help="of a two-view geometry (default: 30; of LightGlue also 6 in 100 keypoints)")
    add_matcher_options(parser)
    args = parser.parse_args(argv)
    if sum(value is not None for value in (args.pairs, args.sequential, args.nearest)) > 1:
        parser.error("give one of --pairs, --sequential and --nearest")
    if sum(value is not None for value in (args.focal, args.K, args.rematch)) > 1:
        parser.error("give one of --focal and --K; with --rematch, none: the cameras are the database's")
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    import_pycolmap()
    out, folder = Path(args.out), Path(args.images)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of images")
    check_folder(out)
    images = ImageSet(folder, [] if args.rematch else find_images(folder), focal=args.focal)
    if args.pairs:
        images.add_pair_list(args.pairs)
    if args.K:
        K = camera_matrix(*args.K)
        if not is_camera_matrix(K):
            raise InputError("--K: fx and fy must be more than 0, and all four numbers finite")
        images.K = dict.fromkeys(images.names, K) | images.K
    if args.rematch and (images.K or images.turns):
        raise InputError("with --rematch, a list of pairs holds names alone: the cameras are the database's")
    with locked(out / ".lock", f"another process writes to {out}: wait for it, or name another folder"):
        remove_strays(out)
        used = out / "settings.json"
        made = check_fields(read_json(used), OPEN_FIELDS, used) if used.exists() else {}
        if made.get("threads"):  # with another number, keypoints of networks differ in the last digits
            torch.set_num_threads(made["threads"])
        if args.rematch and not args.feature_type and (args.matching_method or args.weights or not made):
            args.feature_type = "sift"
        matcher = build_matcher(args, made)
        failed = export(images, out, matcher, args.sequential, args.nearest, args.rematch, args.min_inliers)
        models = map_images(folder, out, args.seed) if args.map else []
    if models:
        print("model  images  points  track length  reprojection error (px)")
        for row in models:
            print(f"{row['name']:>5}  {row['images']:6d}  {row['points']:6d}  {row['track_length']:12.2f}  "
                  f"{row['reprojection_error']:23.3f}")
    elif args.map:
        print("no model: too few verified pairs", file=sys.stderr)
    return max(report_skipped(failed, "images or pairs"), int(args.map and not models))


if __name__ == "__main__":
    sys.exit(run(main))
