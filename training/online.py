"""Pairs made on the fly from images (online mode): of photographs, and of scenes in MegaDepth's layout.

A source makes `views` views of one photograph, or alternately of the two images of a pair, and pairs each even one with
each odd one: 2 views make 1 pair, 4 make 4, 6 make 9. A view is a function of the seed and its number, so that it does
not matter who makes it.
"""
import functools
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from tools.cli import InputError
from tools.correspondences import depth_at
from tools.distributed import one_thread
from tools.features import FEATURE_TYPES, build_extractor
from tools.files import IMAGE_SUFFIXES, read_depth, read_image
from tools.geometry import colmap_to_opencv_K, make_pose, opencv_to_colmap_K, relative_pose, to_rays
from tools.scene_info import candidate_pairs, list_scenes, load_scene_info
from training.data import Draws, Labels, Pair
from training.views import change_light, photo_camera, photo_depth, transform, turned_camera, warp

PHOTO_ASPECT = 4 / 3


# what the views of a group share, and the photographs behind them
_read_image = functools.lru_cache(maxsize=8)(read_image)
_read_depth = functools.lru_cache(maxsize=4)(read_depth)


@functools.lru_cache(maxsize=1)
def _extractor(feature_type: str, max_keypoints: int, contrast_threshold: float):
    # built where it is used: it cannot be sent to another process
    settings = {**FEATURE_TYPES[feature_type].dump_settings, "max_keypoints": max_keypoints}
    if "contrast_threshold" in settings:
        settings["contrast_threshold"] = contrast_threshold
    return build_extractor(feature_type, device="cpu", **settings)


@functools.lru_cache(maxsize=16)
def _view(source, group: int, attempt: int, index: int) -> dict:
    return source.view(group, attempt, index, np.random.default_rng([source.seed, group, attempt, index, 3]))


def pairs_of_views(config: dict) -> int:
    """How many pairs the views of a photograph, or of a pair of images, make."""
    return (config["online_views"] // 2) ** 2


class _ViewSource:
    """Makes pairs of views of images, as a configuration of training says."""

    has_pose: bool

    def __init__(self, folder, config: dict):
        self.name, self.folder, self.config, self.seed = str(folder), Path(folder), config, config["seed"]
        self.labels = Labels(config["inlier_th"], config["outlier_th"])
        self.pairs_per_item = pairs_of_views(config)

    def read_image(self, path) -> np.ndarray:
        """An image in colour or gray, as the features need it."""
        return _read_image(self.folder / path, FEATURE_TYPES[self.config["feature"]].color)

    def features(self, image: np.ndarray) -> dict:
        """What a view has of its features."""
        names = ("feature", "extract_keypoints", "contrast_threshold")
        with one_thread():  # as in sample-making processes
            found = _extractor(*(self.config[name] for name in names))(image)
        rows = np.arange(len(found.scores))
        if self.config["unique_locations"]:
            # not by the extractor, which would describe twice as many keypoints as it returns
            rows = np.sort(np.unique(found.keypoints, axis=0, return_index=True)[1])
        # descriptors as in a dump
        return {"keypoints": found.keypoints[rows], "scores": found.scores[rows],
                "descriptors": found.descriptors[rows].astype(np.float16), "image_size": found.image_size}

    def pair(self, k: int, attempt: int) -> Pair:
        """The pair of sample k of the run; InputError if an image or a depth map cannot be read."""
        group, member = divmod(k, self.pairs_per_item)
        even, odd = divmod(member, self.config["online_views"] // 2)
        views = [_view(self, group, attempt, index) for index in (2 * even, 2 * odd + 1)]
        # true matches by projection, from keypoints, depth, K and pose
        cameras = [(view["keypoints"], view["depth"], opencv_to_colmap_K(view["K"]), view["pose"]) for view in views]
        matches, unmatched = self.labels.label(*cameras)
        paths = tuple(view["image_path"] for view in views)
        pose = relative_pose(views[0]["pose"], views[1]["pose"]) if self.has_pose else None
        return Pair(f"{self.name}: {' '.join(sorted(set(paths)))}", views, matches, pose, paths, unmatched)


class PhotoSource(_ViewSource):
    """Views of each photograph under a folder, as a plane in front of others."""

    has_pose = False  # a plane does not determine one

    def __init__(self, folder, config: dict):
        """Raises InputError if there are fewer than three images under `folder`."""
        super().__init__(folder, config)
        self.scenes = []
        self.paths = sorted(str(path.relative_to(folder)) for path in self.folder.rglob("*")
                            if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
        if len(self.paths) < 3:
            raise InputError(f"{folder} holds {len(self.paths)} images, at least 3 are needed: behind a photograph "
                             "are others")
        self.draws = Draws({"": len(self.paths)}, len(self.paths), self.seed)

    def view(self, group: int, attempt: int, index: int, rng: np.random.Generator) -> dict:
        """View `index` of the photograph of a group of pairs; its world is the photograph's plane."""
        number = self.draws.draw(group, attempt)[1]
        # never the same behind two views that make a pair: it would match, and must not
        behind = number + 1 + 2 * int(rng.integers((len(self.paths) - 1) // 2)) + index % 2
        image, background = (self.read_image(self.paths[i % len(self.paths)]) for i in (number, behind))
        side, (h, w) = self.config["view_size"], image.shape[:2]
        view_size = (side, round(side / PHOTO_ASPECT))
        if h > w:
            view_size = view_size[::-1]
        background = cv2.resize(background, view_size, interpolation=cv2.INTER_AREA)
        K, pose, H = photo_camera((w, h), view_size, rng)
        view = self.features(change_light(warp(image, H, view_size, background), rng))
        in_photo = transform(view["keypoints"], np.linalg.inv(H))
        inside = ((in_photo >= 0) & (in_photo <= [w - 1, h - 1])).all(axis=1)
        depth = np.where(inside, photo_depth(view["keypoints"], K, pose), 0)
        return {**view, "K": K, "pose": pose, "depth": depth, "image_path": self.paths[number]}


class SceneSource(_ViewSource):
    """Pairs of images with depth and pose of scenes in MegaDepth's layout, each turned and zoomed."""

    has_pose = True

    def __init__(self, base_path, scene_list, config: dict):
        """scene_list: ids; None: all. Raises InputError for scenes that are not there or cannot be read, and if no two
        images overlap."""
        super().__init__(base_path, config)
        self.infos = {}
        for scene, path in tqdm(list_scenes(base_path, scene_list).items(), "scenes", leave=False, disable=None):
            info = load_scene_info(path)
            for name, why in info.get("left_out", []):
                print(f"note: {path}: {name} is left out: {why}", file=sys.stderr)
            pairs = candidate_pairs(info)
            if len(pairs):
                # the 3D points, which are most of it, are not needed any more
                self.infos[scene] = {name: info[name] for name in ("image_paths", "depth_paths", "intrinsics", "poses")}
                self.infos[scene]["pairs"] = pairs
        if not self.infos:
            raise InputError(f"{base_path}: no two images overlap as training pairs should")
        self.scenes = list(self.infos)
        self.draws = Draws({scene: len(info["pairs"]) for scene, info in self.infos.items()}, config["pairs_per_scene"],
                           self.seed)

    def view(self, group: int, attempt: int, index: int, rng: np.random.Generator) -> dict:
        """View `index` of a group of pairs, alternately of the one image and of the other."""
        scene, number = self.draws.draw(group, attempt)
        info = self.infos[scene]
        i = info["pairs"][number][index % 2]
        image = self.read_image(info["image_paths"][i])
        depth = _read_depth(self.folder / info["depth_paths"][i])
        if depth.shape != image.shape[:2]:
            raise InputError(f"depth map {info['depth_paths'][i]} is {depth.shape[1]}x{depth.shape[0]}, its image "
                             f"{image.shape[1]}x{image.shape[0]}")
        h, w = image.shape[:2]
        scale = self.config["view_size"] / max(h, w)
        image_K = colmap_to_opencv_K(info["intrinsics"][i])
        view_size = (round(w * scale), round(h * scale))
        K, R, H = turned_camera(image_K, (w, h), view_size, rng)
        view = self.features(change_light(warp(image, H, view_size), rng))
        in_image = transform(view["keypoints"], np.linalg.inv(H))
        inside = ((in_image >= 0) & (in_image <= [w - 1, h - 1])).all(axis=1)
        for name in ("keypoints", "scores", "descriptors"):
            view[name] = view[name][inside]
        in_image = in_image[inside]
        return {**view, "K": K, "pose": make_pose(R, [0, 0, 0]) @ info["poses"][i],
                "depth": depth_at(depth, in_image) * (to_rays(in_image, image_K) @ R[2]),
                "image_path": info["image_paths"][i]}
