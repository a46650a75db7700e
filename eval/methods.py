"""The matchers that evaluation knows by name, and how a table's row uses one.

To add your own, register its class before `main` runs:

    from eval import eval_imp, methods

    class Mine(methods.Matcher):
        def match(self, data):
            similarity = data["descriptors0"][0] @ data["descriptors1"][0].T
            scores, matches = similarity.max(dim=1)
            return {"matches0": matches, "matching_scores0": scores}

    methods.MATCHERS["mine"] = Mine
    if __name__ == "__main__":
        eval_imp.main(["--matching_method", "NN_ratio", "mine", "--dataset", "yfcc", "--feature_type", "sift"])
"""
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from eval.iterative import PUBLISHED_SCHEDULE, PairMatches, Schedule, match_iteratively, match_one_shot
from eval.pair_sets import EvalPair
from eval.peers import LIGHTGLUE_FEATURES, LightGlue, lightglue_file
from tools.checkpoint import default_weights, load_checkpoint, load_matcher
from tools.cli import InputError
from tools.features import FEATURE_TYPES
from tools.pose import estimate_homography, estimate_pose, timed
from tools.precision import set_precision
from tools.pretrained import find_pretrained


@dataclass
class MatcherSettings:
    """What the matchers are built from. dataset: yfcc, scannet or None, names the default weights.

    weights: a checkpoint, or None for the default one; ratio: of the ratio test; match_threshold: of the networks,
    None for their own; n_layers: iterations of the network to run, None for all; prune: of LightGlue in the loop;
    precision: of the layers of networks, see `tools.precision`.
    """

    feature_type: str = "sift"
    dataset: str | None = None
    weights: str | None = None
    use_dual_softmax: bool = False
    ratio: float = 0.8
    match_threshold: float | None = None
    n_layers: int | None = None
    device: str = "cpu"
    prune: bool = True
    precision: str = "float32"


class Matcher:
    """One way to match a pair, built from the settings.

    name: in MATCHERS. feature_types: those that it takes, None for all; default_feature_type: where none is named.
    takes_weights: if so, `path` is their file, and `scenes` those that they were trained on, None if the file does not
    say. iterates: if so, it can also match iteratively: `network` is what `eval.iterative.match_iteratively` drives, of
    n_layers iterations, n_iterations of which are run, by a `schedule`. threshold: of the score, above which matches
    are used for the pose. trusted_share: of the keypoints; fewer inliers may agree
    by chance (docs/own_images.md, docs/sfm.md).
    """

    name: str
    feature_types: tuple[str, ...] | None = None
    default_feature_type = "spp"
    schedule: Schedule = PUBLISHED_SCHEDULE
    takes_weights = iterates = False
    threshold = 0.0
    trusted_share = 0.0
    path = scenes = network = n_layers = n_iterations = None

    def __init__(self, settings: MatcherSettings):
        if self.feature_types and settings.feature_type not in self.feature_types:
            raise InputError(f"{self.name} takes the features {', '.join(self.feature_types)}, not "
                             f"{settings.feature_type}: see --feature_type")

    def match(self, data: dict) -> dict:
        """One pair -> {"matches0": (N0,) int64, "matching_scores0": (N0,)}, and n_iterations where pairs differ in it.

        data: descriptors0/1 (1, N, D), scores0/1 (1, N), keypoints0/1 (1, N, 2) in pixels, image_size0/1 (1, 2) as
        (w, h), float tensors; both views have keypoints. matches0[i] is the partner of keypoint i in view 1, or -1. All
        matches with their scores, which evaluation sweeps, also those below the threshold.
        """
        raise NotImplementedError


class NearestNeighbor(Matcher):
    """Mutual nearest neighbours of unit descriptors; the score is the cosine similarity, moved into [0, 1]."""

    name = "NN"

    @torch.no_grad()
    def match(self, data: dict) -> dict:
        similarity = data["descriptors0"][0] @ data["descriptors1"][0].T
        matches = similarity.max(dim=1).indices
        rows = torch.arange(len(matches), device=matches.device)
        mutual = similarity.argmax(dim=0)[matches] == rows
        return {"matches0": torch.where(mutual, matches, -1),
                "matching_scores0": torch.where(mutual, self._scores(similarity), 0)}

    def _scores(self, similarity: torch.Tensor) -> torch.Tensor:
        return (1 + similarity.amax(dim=1)) / 2


class RatioTest(NearestNeighbor):
    """The same; the score is 1 - d1 / d2, distances to the nearest and second nearest descriptor of view 1.

    Without a second neighbour there is nothing to compare with, and the score is 0.
    """

    name = "NN_ratio"

    def __init__(self, settings: MatcherSettings):
        super().__init__(settings)
        self.threshold = 1 - settings.ratio

    def _scores(self, similarity):
        if similarity.shape[1] < 2:
            return similarity.new_zeros(len(similarity))
        distances = (2 - 2 * similarity.topk(2, dim=1).values).clamp(min=0).sqrt()
        # two equally near descriptors, also at distance 0, say nothing: the score is 0
        scores = 1 - distances[:, 0] / distances[:, 1].clamp(min=1e-12)
        return torch.where(distances[:, 0] < distances[:, 1], scores, 0)


class Network(Matcher):
    """A network of ours, with the weights named, or the method's own; InputError if they do not fit."""

    kind: str
    takes_weights = iterates = True
    threshold = 0.2

    def __init__(self, settings: MatcherSettings):
        super().__init__(settings)
        self._load(settings)
        self.n_layers = self.network.n_layers
        if settings.n_layers is not None and not 1 <= settings.n_layers <= self.n_layers:
            raise InputError(f"--n_layers {settings.n_layers}: the network of {self.path} has {self.n_layers} "
                             "iterations")
        self.n_iterations = settings.n_layers or self.n_layers
        if settings.match_threshold is not None:
            self.threshold = settings.match_threshold

    def _load(self, settings: MatcherSettings) -> None:
        self.path = settings.weights or default_weights(self.name, settings.feature_type, settings.dataset)
        # threshold 0: all mutual matches come back, for the sweep
        options = {"match_threshold": 0.0, **({"with_sinkhorn": False} if settings.use_dual_softmax else {})}
        self.network = load_matcher(self.path, self.kind, FEATURE_TYPES[settings.feature_type].dim, settings.device,
                                    **options)
        set_precision(self.network.gnn.layers, settings.precision)
        self.scenes = load_checkpoint(self.path).get("scenes")

    @torch.no_grad()
    def match(self, data: dict) -> dict:
        out = self.network(data, n_layers=self.n_iterations)
        return {"matches0": out["matches0"][0], "matching_scores0": out["matching_scores0"][0]}


class Gm(Network):
    name, kind = "GM", "gm"


class Imp(Network):
    name, kind = "IMP", "imp"


class Eimp(Network):
    name, kind = "EIMP", "eimp"


class ImpGeo(Imp):
    name = "IMP_geo"


class EimpGeo(Eimp):
    name = "EIMP_geo"


class LightGlueMatcher(Network):
    """LightGlue of kornia: all layers one-shot, or in the loop."""

    name, feature_types, default_feature_type = "LightGlue", tuple(LIGHTGLUE_FEATURES), "aliked"
    threshold = 0.1
    trusted_share = 0.06
    schedule = Schedule(first=1, every=1, same_pose=0.5)

    def _load(self, settings):
        self.path = settings.weights or find_pretrained(lightglue_file(settings.feature_type))
        self.network = LightGlue(settings.feature_type, self.path, settings.device, settings.prune,
                                 settings.precision)


class AdaptiveLightGlue(LightGlueMatcher):
    """LightGlue with its own exit and pruning of keypoints."""

    name, iterates = "LightGlue_adaptive", False

    def __init__(self, settings):
        if settings.n_layers is not None:
            raise InputError(f"--n_layers does not go with {self.name}, which chooses the number of layers itself")
        super().__init__(settings)

    def match(self, data):
        out = self.network.match_adaptively(data)
        return {"matches0": out["matches0"][0], "matching_scores0": out["matching_scores0"][0],
                "n_iterations": int(out["stop"])}


MATCHERS: dict[str, type[Matcher]] = {
    kind.name: kind for kind in (NearestNeighbor, RatioTest, Imp, Eimp, ImpGeo, EimpGeo, Gm, LightGlueMatcher,
                                 AdaptiveLightGlue)}


def default_feature_type(names: list[str]) -> str:
    """The features that matchers take where none are named; InputError if they do not agree."""
    types = {MATCHERS[name].default_feature_type: name for name in names}
    if len(types) > 1:
        raise InputError("name --feature_type: " + ", ".join(f"{name} takes {feature_type}"
                                                             for feature_type, name in types.items()) + " by default")
    return types.popitem()[0]


@dataclass(frozen=True)
class PoseSetting:
    """A robust estimator (a key of `tools.pose.ESTIMATORS`), its threshold in pixels, and the seed of its samples."""

    estimator: str = "magsac"
    threshold: float = 1.0
    seed: int = 0

    def __str__(self):
        return f"{self.estimator} at {self.threshold:g} px"


@dataclass
class PoseEstimator:
    """Matches (M, 2) of a pair -> R, t, inliers (M,), or None; scores (M,), quick: as `estimate_pose` takes them.

    A pair that a homography relates gives H, inliers; one without both cameras None. compute: `timed`, here or in
    another process. seconds: how long all poses took to compute; elapsed: the same with the wait for the process.
    """

    pair: EvalPair
    setting: PoseSetting
    compute: Callable = timed
    seconds: float = 0.0
    elapsed: float = 0.0

    def __call__(self, matches: np.ndarray, scores: np.ndarray | None = None, quick: bool = False) -> tuple | None:
        pair, keypoints = self.pair, self.pair.matched_keypoints(matches)
        setting = self.setting.threshold, self.setting.estimator, self.setting.seed
        if pair.H_0to1 is not None:
            task = estimate_homography, *keypoints, *setting
        elif pair.K0 is not None and pair.K1 is not None:
            task = estimate_pose, *keypoints, pair.K0, pair.K1, *setting, scores, quick
        else:
            return None
        start = time.perf_counter()
        pose, seconds = self.compute(*task)
        self.seconds += seconds
        self.elapsed += time.perf_counter() - start
        return pose


def to_data(pair: EvalPair, device="cpu") -> dict[str, torch.Tensor]:
    """A pair as a batch of one, for a matcher: descriptors, scores, keypoints and image_size of both views."""
    data = {}
    for view, features in (("0", pair.features0), ("1", pair.features1)):
        for name in ("descriptors", "scores", "keypoints", "image_size"):
            values = np.asarray(getattr(features, name), np.float32)
            data[name + view] = torch.from_numpy(values)[None].to(device)
    return data


@dataclass
class Method:
    """A matcher and how it is used: one-shot, or iteratively with the pose.

    use_uncertainty, published: see `match_iteratively`. shortened: that its matcher runs fewer iterations, for AUC over
    time; it is not drawn.
    """

    matcher: Matcher
    iterative: bool = False
    use_uncertainty: bool = False
    published: bool = False
    shortened: bool = False

    def with_iterations(self, n_iterations: int) -> "Method":
        """The same matcher, stopped after n_iterations."""
        matcher = copy.copy(self.matcher)
        matcher.n_iterations = n_iterations
        return replace(self, matcher=matcher, shortened=True)

    def match(self, data: dict, estimates: list[PoseEstimator]) -> Iterator[PairMatches]:
        """Yield one pair (see `to_data`) with each of several estimators; one-shot matches are found once for all."""
        start = time.perf_counter()
        once = None if self.iterative else match_one_shot(self.matcher, data)
        seconds = time.perf_counter() - start
        for estimate in estimates:
            start = time.perf_counter()
            if once is None:
                found = match_iteratively(self.matcher.network, data, estimate, self.use_uncertainty,
                                          self.matcher.threshold, self.matcher.n_iterations, self.published,
                                          self.matcher.schedule)
            else:
                found = replace(once, pose=estimate(once.matches))
            matching = seconds + time.perf_counter() - start - estimate.elapsed
            found.seconds = {"matching": matching, "pose": estimate.seconds}
            yield found
