"""Adaptive pooling: which keypoints EIMP keeps."""
import torch
from torch import Tensor


@torch.no_grad()
def keep_mask(assignment: Tensor, mass_self: Tensor, mass_cross: Tensor, threshold: float, n_min_tokens: int,
              active: Tensor | None = None) -> Tensor:
    """Keypoints of view 0 to keep, for a batch: (B, N0) bool.

    assignment (B, N0+1, N1+1) with dustbins; mass_self, mass_cross (B, N0): attention each keypoint receives from its
    own view and from the other; active (B, N0) or None: keypoints that are still there, the others are never kept.
    """
    if active is None:
        active = torch.ones_like(mass_self, dtype=torch.bool)
    matched = (assignment[:, :-1, :-1].sum(dim=2) >= threshold) & active
    keep = matched
    middle = (matched.sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    for mass in (mass_self, mass_cross):
        # the lower median of the matched ones; not nanmedian, which ONNX lacks
        median = mass.masked_fill(~matched, torch.inf).sort(dim=1).values.gather(1, middle)
        keep = keep | (mass >= median)
    keep_all = (active.sum(dim=1, keepdim=True) <= n_min_tokens) | ~matched.any(dim=1, keepdim=True)
    return (keep | keep_all) & active


def keep_indices(assignment: Tensor, mass_self: Tensor, mass_cross: Tensor, threshold: float,
                 n_min_tokens: int) -> Tensor:
    """Keypoints of one view of one pair to keep: sorted int64 indices (K,).

    assignment (N0+1, N1+1) with dustbins; mass_self, mass_cross (N0,). For view 1 pass `assignment.T`.
    """
    if mass_self.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=mass_self.device)
    return keep_mask(assignment[None], mass_self[None], mass_cross[None], threshold, n_min_tokens)[0].nonzero()[:, 0]
