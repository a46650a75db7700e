"""Sets of image pairs to evaluate on, read one pair at a time.

A set has a length, `set.name(i)`, `set.image_names()`, and `set[i]`, which returns an EvalPair or raises InputError
for a pair that cannot be used.
"""
import contextlib
import functools
import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import h5py
import numpy as np

from tools.cli import InputError
from tools.correspondences import depth_at
from tools.features import Features
from tools.files import below, hdf5_array, hdf5_item, hdf5_text, open_hdf5, read_depth, read_image
from tools.geometry import (
    is_camera_matrix,
    is_rigid,
    make_pose,
    relative_pose,
    resize_keypoints,
    turn_K,
    turn_keypoints,
    turn_pose,
)
from tools.pair_list import Pair, read_pair_list
from tools.scannet import packed_name

# both views of a pair, and room for pairs that share an image; 2000 keypoints of 256 channels take 2 MB
CACHED_IMAGES = 128
HDF5_GROUPS = ("K1", "K2", "R", "T", "img_path1", "img_path2", "kpt1", "kpt2", "desc1", "desc2")


@dataclass
class EvalPair:
    """Two views as a matcher sees them, upright, and what is known of their cameras.

    index: place in the set. K0, K1: (3, 3) for the upright images, OpenCV's pixel convention, or None; T_0to1: (4, 4)
    or None; H_0to1: (3, 3), the homography from keypoints of view 0 to those of view 1, or None. depth0/1: (N,) at the
    keypoints, 0 = unknown, or None. turns0/1: np.rot90 turns that make the stored image upright. InputError if a value
    cannot be right: whoever makes a pair need not check it.
    """

    index: int
    names: tuple[str, str]
    image_paths: tuple[Path, Path]
    features0: Features
    features1: Features
    K0: np.ndarray | None = None
    K1: np.ndarray | None = None
    T_0to1: np.ndarray | None = None
    depth0: np.ndarray | None = None
    depth1: np.ndarray | None = None
    turns0: int = 0
    turns1: int = 0
    H_0to1: np.ndarray | None = None

    def __post_init__(self):
        for view, found, K, depth in (("0", self.features0, self.K0, self.depth0),
                                      ("1", self.features1, self.K1, self.depth1)):
            n = len(found.keypoints)
            for name, values, shape in (
                    ("keypoints", found.keypoints, (n, 2)), ("scores", found.scores, (n,)),
                    ("descriptors", found.descriptors, (n, *self.features0.descriptors.shape[1:2])),
                    ("depth", np.zeros(n) if depth is None else depth, (n,))):
                if values.shape != shape or not np.isfinite(values).all():
                    wrong = f"of shape {values.shape}, not {shape}" if values.shape != shape else "not finite"
                    raise InputError(f"{name}{view}: {wrong}")
            if not all(0 < side < 2 ** 31 for side in found.image_size):
                raise InputError(f"image_size{view} is {found.image_size}")
            if depth is not None and n and depth.min() < 0:
                raise InputError(f"depth{view} is negative")
            if K is not None and not is_camera_matrix(K):
                raise InputError(f"K{view} is not a camera matrix")
        if self.T_0to1 is not None and not is_rigid(self.T_0to1):
            raise InputError("the pose is not a rotation and a translation")

    def matched_keypoints(self, matches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keypoints (M, 2) of both views, row i of one matches row i of the other; matches (M, 2): indices."""
        return self.features0.keypoints[matches[:, 0]], self.features1.keypoints[matches[:, 1]]


def upright_images(pair: EvalPair) -> tuple[np.ndarray, np.ndarray]:
    """Both images of a pair, (H, W, 3) BGR, turned and resized as its keypoints are; InputError if one is damaged."""
    images = []
    for path, turns, features in zip(pair.image_paths, (pair.turns0, pair.turns1), (pair.features0, pair.features1)):
        image = np.ascontiguousarray(np.rot90(read_image(path, color=True), turns))
        same = image.shape[1::-1] == tuple(features.image_size)
        images.append(image if same else cv2.resize(image, features.image_size, interpolation=cv2.INTER_AREA))
    return tuple(images)


class Hdf5PairSet:
    """The file of features and pairs that the evaluation dump writes; files of that format made elsewhere read too.

    path: the HDF5 file; image_dir: what the image paths in it are relative to. descriptor_dim: channels of descriptors;
    None: as the first pair has. max_keypoints: of an image, the first ones, None: all.
    """

    def __init__(self, path, image_dir, descriptor_dim: int | None = None, max_keypoints: int | None = None):
        self.path, self.image_dir, self.max_keypoints = Path(path), Path(image_dir), max_keypoints
        with open_hdf5(path) as file:
            missing = [group for group in HDF5_GROUPS if not isinstance(hdf5_item(file, group), h5py.Group)]
            if missing:
                raise InputError(f"{path} is not an evaluation dump: it lacks the group {missing[0]}; make it with "
                                 "dump.dump")
            names = list(file["kpt1"])
            if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", name) for name in names):
                raise InputError(f"{path} is not an evaluation dump: the names in its groups are not pair indices")
            self.indices = sorted(map(int, names))
            if not self.indices:
                raise InputError(f"{path} holds no pairs; delete it and run dump.dump again")
            dims = self._descriptor_dims(file)
            first = next(dims, None)
            if first is None:
                raise InputError(f"{path} holds no descriptors; delete it and run dump.dump again")
            self.descriptor_dim = descriptor_dim or first
            if self.descriptor_dim != first and self.descriptor_dim not in dims:
                raise InputError(f"{path} holds descriptors of {first} channels, not {descriptor_dim}: check "
                                 "--feature_type")

    def _descriptor_dims(self, file):
        for index in self.indices:
            with contextlib.suppress(Exception):  # __getitem__ says what is wrong with a pair
                _, dim = hdf5_item(file, f"desc1/{index}").shape
                yield dim

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """The i-th pair as a message names it."""
        return f"pair {self.indices[i]}"

    def image_names(self) -> set[str]:
        """Paths of all images, relative to the image folder, as far as they can be read."""
        names = set()
        with open_hdf5(self.path) as file:
            for group, index in itertools.product((file["img_path1"], file["img_path2"]), self.indices):
                with contextlib.suppress(Exception):
                    names.add(hdf5_text(group, str(index)))
        return names

    def __getitem__(self, i: int) -> EvalPair:
        index = self.indices[i]
        try:
            # opened for each pair: so whatever the file does is the fault of this pair alone
            with open_hdf5(self.path) as file:
                names = tuple(hdf5_text(file, f"img_path{view}/{index}") for view in "12")
                paths = tuple(below(self.image_dir, name) for name in names)
                K0, K1 = (_numbers(file, f"K{view}/{index}", (3, 3)) for view in "12")
                T_0to1 = make_pose(_numbers(file, f"R/{index}", (3, 3)), _numbers(file, f"T/{index}", (3,)))
                features = [self._features(file, index, view, path) for view, path in zip("12", paths)]
                depths = [self._depth(file, index, view) for view in "12"]
            return EvalPair(i, names, paths, *features, K0, K1, T_0to1, *depths)
        except InputError as error:
            raise InputError(f"pair {index} of {self.path} cannot be used: {error}") from None

    def _features(self, file, index: int, view: str, image_path: Path) -> Features:
        keypoints = hdf5_array(file, f"kpt{view}/{index}", (None, 3))
        descriptors = hdf5_array(file, f"desc{view}/{index}", (len(keypoints), self.descriptor_dim))
        if hdf5_item(file, f"size{view}/{index}") is None:
            height, width = read_image(image_path).shape
        else:
            sides = _numbers(file, f"size{view}/{index}", (2,))
            width, height = (int(side) if np.isfinite(side) else 0 for side in sides)
        keypoints, descriptors = _float32(keypoints[:self.max_keypoints]), _float32(descriptors[:self.max_keypoints])
        return Features(keypoints[:, :2].copy(), keypoints[:, 2].copy(), descriptors, (width, height))

    def _depth(self, file, index: int, view: str) -> np.ndarray | None:
        name = f"depth{view}/{index}"
        if hdf5_item(file, name) is None:
            return None
        return _float32(hdf5_array(file, name, (None,)))[:self.max_keypoints]


class ListPairSet:
    """Pairs of a list (`tools.pair_list.Pair`), features extracted on the fly.

    Images are read as stored, resized, turned upright, and their keypoints given in pixels of the turned original.
    extractor: image (H, W) uint8 -> Features. resize: (w, h) of the stored image, or (longer side,), or None.
    depth_dir: the depth map of image a/b.jpg is a/b.h5 or a/b.png in it, for the image as stored (optional).
    camera: image name -> K (3, 3), world-to-camera pose (4, 4), used instead of what the list says (optional).
    """

    def __init__(self, pairs: list[Pair], image_dir, extractor, resize: tuple | None = None, depth_dir=None,
                 camera=None):
        self.pairs, self.extractor, self.resize, self.camera = pairs, extractor, resize, camera
        self.image_dir = Path(image_dir)
        self.depth_dir = None if depth_dir is None else Path(depth_dir)
        if not self.image_dir.is_dir():
            raise InputError(f"no image folder at {image_dir}")
        if self.depth_dir is not None and not any(self._depth_path(pair.image0) for pair in pairs):
            raise InputError(f"no depth map of any pair in {depth_dir}: expected {Path(pairs[0].image0).stem}.h5 or "
                             f".png in {self.depth_dir / Path(pairs[0].image0).parent}")
        self._load = functools.lru_cache(maxsize=CACHED_IMAGES)(self._load)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        """The i-th pair as a message names it."""
        return f"{self.pairs[i].image0} {self.pairs[i].image1}"

    def image_names(self) -> set[str]:
        """Paths of all images, relative to the image folder."""
        return {name for pair in self.pairs for name in (pair.image0, pair.image1)}

    def __getitem__(self, i: int) -> EvalPair:
        pair = self.pairs[i]
        if self.camera is not None:
            (K0, pose0), (K1, pose1) = self.camera(pair.image0), self.camera(pair.image1)
            pair = replace(pair, K0=K0, K1=K1, T_0to1=relative_pose(pose0, pose1))
        features0, depth0, size0 = self._load(pair.image0, pair.rot0)
        features1, depth1, size1 = self._load(pair.image1, pair.rot1)
        K0 = K1 = T_0to1 = None
        if pair.K0 is not None:
            K0, K1 = turn_K(pair.K0, size0, pair.rot0), turn_K(pair.K1, size1, pair.rot1)
        if pair.T_0to1 is not None:
            T_0to1 = relative_pose(turn_pose(np.eye(4), pair.rot0), turn_pose(pair.T_0to1, pair.rot1))
        return EvalPair(i, (pair.image0, pair.image1), (self.image_dir / pair.image0, self.image_dir / pair.image1),
                        features0, features1, K0, K1, T_0to1, depth0, depth1, pair.rot0, pair.rot1)

    def _depth_path(self, name: str) -> Path | None:
        candidates = [(self.depth_dir / name).with_suffix(suffix) for suffix in (".h5", ".png")]
        return next((path for path in candidates if path.is_file()), None)

    def _load(self, name: str, turns: int) -> tuple[Features, np.ndarray | None, tuple[int, int]]:
        """Features of the upright image, depth at its keypoints (or None), and the size (w, h) as stored."""
        image = read_image(self.image_dir / name, getattr(self.extractor, "color", False))
        size = (image.shape[1], image.shape[0])
        new_size = _new_size(size, self.resize)
        if new_size != size:
            # linear, also when shrinking: what the published results were made with
            image = cv2.resize(image, new_size, interpolation=cv2.INTER_LINEAR)
        found = self.extractor(np.ascontiguousarray(np.rot90(image, turns)))
        # resized and turned -> resized as stored -> as stored -> turned original
        keypoints = turn_keypoints(found.keypoints, found.image_size, -turns)
        stored = resize_keypoints(keypoints, size[0] / new_size[0], size[1] / new_size[1])
        upright_size = size if turns % 2 == 0 else size[::-1]
        upright = turn_keypoints(stored, size, turns).astype(np.float32)
        features = Features(upright, found.scores, found.descriptors, upright_size)
        path = None if self.depth_dir is None else self._depth_path(name)
        if path is None:
            return features, None, size
        depth = read_depth(path)
        if depth.shape != size[::-1]:
            raise InputError(f"{path} is {depth.shape[1]}x{depth.shape[0]}, its image {size[0]}x{size[1]}")
        return features, depth_at(depth, stored), size


def read_scannet_pairs(path) -> list[Pair]:
    """Pairs of a list by the names that they have in SGMNet's packaging (tools.scannet); cameras are not read."""
    return [Pair(packed_name(pair.image0), packed_name(pair.image1), pair.rot0, pair.rot1)
            for pair in read_pair_list(path)]


def _new_size(size: tuple[int, int], resize: tuple | None) -> tuple[int, int]:
    """Size (w, h) after resizing to (w, h), or by the longer side, which keeps the proportions."""
    if resize is None:
        return size
    if len(resize) == 2:
        return tuple(resize)
    scale = resize[0] / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _numbers(file, name: str, shape: tuple) -> np.ndarray:
    """Dataset `name` as float64 of `shape`, which it may hold in another one."""
    values = np.asarray(hdf5_array(file, name), np.float64)
    if values.size != math.prod(shape):
        raise InputError(f"{name} has shape {values.shape}, not {shape}")
    return values.reshape(shape)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # inf is refused later
        return values.astype(np.float32, copy=False)
