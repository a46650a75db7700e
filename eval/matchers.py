"""The matchers that evaluation knows by name.

A matcher is a callable: data -> {"matches0": (N0,) int64, "matching_scores0": (N0,)}. `data` holds one pair as the
networks take it: descriptors0/1 (1, N, D), scores0/1 (1, N), keypoints0/1 (1, N, 2) in pixels, image_size0/1 (1, 2)
as (w, h), all float tensors; both views have keypoints. matches0[i] is the partner of keypoint i in view 1, or -1.
It returns all its matches with their scores, which evaluation sweeps; those that score above its attribute
`threshold` (0 where it has none) are the ones used for the pose.

To add your own, register a function that builds it from the settings, before `main` runs:

    from eval import eval_imp, matchers

    def build_mine(settings):
        def match(data):
            similarity = data["descriptors0"][0] @ data["descriptors1"][0].T
            scores, matches = similarity.max(dim=1)
            return {"matches0": matches, "matching_scores0": scores}
        return match

    matchers.MATCHERS["mine"] = build_mine
    if __name__ == "__main__":
        eval_imp.main(["--matching_method", "NN_ratio", "mine", "--dataset", "yfcc", "--feature_type", "sift"])
"""
from dataclasses import dataclass
from functools import partial

import torch

from tools.checkpoint import default_weights, load_checkpoint, load_matcher
from tools.cli import InputError
from tools.features import FEATURE_TYPES


@dataclass
class MatcherSettings:
    """What the matchers are built from. dataset: yfcc, scannet or None, names the default weights.

    weights: a checkpoint, or None for the default one; ratio: of the ratio test; match_threshold: of the networks;
    n_layers: iterations of the network to run, None for all.
    """

    feature_type: str = "sift"
    dataset: str | None = None
    weights: str | None = None
    use_dual_softmax: bool = False
    ratio: float = 0.8
    match_threshold: float = 0.2
    n_layers: int | None = None
    device: str = "cpu"


class NearestNeighbor:
    """Mutual nearest neighbours of unit descriptors; the score is the cosine similarity, moved into [0, 1].

    ratio: if given, the score is 1 - d1 / d2, distances to the nearest and second nearest descriptor of view 1, and
    the threshold 1 - ratio. Without a second neighbour there is nothing to compare with, and the score is 0.
    """

    def __init__(self, ratio: float | None = None):
        self.ratio = ratio
        self.threshold = 0.0 if ratio is None else 1 - ratio

    @torch.no_grad()
    def __call__(self, data: dict) -> dict:
        descriptors0, descriptors1 = data["descriptors0"][0], data["descriptors1"][0]
        similarity = descriptors0 @ descriptors1.T
        nearest, matches = similarity.max(dim=1)
        rows = torch.arange(len(matches), device=matches.device)
        mutual = similarity.argmax(dim=0)[matches] == rows
        scores = (1 + nearest) / 2
        if self.ratio is not None:
            scores = torch.zeros_like(nearest)
            if similarity.shape[1] > 1:
                distances = (2 - 2 * similarity.topk(2, dim=1).values).clamp(min=0).sqrt()
                # two equally near descriptors, also at distance 0, say nothing: the score is 0
                scores = 1 - distances[:, 0] / distances[:, 1].clamp(min=1e-12)
                scores = torch.where(distances[:, 0] < distances[:, 1], scores, 0)
        return {"matches0": torch.where(mutual, matches, -1), "matching_scores0": torch.where(mutual, scores, 0)}


class Network:
    """One-shot GM, IMP or EIMP: the matches of its last iteration.

    n_iterations: how many it runs (None: all it has). path: its weights; scenes: those it was trained on, if the file
    says so, else None.
    """

    def __init__(self, network, threshold: float, n_iterations: int | None = None, path=None, scenes=None):
        self.network, self.threshold, self.path, self.scenes = network, threshold, path, scenes
        self.n_iterations = n_iterations or network.n_layers

    def with_iterations(self, n_iterations: int) -> "Network":
        """The same network, stopped after n_iterations."""
        return Network(self.network, self.threshold, n_iterations, self.path, self.scenes)

    @torch.no_grad()
    def __call__(self, data: dict) -> dict:
        out = self.network(data, n_layers=self.n_iterations)
        return {"matches0": out["matches0"][0], "matching_scores0": out["matching_scores0"][0]}


def build_network(settings: MatcherSettings, method: str) -> Network:
    """Load the network of a method with the weights named, or the method's own; InputError if they do not fit."""
    path = settings.weights or default_weights(method, settings.feature_type, settings.dataset)
    # threshold 0: all mutual matches come back, for the sweep
    options = {"match_threshold": 0.0}
    if settings.use_dual_softmax:
        options["with_sinkhorn"] = False
    network = load_matcher(path, method.lower().removesuffix("_geo"), FEATURE_TYPES[settings.feature_type].dim,
                           settings.device, **options)
    if settings.n_layers is not None and not 1 <= settings.n_layers <= network.n_layers:
        raise InputError(f"--n_layers {settings.n_layers}: the network of {path} has {network.n_layers} iterations")
    scenes = load_checkpoint(path).get("scenes")
    return Network(network, settings.match_threshold, settings.n_layers, path, scenes)


NETWORKS = ("IMP", "EIMP", "IMP_geo", "EIMP_geo", "GM")

# name -> (settings) -> matcher
MATCHERS = {
    "NN": lambda settings: NearestNeighbor(),
    "NN_ratio": lambda settings: NearestNeighbor(settings.ratio),
    **{method: partial(build_network, method=method) for method in NETWORKS},
}
