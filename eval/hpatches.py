"""HPatches: image pairs that a homography relates.

The folder has a sub-folder per sequence, `i_*` (other light) or `v_*` (another viewpoint): images 1 to 6, .ppm or .png,
and the text files H_1_2 ... H_1_6, homographies from image 1. Its pairs are image 1 with each other one. Images are
resized so that their shorter side has 480 pixels; keypoints, thresholds and errors are in pixels of that size.
"""
import functools
from pathlib import Path

import cv2
import numpy as np

from eval.pair_sets import CACHED_IMAGES, EvalPair
from tools.cli import InputError
from tools.features import Features
from tools.files import read_image, read_matrix

SHORTER_SIDE = 480
ACCURACY_THRESHOLDS = range(1, 11)  # pixels, of the share of matches that agree with the true homography
IMAGES = range(1, 7)
SPLITS = {"all": "", "illumination": "i_", "viewpoint": "v_"}  # the part of the set, and how its sequences start


class HPatchesPairSet:
    """The pairs of HPatches, features extracted on the fly; a sequence of which a file cannot be used is left out.

    extractor: image -> Features, see `tools.features.Extractor`.
    """

    def __init__(self, folder, extractor):
        self.path, self.extractor = Path(folder), extractor
        self.sequences = sorted(path.name for path in self.path.glob("[iv]_*") if path.is_dir())
        if not self.sequences:
            raise InputError(f"no sequences of HPatches in {folder}: expected folders i_* and v_*")
        self._load = functools.lru_cache(maxsize=CACHED_IMAGES)(self._load)

    def __len__(self) -> int:
        return len(self.sequences) * (len(IMAGES) - 1)

    def _place(self, i: int) -> tuple[str, int]:
        sequence, k = divmod(i, len(IMAGES) - 1)
        return self.sequences[sequence], k + 2

    def name(self, i: int) -> str:
        """The i-th pair's sequence, which is used as a whole or not at all."""
        return self._place(i)[0]

    def image_names(self) -> set[str]:
        """Names of the sequences, as if each was one image in a folder of that name."""
        return {f"{sequence}/1" for sequence in self.sequences}

    def __getitem__(self, i: int) -> EvalPair:
        sequence, k = self._place(i)
        views = {number: self._load(sequence, number) for number in IMAGES}
        (path0, size0, features0), (path1, size1, features1) = views[1], views[k]
        homographies = {number: read_homography(self.path / sequence / f"H_1_{number}", size0)
                        for number in IMAGES[1:]}
        H = _to_resized(size1, features1) @ homographies[k] @ np.linalg.inv(_to_resized(size0, features0))
        return EvalPair(i, (f"{sequence}/{path0.name}", f"{sequence}/{path1.name}"), (path0, path1), features0,
                        features1, H_0to1=H)

    def _load(self, sequence: str, number: int) -> tuple[Path, tuple[int, int], Features]:
        """Path, size (w, h) as stored, and features of the resized image."""
        paths = [self.path / sequence / f"{number}{suffix}" for suffix in (".ppm", ".png")]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise InputError(f"no image {paths[0]} or {paths[1].name}")
        image = read_image(path, getattr(self.extractor, "color", False))
        size = image.shape[1::-1]
        scale = SHORTER_SIDE / min(size)
        image = cv2.resize(image, [round(side * scale) for side in size], interpolation=cv2.INTER_AREA)
        return path, size, self.extractor(image)


def _to_resized(size: tuple[int, int], features: Features) -> np.ndarray:
    """(3, 3): pixels of an image of `size` -> those of the image of the features."""
    (x, y), half = np.divide(features.image_size, size), 0.5
    return np.array([[x, 0, half * x - half], [0, y, half * y - half], [0, 0, 1]])


def corners(size: tuple[int, int]) -> np.ndarray:
    """(4, 2): the outermost pixels of an image of size (w, h)."""
    w, h = size
    return np.array([[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]], np.float64)


def read_homography(path, size: tuple[int, int]) -> np.ndarray:
    """(3, 3) numbers of a text file; InputError unless they map each pixel of an image of size (w, h) somewhere."""
    H = read_matrix(path, 3)
    if not np.isfinite(H).all() or np.linalg.matrix_rank(H) < 3:
        raise InputError(f"{path} is not a homography: its numbers must be finite, and the matrix invertible")
    depth = np.c_[corners(size), np.ones(4)] @ H[2]
    if min(depth) * max(depth) <= 0:
        raise InputError(f"{path} is not a homography of an image of {size[0]}x{size[1]}: it maps pixels to infinity")
    return H


def reprojection_errors(points0: np.ndarray, points1: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Distances (N,) of H (3, 3) applied to points0 (N, 2) from points1 (N, 2), inf where it maps to infinity."""
    mapped = np.c_[points0, np.ones(len(points0))] @ H.T
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - points1, axis=1)
    return np.where(np.isfinite(errors), errors, np.inf)


def corner_error(H: np.ndarray, true: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance in pixels between where two homographies map the corners of an image of size (w, h)."""
    points = corners(size)
    mapped = np.c_[points, np.ones(4)] @ true.T
    return float(np.mean(reprojection_errors(points, mapped[:, :2] / mapped[:, 2:], H)))
