"""The keypoint records of a training dump: the one place that writes them, from images or from another dump."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dump.features import check_name, weights_of
from tools.cli import InputError
from tools.correspondences import INLIER_TH, depth_at
from tools.features import FEATURE_TYPES, Features
from tools.files import below, header_size, read_depth, read_image
from tools.manifest import FORMAT, VERSION
from tools.records import KEYPOINT_FIELDS, write_record


class Recipe:
    """Everything that a record depends on besides the data; `manifest` is what the dump keeps of it.

    settings: of the extractor, where they differ from the published ones; InputError for one that it does not have.
    """

    def __init__(self, feature_type: str, min_keypoints: int = 1024, descriptor_dtype: str = "float16",
                 device: str = "auto", **settings):
        defaults = FEATURE_TYPES[feature_type].dump_settings
        for name in sorted(set(settings) - set(defaults)):
            raise InputError(f"--{name} is not a setting of {feature_type}: it has {', '.join(defaults)}")
        self.feature_type, self.min_keypoints, self.descriptor_dtype = feature_type, min_keypoints, descriptor_dtype
        self.extraction = feature_type, {**defaults, **settings}, device  # arguments of dump.features.extractor

    def manifest(self) -> dict:
        return {"format": FORMAT, "version": VERSION, "feature_type": self.feature_type,
                "settings": {**self.extraction[1], **weights_of(self.extraction), "min_keypoints": self.min_keypoints,
                             "descriptor_dtype": self.descriptor_dtype, "inlier_th": INLIER_TH}}


@dataclass(frozen=True)
class ImageTask:
    """One image to extract features from."""

    base_path: str
    image_path: str  # relative to base_path, as is depth_path
    depth_path: str
    intrinsics: np.ndarray
    pose: np.ndarray
    record_path: Path
    recipe: Recipe

    def image_size(self):
        return header_size(Path(self.base_path, self.image_path))

    def load(self) -> tuple:
        """(image, depth (H, W) float32); InputError if they cannot be used."""
        check_name(self.record_path)
        image = read_image(below(self.base_path, self.image_path), FEATURE_TYPES[self.recipe.feature_type].color)
        depth = read_depth(below(self.base_path, self.depth_path))
        if depth.shape != image.shape[:2]:
            raise InputError(f"depth map {self.depth_path} is {depth.shape[1]}x{depth.shape[0]}, "
                             f"the image {image.shape[1]}x{image.shape[0]}")
        return image, depth

    def finish(self, loaded: tuple, features: Features) -> bool:
        """Write the keypoint record of (image, depth); False if there are too few keypoints."""
        if len(features.keypoints) < self.recipe.min_keypoints:
            return False
        write_keypoints(self.record_path, self.recipe.descriptor_dtype, {
            "image_path": self.image_path, "depth_path": self.depth_path, "image_size": features.image_size,
            "intrinsics": self.intrinsics, "pose": self.pose, "keypoints": features.keypoints,
            "scores": features.scores, "descriptors": features.descriptors,
            "depth": depth_at(loaded[1], features.keypoints)})
        return True


@np.errstate(over="ignore")  # what half precision cannot hold is not finite, which is refused
def write_keypoints(path, descriptor_dtype: str, values: dict) -> None:
    """Write the keypoint record of an image; values: the fields of KEYPOINT_FIELDS, those of numbers finite."""
    types = {"image_size": np.int32, "keypoints": np.float32, "scores": np.float32, "depth": np.float32,
             "descriptors": descriptor_dtype}
    record = {name: np.asarray(values[name], types.get(name)) for name in KEYPOINT_FIELDS}
    for name, array in record.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"its {name} are not finite")
    write_record(path, record)
