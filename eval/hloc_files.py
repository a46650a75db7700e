"""The HDF5 files of hloc: features of images, and matches of pairs.

features.h5: a group for each image, by its name: keypoints (N, 2), (0, 0) is the centre of the top-left pixel of the
image as stored; scores (N,); descriptors (D, N); image_size (w, h).
matches.h5: groups name0/name1, a slash in a name is "-": matches0 (N0,), -1 for none, and matching_scores0 (N0,).
"""
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from eval.match_features import match_features
from tools.cli import InputError, reason
from tools.features import Features
from tools.files import hdf5_array, hdf5_item, open_hdf5, write_hdf5
from tools.pair_list import Pair


def read_features(path, name: str) -> Features:
    """The features of one image, in float32; InputError if they are not there or not as hloc writes them."""
    with open_hdf5(path) as file:
        arrays = {key: hdf5_array(file, f"{name}/{key}", shape, kind).astype(np.float32) for key, shape, kind in (
            ("keypoints", (None, 2), "f"), ("scores", (None,), "f"), ("descriptors", (None, None), "f"),
            ("image_size", (2,), "fiu"))}
    w, h = arrays["image_size"]
    return Features(arrays["keypoints"], arrays["scores"], arrays["descriptors"].T, (int(w), int(h)))


def write_features(path, images: Iterable[tuple[str, Features]], dtype=np.float32) -> None:
    """Write a features.h5 of (name, features), atomically; dtype: hloc itself stores np.float16."""
    arrays = {}
    for name, features in images:
        for key in ("keypoints", "scores"):
            arrays[f"{name}/{key}"] = getattr(features, key).astype(dtype)
        arrays[f"{name}/descriptors"] = features.descriptors.T.astype(dtype)
        arrays[f"{name}/image_size"] = np.array(features.image_size)
    write_hdf5(path, arrays)


def _pair_name(name0: str, name1: str) -> str:
    return "/".join(name.replace("/", "-") for name in (name0, name1))


def read_matches(path, name0: str, name1: str) -> tuple[np.ndarray, np.ndarray]:
    """Matches (M, 2) int64 of a pair and their scores (M,) float32, also if the file has name1/name0."""
    with open_hdf5(path) as file:
        is_swapped = hdf5_item(file, _pair_name(name0, name1)) is None
        group = _pair_name(name1, name0) if is_swapped else _pair_name(name0, name1)
        if hdf5_item(file, group) is None:
            raise InputError(f"{path} has no matches of {name0} and {name1}")
        matches0 = hdf5_array(file, f"{group}/matches0", (None,), "i")
        scores0 = hdf5_array(file, f"{group}/matching_scores0", matches0.shape, "f").astype(np.float32)
    rows = np.flatnonzero(matches0 >= 0)
    matches = np.stack([rows, matches0[rows]], axis=1)
    return matches[:, ::-1] if is_swapped else matches, scores0[rows]


def write_matches(path, pairs: Iterable[tuple[str, str, int, np.ndarray, np.ndarray]]) -> None:
    """Write a matches.h5, atomically, of (name0, name1, N0, matches (M, 2), scores (M,)).

    A pair that is given again, also the other way round, is left out.
    """
    arrays = {}
    for name0, name1, n0, matches, scores in pairs:
        group = _pair_name(name0, name1)
        if f"{group}/matches0" in arrays or f"{_pair_name(name1, name0)}/matches0" in arrays:
            continue
        matches0, scores0 = np.full(n0, -1, np.int32), np.zeros(n0, np.float16)
        matches0[matches[:, 0]], scores0[matches[:, 0]] = matches[:, 1], scores
        arrays |= {f"{group}/matches0": matches0, f"{group}/matching_scores0": scores0}
    write_hdf5(path, arrays)


def match_pairs(features, pairs: list[Pair], path, verified: bool = False, **options) -> list[tuple[str, str]]:
    """Match pairs of images of a features.h5 into a matches.h5, iteratively where both have cameras.

    pairs: as `tools.pair_list.read_pair_list` reads them; a list of hloc, `name0 name1` on each line, is one of these.
    verified: the inliers of the pose alone, where there is one. options: of `eval.match_features.match_features`.
    Returns what was skipped, (pair, reason).
    """
    skipped = []

    def found():
        for pair in tqdm(pairs, "pairs matched", disable=None):
            try:
                if pair.rot0 or pair.rot1:
                    raise InputError("features are of images as stored: rot0 and rot1 must be 0")
                view0, view1 = read_features(features, pair.image0), read_features(features, pair.image1)
                result = match_features(view0.keypoints, view0.descriptors, view0.scores, view0.image_size,
                                        view1.keypoints, view1.descriptors, view1.scores, view1.image_size,
                                        pair.K0, pair.K1, **options)
            except Exception as error:
                skipped.append((f"{pair.image0} {pair.image1}", reason(error)))
                continue
            chosen = result.pose[2] if verified and result.pose else slice(None)
            yield pair.image0, pair.image1, len(view0.keypoints), result.matches[chosen], result.scores[chosen]

    write_matches(path, found())
    return skipped
