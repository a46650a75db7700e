"""What is done with a pair: match it one-shot, or iteratively with its pose."""
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from eval.iterative import IterationStep, match_iteratively
from eval.pair_sets import EvalPair


@dataclass
class Outcome:
    """What a method made of a pair.

    all_matches (M, 2) and all_scores (M,): whatever it matched; used (M,) bool: those it stands by; pose: R, t and
    inliers (U,) among the used, or None; seconds: of matching and of pose. n_iterations: that a network ran.
    stopped_early and steps: of the loop, see `eval.iterative.IterativeMatch`.
    """

    all_matches: np.ndarray
    all_scores: np.ndarray
    used: np.ndarray
    pose: tuple | None
    seconds: dict
    n_iterations: int | None = None
    stopped_early: bool | None = None
    steps: list[IterationStep] = field(default_factory=list)


def to_data(pair: EvalPair, device="cpu") -> dict[str, torch.Tensor]:
    """A pair as a batch of one, for a matcher: descriptors, scores, keypoints and image_size of both views."""
    data = {}
    for view, features in (("0", pair.features0), ("1", pair.features1)):
        for name in ("descriptors", "scores", "keypoints", "image_size"):
            values = np.asarray(getattr(features, name), np.float32)
            data[name + view] = torch.from_numpy(values)[None].to(device)
    return data


def match_one_shot(matcher, data: dict, estimate) -> Outcome:
    """Match once, keep what scores above the matcher's threshold, and estimate one pose.

    estimate: matches (M, 2) -> R, t, inliers or None.
    """
    start = time.perf_counter()
    if data["keypoints0"].shape[1] and data["keypoints1"].shape[1]:
        out = matcher(data)
        matches0, scores0 = out["matches0"].cpu().numpy(), out["matching_scores0"].cpu().numpy()
    else:  # a view without keypoints
        matches0, scores0 = np.full(data["keypoints0"].shape[1], -1), np.zeros(data["keypoints0"].shape[1], np.float32)
    matched = np.flatnonzero(matches0 >= 0)
    all_matches, all_scores = np.stack([matched, matches0[matched]], axis=1), scores0[matched]
    used = all_scores > getattr(matcher, "threshold", 0.0)
    after_matching = time.perf_counter()
    pose = estimate(all_matches[used])
    seconds = {"matching": after_matching - start, "pose": time.perf_counter() - after_matching}
    return Outcome(all_matches, all_scores, used, pose, seconds, getattr(matcher, "n_iterations", None))


@dataclass
class Method:
    """A matcher (see `eval.matchers`) and how it is used.

    iterative: with the pose, for matchers that are an `eval.matchers.Network`. use_uncertainty: see
    `eval.iterative.match_iteratively`; it matters to EIMP alone. published: see there, too.
    """

    matcher: object
    iterative: bool = False
    use_uncertainty: bool = False
    published: bool = False

    def run(self, data: dict, estimates: list) -> list[Outcome]:
        """One pair (see `to_data`) with each of several estimators of its pose.

        An estimator: matches (M, 2), scores (M,) or None -> R, t, inliers or None; see `match_iteratively`.
        """
        if self.iterative:
            return [self._in_turns(data, estimate) for estimate in estimates]
        matched = match_one_shot(self.matcher, data, lambda matches: None)
        outcomes = []
        for estimate in estimates:
            start = time.perf_counter()
            pose = estimate(matched.all_matches[matched.used])
            seconds = {"matching": matched.seconds["matching"], "pose": time.perf_counter() - start}
            outcomes.append(Outcome(matched.all_matches, matched.all_scores, matched.used, pose, seconds,
                                    matched.n_iterations))
        return outcomes

    def _in_turns(self, data: dict, estimate) -> Outcome:
        matcher = self.matcher
        found = match_iteratively(matcher.network, data, estimate, self.use_uncertainty, matcher.threshold,
                                  matcher.n_iterations, self.published)
        return Outcome(found.matches, found.scores, np.ones(len(found.matches), bool), found.pose, found.seconds,
                       found.n_iterations, found.stopped_early, found.steps)
