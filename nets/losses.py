"""The objective of training: true matches, the losses of an iteration, and their total.

To add a term: compute it in `judge`, and add it to `loss` there.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from nets.assignment import mutual_matches
from nets.eight_point import MIN_GAP, eight_point_with_gap

_EPS = 1e-8
POSE_CLAMP = 0.1  # of squared distances in units of the focal length; OANet's
POSE_FORMS = {"normalised": (0.0, True), "plain": (0.2, False)}  # score that a match is above, Hartley's normalisation


class Targets(NamedTuple):
    """True matches as indices: for a keypoint of one view its match in the other, N for the dustbin, -1 unlabelled."""

    matches0: Tensor  # (B, N0) int64, N1 = dustbin
    matches1: Tensor  # (B, N1) int64, N0 = dustbin


def targets_of(data: dict) -> Targets | None:
    """The true matches of a batch: target0 (B, N0) and target1 (B, N1), or matching_mask (B, N0+1, N1+1), with at most
    a single 1 in each row and column but the last; None if it has neither."""
    if "target0" in data:
        return Targets(data["target0"], data["target1"])
    if "matching_mask" not in data:
        return None
    value0, matches0 = data["matching_mask"][:, :-1].max(dim=2)
    value1, matches1 = data["matching_mask"][:, :, :-1].max(dim=1)
    return Targets(matches0.masked_fill(value0 <= 0, -1), matches1.masked_fill(value1 <= 0, -1))


def restrict(targets: Targets, keep0: Tensor | None, keep1: Tensor | None) -> Targets:
    """Targets among the kept keypoints: the others become unlabelled, and their matches go to the dustbin.

    keep0 (B, N0), keep1 (B, N1), bool or None.
    """
    matches = []
    for own, keep, keep_other in ((targets.matches0, keep0, keep1), (targets.matches1, keep1, keep0)):
        if keep_other is not None:
            n_other = keep_other.shape[1]
            alive = torch.cat([keep_other, keep_other.new_ones(len(own), 1)], dim=1).gather(1, own.clamp(min=0))
            own = torch.where(alive, own, n_other)
        if keep is not None:
            own = own.masked_fill(~keep, -1)
        matches.append(own)
    return Targets(*matches)


def _mean_per_sample(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values (B, N) over where (B, N) in each sample (0 if none), and which samples have any. (B,), (B,)."""
    count = where.sum(dim=1)
    return torch.where(where, values, 0).sum(dim=1) / count.clamp(min=1), count > 0


def matching_loss(assignment: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the true assignment: (of the true matches, of the dustbins), scalars.

    assignment (B, N0+1, N1+1). The loss is the sum of the two.
    """
    n0, n1 = assignment.shape[1] - 1, assignment.shape[2] - 1
    true = (targets.matches0 >= 0) & (targets.matches0 < n1)
    p_true = assignment[:, :-1].gather(2, targets.matches0.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    corr = _mean_per_sample(-torch.log(p_true + _EPS), true)[0].mean()
    sides = []
    for p, dustbin in ((assignment[:, :-1, -1], targets.matches0 == n1),
                       (assignment[:, -1, :-1], targets.matches1 == n0)):
        loss, any_dustbin = _mean_per_sample(-torch.log(p + _EPS), dustbin)
        sides.append(loss.sum() / any_dustbin.sum().clamp(min=1))
    return corr, (sides[0] + sides[1]) / 2


def epipolar_distance(x0: Tensor, x1: Tensor, E: Tensor) -> Tensor:
    """Symmetric squared epipolar distance (B, N) of x0, x1 (B, N, 2), in their units, to E (B, 3, 3).

    (x1^T E x0)^2 (1 / |E x0|_12^2 + 1 / |E^T x1|_12^2): the sum of the squared distances of each point to the
    epipolar line of the other.
    """
    ones = torch.ones_like(x0[..., :1])
    x0, x1 = torch.cat([x0, ones], dim=-1), torch.cat([x1, ones], dim=-1)
    lines1, lines0 = x0 @ E.transpose(1, 2), x1 @ E
    weights = sum(1 / (lines[..., :2].square().sum(dim=-1) + _EPS) for lines in (lines0, lines1))
    return (x1 * lines1).sum(dim=-1).square() * weights


def _drop_bad_gradients(grad: Tensor) -> Tensor:
    """Gradient (B, N) with 0 throughout the samples in which any of it is not finite."""
    return torch.where(torch.isfinite(grad).all(dim=1, keepdim=True), grad, 0)


def pose_consistency_loss(assignment: Tensor, targets: Targets, x0: Tensor, x1: Tensor, has_pose: Tensor,
                          clamp: float = POSE_CLAMP, form: str = "normalised") -> tuple[Tensor, Tensor]:
    """How far true matches lie from the epipolar geometry of the predicted ones: loss and samples used, scalars.

    assignment (B, N0+1, N1+1); targets: true matches; x0 (B, N0, 2), x1 (B, N1, 2): keypoints in normalised camera
    coordinates; has_pose (B,): 0 where they have none.

    E_hat is the weighted eight-point solution of the mutual argmax of the assignment, each match weighing its score;
    the loss of a sample is the mean over its true matches of the `epipolar_distance` to E_hat, at most clamp each. The
    predicted matches are what a pose is computed from when the network is used, and gradients then lower the scores
    of the wrong ones. The true matches' entries would all agree with the pose, and hardly give a gradient. No score
    threshold: the weight does its work, and what lies below would get no gradient. That is the form "normalised"; the
    form "plain", an earlier one of the paper's authors, takes matches above 0.2 alone, and no Hartley normalisation.

    A sample without pose or true matches, with fewer than 8 predicted matches, with an E_hat that these do not
    determine, or with values that are not finite, counts as 0 and is not among those used. The loss is a mean over
    the whole batch, as that does not depend on how a batch is dealt out over processes.
    """
    n1 = assignment.shape[2] - 1
    with torch.autocast(assignment.device.type, enabled=False):
        threshold, normalize = POSE_FORMS[form]
        matches0 = mutual_matches(assignment, threshold)[0]
        predicted = matches0 >= 0
        partners = matches0.clamp(min=0).unsqueeze(-1)
        scores = assignment[:, :-1, :-1].gather(2, partners).squeeze(-1)
        true = (targets.matches0 >= 0) & (targets.matches0 < n1)
        finite = torch.isfinite(scores).all(dim=1)
        for x in (x0, x1):
            finite = finite & torch.isfinite(x).flatten(1).all(dim=1)
        used = (has_pose > 0) & finite & (predicted.sum(dim=1) >= 8) & true.any(dim=1)

        x0, x1 = (torch.where(used.view(-1, 1, 1), x, 0) for x in (x0, x1))
        w = torch.where(predicted & used.unsqueeze(-1), scores, 0)
        if w.requires_grad:
            w.register_hook(_drop_bad_gradients)
        E, gap = eight_point_with_gap(x0, x1.gather(1, partners.expand(-1, -1, 2)), w, normalize)
        true1 = targets.matches0.clamp(0, n1 - 1).unsqueeze(-1).expand(-1, -1, 2)
        distance = epipolar_distance(x0, x1.gather(1, true1), E).clamp(max=clamp)
        losses = _mean_per_sample(distance, true)[0]
        used = used & (gap > MIN_GAP) & torch.isfinite(losses)
        return torch.where(used, losses, 0).mean(), used.sum()


def match_counts(assignment: Tensor, targets: Targets, threshold: float) -> dict[str, Tensor]:
    """What matches with a score above the threshold get right, as counts per sample, scalars.

    acc_corr: true matches found, of total_acc_corr; acc_incorr: unmatched keypoints of view 0 left unmatched, of
    total_acc_incorr; total_matches: matches of labelled keypoints. The names are the published trainer's.
    """
    matches0 = mutual_matches(assignment, threshold)[0]
    n1 = assignment.shape[2] - 1
    is_match = (targets.matches0 >= 0) & (targets.matches0 < n1)
    is_dustbin = targets.matches0 == n1
    counts = {"acc_corr": is_match & (matches0 == targets.matches0), "acc_incorr": is_dustbin & (matches0 < 0),
              "total_acc_corr": is_match, "total_acc_incorr": is_dustbin,
              "total_matches": (is_match | is_dustbin) & (matches0 >= 0)}
    return {name: count.sum() / len(matches0) for name, count in counts.items()}


def judge(state, targets: Targets, data: dict, pose_weight: float = 0.0, pose_clamp: float = POSE_CLAMP,
          pose_form: str = "normalised") -> dict[str, Tensor]:
    """One iteration (`nets.matchers.MatchingState`) against the true matches: scalars by name.

    loss, and its terms matching_loss_corr and matching_loss_incorr, where keypoints that pooling dropped do not count;
    and `match_counts` of all keypoints, of which those are unmatched. With pose_weight > 0 also pose_loss, which takes
    camera_keypoints0/1 and has_pose of `data`, and pose_samples, how many samples it could use; pose_clamp, pose_form:
    as for `pose_consistency_loss`.
    """
    kept = restrict(targets, state.keep0, state.keep1)
    corr, incorr = matching_loss(state.assignment, kept)
    judged = {"loss": corr + incorr, "matching_loss_corr": corr, "matching_loss_incorr": incorr}
    if pose_weight > 0:
        pose, used = pose_consistency_loss(state.assignment, kept, data["camera_keypoints0"], data["camera_keypoints1"],
                                           data["has_pose"], pose_clamp, pose_form)
        judged |= {"loss": judged["loss"] + pose_weight * pose, "pose_loss": pose, "pose_samples": used.float()}
    return judged | match_counts(state.assignment, targets, state.matcher.match_threshold)


def total(judged: list[dict[str, Tensor]]) -> dict:
    """Means over the iterations of all that `judge` says, and per_iteration: the same names but loss, (L,) each."""
    each = {name: torch.stack([iteration[name] for iteration in judged]) for name in judged[0]}
    return {**{name: values.mean() for name, values in each.items()},
            "per_iteration": {name: values.detach() for name, values in each.items() if name != "loss"}}
