"""Training losses (SPEC 9)."""
from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-8


class Targets(NamedTuple):
    """True matches as indices: for a keypoint of one view its match in the other, N for the dustbin, -1 unlabelled."""

    matches0: Tensor  # (B, N0) int64, N1 = dustbin
    matches1: Tensor  # (B, N1) int64, N0 = dustbin


def targets_from_mask(matching_mask: Tensor) -> Targets:
    """matching_mask (B, N0+1, N1+1), at most a single 1 in each row and column but the last -> Targets."""
    value0, matches0 = matching_mask[:, :-1].max(dim=2)
    value1, matches1 = matching_mask[:, :, :-1].max(dim=1)
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


def matching_loss_from_targets(assignment: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """As `matching_loss`, for true matches given as indices."""
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


def matching_loss(assignment: Tensor, matching_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the true assignment in one iteration: (of the true matches, of the dustbins), scalars.

    assignment (B, N0+1, N1+1); matching_mask likewise: 1 at true matches and in the dustbin column or row for the
    rest. The loss is the sum of the two.
    """
    return matching_loss_from_targets(assignment, targets_from_mask(matching_mask))
