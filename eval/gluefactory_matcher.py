"""Our networks as a matcher of glue-factory: `matcher: {name: eval.gluefactory_matcher}` in its configurations."""
from typing import ClassVar

import torch
from gluefactory.models.base_model import BaseModel

from tools.checkpoint import default_weights, load_matcher
from tools.features import FEATURE_TYPES


class Matcher(BaseModel):
    """One-shot matching of a batch.

    In: keypoints0/1 (B, N, 2), (0.5, 0.5) is the centre of the top-left pixel; descriptors0/1 (B, N, D) of unit length;
    keypoint_scores0/1 (B, N), 0 if they are not there; image_size (B, 2) of view0 and view1, (w, h).
    Out: matches0/1 (B, N) int64, -1 for none, and matching_scores0/1 (B, N).
    """

    default_conf: ClassVar = {"matching_method": "IMP", "feature_type": "sift", "weights": None, "match_threshold": 0.2,
                    "trainable": False}
    required_data_keys: ClassVar = ["keypoints0", "keypoints1", "descriptors0", "descriptors1", "view0", "view1"]

    def _init(self, conf):
        path = conf.weights or default_weights(conf.matching_method, conf.feature_type)
        network = conf.matching_method.lower().removesuffix("_geo")
        self.network = load_matcher(path, network, FEATURE_TYPES[conf.feature_type].dim,
                                    match_threshold=conf.match_threshold)

    def _forward(self, data):
        views = {}
        for v in "01":
            keypoints = data[f"keypoints{v}"]
            scores = data.get(f"keypoint_scores{v}")
            views |= {f"keypoints{v}": keypoints - 0.5, f"descriptors{v}": data[f"descriptors{v}"],
                      f"scores{v}": torch.zeros_like(keypoints[..., 0]) if scores is None else scores,
                      f"image_size{v}": data[f"view{v}"]["image_size"]}
        return self.network(views)

    def loss(self, pred, data):
        raise NotImplementedError("train with train.py of imp-matching: docs/training.md")


def __getattr__(name: str):
    if name == "__main_model__":  # not a variable: glue-factory also takes the only class among a module's variables
        return Matcher
    raise AttributeError(name)
