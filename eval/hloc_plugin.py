"""Our features and matchers in hloc, by the name `imp`: `import eval.hloc_plugin`, once, before hloc's own steps.

hloc looks for a module of that name among its own, and in it for the one class defined there.
"""
import sys
from typing import ClassVar

import numpy as np
import torch
from hloc.utils.base_model import BaseModel

from eval.iterative import match_one_shot
from eval.match_features import load_method
from tools.distributed import choose_device
from tools.features import FEATURE_TYPES, build_extractor

# of extract_features.main and match_features.main
EXTRACTOR_CONF = {"output": "feats-imp-sift", "model": {"name": "imp", "feature_type": "sift", "max_keypoints": 4096},
                  "preprocessing": {"grayscale": True, "resize_max": 1600}}
MATCHER_CONF = {"output": "matches-imp-sift", "model": {"name": "imp", "feature_type": "sift"}}


class Extractor(BaseModel):
    """image (1, C, H, W) in [0, 1], gray, or RGB for features of colour images -> keypoints (1, N, 2), scores (1, N),
    descriptors (1, D, N)."""

    __module__ = "hloc.extractors.imp"
    default_conf: ClassVar = {"feature_type": "sift", "max_keypoints": 4096, "weights": None, "device": "auto"}
    required_inputs: ClassVar = ["image"]

    def _init(self, conf):
        settings = {**FEATURE_TYPES[conf["feature_type"]].eval_settings, "max_keypoints": conf["max_keypoints"]}
        self.extractor = build_extractor(conf["feature_type"], conf["weights"], device=conf["device"], **settings)

    def _forward(self, data):
        image = (255 * data["image"][0]).round().byte().cpu().numpy()  # (C, H, W)
        image = image.transpose(1, 2, 0)[..., ::-1]
        if self.extractor.color:
            image = np.broadcast_to(image, (*image.shape[:2], 3))
        elif image.shape[2] != 1:
            raise ValueError(f"{self.extractor.name} takes gray images: set preprocessing grayscale to True")
        else:
            image = image[..., 0]
        features = self.extractor(np.ascontiguousarray(image))
        return {name: torch.from_numpy(np.ascontiguousarray(values))[None].to(data["image"].device)
                for name, values in (("keypoints", features.keypoints), ("scores", features.scores),
                                     ("descriptors", features.descriptors.T))}


class Matcher(BaseModel):
    """One-shot matching of what a features.h5 holds of two images; of image0/1, only the size is used."""

    __module__ = "hloc.matchers.imp"
    default_conf: ClassVar = {"matching_method": None, "feature_type": "sift", "weights": None, "device": "auto"}
    required_inputs: ClassVar = [name + v for v in "01" for name in ("image", "keypoints", "scores", "descriptors")]

    def _init(self, conf):
        self.device = str(choose_device(conf["device"]))
        self.matcher = load_method(conf["matching_method"], conf["feature_type"], conf["weights"], self.device)

    def _forward(self, data):
        pair = {}
        for v in "01":
            height, width = data[f"image{v}"].shape[-2:]
            pair |= {f"{name}{v}": data[f"{name}{v}"] for name in ("keypoints", "scores")}
            pair |= {f"descriptors{v}": data[f"descriptors{v}"].transpose(1, 2),
                     f"image_size{v}": torch.tensor([[width, height]])}
        found = match_one_shot(self.matcher, {name: value.float().to(self.device) for name, value in pair.items()})
        matches0 = torch.full(data["scores0"].shape, -1)
        scores0 = torch.zeros(matches0.shape)
        rows, partners = torch.from_numpy(found.matches).T
        matches0[0, rows], scores0[0, rows] = partners, torch.from_numpy(found.scores)
        return {"matches0": matches0, "matching_scores0": scores0}


sys.modules["hloc.extractors.imp"] = sys.modules["hloc.matchers.imp"] = sys.modules[__name__]
