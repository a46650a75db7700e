"""Local features: image -> Features. One class per feature type, all of them in FEATURE_TYPES."""
import functools
import hashlib
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import cv2
import numpy as np

from tools.cli import InputError
from tools.geometry import resize_keypoints

# Pixels of a batch on a GPU: 13 images of 640x480, 2 of 1600x1200. A pixel takes 256 bytes in each of the network's
# first layers, of which three or four are alive at a time.
BATCH_PIXELS = 4_000_000


@dataclass
class Features:
    """What an image gives to a matcher; rows in order of descending score."""

    keypoints: np.ndarray  # (N, 2) float32, pixels of the image given, OpenCV's convention
    scores: np.ndarray  # (N,) float32
    descriptors: np.ndarray  # (N, D) float32, unit length
    image_size: tuple[int, int]  # (w, h)


class Extractor:
    """An image -> Features; one class per feature type, which implements `_extract`.

    An image is (H, W) uint8, or with `color` (H, W, 3) BGR uint8. name, dim (of descriptors). dump_settings,
    eval_settings: its settings in training dumps and in evaluation, those of the paper where that has them.
    logit_scale, bin_score: of a warm start, see `training.start`.
    weights_file: of a network (`NetworkExtractor`). max_pixels: a larger image is downscaled to it first; its keypoints
    are those of the image given all the same. batch_pixels: how many to give to `extract_batch` at a time; 0, one
    image, where batches gain nothing.
    """

    name: str
    dim: int
    dump_settings: ClassVar[dict]
    eval_settings: ClassVar[dict]
    logit_scale, bin_score = 39.0, 30.0
    color = False
    weights_file = None
    max_pixels = 0
    batch_pixels = 0

    def __call__(self, image: np.ndarray) -> Features:
        return self.extract_batch([image])[0]

    def extract_batch(self, images: list[np.ndarray]) -> list[Features]:
        """Images, all of one size -> Features of each."""
        if not images:
            return []
        height, width = images[0].shape[:2]
        scale = math.sqrt(self.max_pixels / max(1, height * width))
        if scale >= 1:
            return self._extract(images)
        w, h = max(1, int(scale * width)), max(1, int(scale * height))
        found = self._extract([cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA) for image in images])
        return [replace(features, image_size=(width, height), keypoints=resize_keypoints(
            features.keypoints, width / w, height / h).astype(np.float32)) for features in found]


class Sift(Extractor):
    """OpenCV SIFT, the `max_keypoints` strongest, as RootSIFT (D = 128).

    unique_locations: one keypoint per place (the first of its dominant orientations). device: ignored, so
    that every feature type takes one.
    """

    name, dim = "sift", 128
    dump_settings: ClassVar = {"max_keypoints": 4096, "contrast_threshold": 0.04, "unique_locations": False}
    eval_settings: ClassVar = {"max_keypoints": 2000, "contrast_threshold": 1e-5, "unique_locations": False}
    max_pixels = 16_000_000  # of 260 bytes each

    def __init__(self, max_keypoints=4096, contrast_threshold=0.04, unique_locations=False, device=None):
        self.max_keypoints = max_keypoints
        self.unique_locations = unique_locations
        # about one keypoint in eight shares its place: twice as many leave max_keypoints after the repeats are gone
        self.detector = cv2.SIFT_create(nfeatures=max_keypoints * (2 if unique_locations else 1),
                                        contrastThreshold=contrast_threshold)

    def _extract(self, images):
        return [self._features(image) for image in images]

    def _features(self, image):
        found, sift = self.detector.detectAndCompute(image, None)
        image_size = (image.shape[1], image.shape[0])
        if not found:
            return Features(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, self.dim), np.float32),
                            image_size)
        keypoints = np.array([point.pt for point in found], np.float32)
        scores = np.array([point.response for point in found], np.float32)
        order = np.argsort(-scores, kind="stable")
        if self.unique_locations:
            _, first = np.unique(keypoints[order], axis=0, return_index=True)
            order = order[np.sort(first)]
        order = order[:self.max_keypoints]
        sift = sift[order]
        root = np.sqrt(sift / np.maximum(sift.sum(axis=1, keepdims=True), 1e-12))
        return Features(keypoints[order], scores[order], root, image_size)


class NetworkExtractor(Extractor):
    """A feature type whose keypoints and descriptors a network finds: `_load` builds it, `_detect` runs it.

    weights: a file of them; None is `weights_file`, wherever it is found, and InputError says so if it is missing.
    device: auto (a GPU if there is one), cpu, cuda or cuda:N.

    The same batch gives the same bits again. Another device, batch or number of threads may round otherwise, which
    also decides about keypoints at the threshold.
    """

    def __init__(self, device="auto", weights=None, **settings):
        # here, not above: workers that extract sift need no torch, and tools.checkpoint needs this module
        from tools.distributed import choose_device

        unknown = settings.keys() - self.eval_settings.keys()
        if unknown:
            raise TypeError(f"{self.name} has no setting {unknown.pop()}: it has {', '.join(self.eval_settings)}")
        self.device = choose_device(device)
        self.settings = {**self.eval_settings, **settings}
        self.network = self._load(weights)
        self.batch_pixels = BATCH_PIXELS if self.device.type == "cuda" else 0

    def _load(self, weights):
        """The network in evaluation mode on `device`."""
        raise NotImplementedError

    def _detect(self, batch) -> list[tuple]:
        """batch (B, 1 or 3, H, W) float in [0, 1], RGB -> keypoints (N, 2), scores (N,), descriptors (N, D) of each."""
        raise NotImplementedError

    @functools.cached_property
    def weights_hash(self) -> str:
        """Short SHA-256 of the weights, the same for every file that holds them."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _extract(self, images):
        import torch

        batch = np.stack(images)
        batch = batch[..., ::-1].transpose(0, 3, 1, 2) if self.color else batch[:, None]
        batch = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device).float() / 255
        # TF32 convolutions, torch's default on a GPU, would find other keypoints there than on the CPU
        with torch.inference_mode(), torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            found = self._detect(batch)
        image_size = (images[0].shape[1], images[0].shape[0])
        features = []
        for tensors in found:
            keypoints, scores, descriptors = (tensor.float().cpu().numpy() for tensor in tensors)
            order = np.argsort(-scores, kind="stable")
            features.append(Features(keypoints[order], scores[order], descriptors[order], image_size))
        return features


class Spp(NetworkExtractor):
    """SuperPoint, the `max_keypoints` strongest (D = 256). align_corners: see `nets.superpoint.sample_descriptors`."""

    name, dim, weights_file = "spp", 256, "superpoint_v1.pth"
    dump_settings: ClassVar = {"max_keypoints": 4096, "keypoint_threshold": 0.001, "nms_radius": 3,
                               "align_corners": True}
    eval_settings: ClassVar = {"max_keypoints": 2000, "keypoint_threshold": 0.0025, "nms_radius": 4,
                               "align_corners": True}
    max_pixels = 6_000_000  # of 770 bytes each

    def _load(self, weights):
        from tools.checkpoint import load_superpoint

        return load_superpoint(weights, self.device, **self.settings)

    def _detect(self, batch):
        found = self.network(batch)
        return list(zip(found["keypoints"], found["scores"], found["descriptors"]))


class KorniaExtractor(NetworkExtractor):
    """What ALIKED and DISK of kornia share: the `max_keypoints` strongest maxima of a map of a colour image."""

    dim, color = 128, True
    dump_settings: ClassVar = {"max_keypoints": 4096, "nms_radius": 2}
    eval_settings: ClassVar = {"max_keypoints": 2000, "nms_radius": 2}
    max_pixels = 2_000_000  # of 2200 bytes each


class Aliked(KorniaExtractor):
    """ALIKED, model aliked-n16 (D = 128)."""

    name, weights_file = "aliked", "aliked-n16.pth"
    logit_scale, bin_score = 22.0, 6.0

    def _load(self, weights):
        from tools.pretrained import import_kornia, load_pretrained

        aliked = import_kornia().ALIKED
        # a threshold of 0 chooses by rank
        options = {"max_num_keypoints": self.settings["max_keypoints"], "detection_threshold": 0.0,
                   "nms_radius": self.settings["nms_radius"]}
        return load_pretrained(self.weights_file, weights, self.device, lambda: aliked("aliked-n16", **options),
                               lambda: aliked.from_pretrained("aliked-n16", **options))

    def _detect(self, batch):
        return [(found.keypoints, found.keypoint_scores, found.descriptors) for found in self.network(batch)]


class Disk(KorniaExtractor):
    """DISK, trained with depth (D = 128). Scores are logits."""

    name, weights_file = "disk", "disk-depth-save.pth"

    def _load(self, weights):
        from tools.pretrained import import_kornia, load_pretrained

        disk = import_kornia().DISK
        return load_pretrained(self.weights_file, weights, self.device, disk, lambda: disk.from_pretrained("depth"),
                               # which load_checkpoint took for a wrapper's prefix
                               lambda state: {f"unet.{name}": value for name, value in state.items()})

    def _detect(self, batch):
        if max(batch.shape[2:]) <= 16:  # its lowest level would have a single pixel, which cannot be normalised
            none = batch.new_zeros(0)
            return [(none.view(0, 2), none, none.view(0, self.dim)) for _ in batch]
        found = self.network(batch, n=self.settings["max_keypoints"],
                             window_size=2 * self.settings["nms_radius"] + 1, pad_if_not_divisible=True)
        return [(features.keypoints, features.detection_scores, features.descriptors) for features in found]


# what gives better matches later
FEATURE_TYPES: dict[str, type[Extractor]] = {kind.name: kind for kind in (Sift, Spp, Aliked, Disk)}


def build_extractor(feature_type: str, weights=None, **settings) -> Extractor:
    """Name of a feature type -> its Extractor; each type takes `device` (auto, cpu, cuda or cuda:N).

    weights: a file for its network, None for the usual one; InputError if it has no network.
    """
    if feature_type not in FEATURE_TYPES:
        raise InputError(f"unknown feature type {feature_type!r}: known are {', '.join(FEATURE_TYPES)}")
    if weights is not None:
        if not FEATURE_TYPES[feature_type].weights_file:
            raise InputError(f"{feature_type} has no weights: leave out --feature_weights")
        settings["weights"] = weights
    return FEATURE_TYPES[feature_type](**settings)
