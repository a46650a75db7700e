"""Descriptors of two views -> assignment matrix with dustbins -> mutual matches."""
import torch
from torch import Tensor

_EPS = 1e-8


def _times(vector: Tensor, matrix: Tensor) -> Tensor:
    """vector (B, m), matrix (B, m, n) -> (B, n). As a row times a matrix, which is many times faster on the CPU."""
    return torch.bmm(vector.unsqueeze(1), matrix).squeeze(1)


class _Sinkhorn(torch.autograd.Function):
    """Row and column scaling of a positive matrix, with the exact gradient of the unrolled steps.

    The backward pass keeps the scaling vectors of each step instead of a graph: each step costs one
    matrix-vector product, and the gradients of all steps with respect to the matrix are one matrix product.
    """

    @staticmethod
    def forward(ctx, p: Tensor, r: Tensor, c: Tensor, iterations: int) -> Tensor:
        """p (B, m, n) positive; r (B, m), c (B, n) totals. Returns p * u v^T, (B, m, n)."""
        keep_steps = ctx.needs_input_grad[0]
        p_t = p.transpose(1, 2)
        u, v = torch.ones_like(r), torch.ones_like(c)
        eps = p.new_full((1, 1, 1), _EPS)
        row_scales, column_scales = [], [v]
        row_sums, column_sums = [], []
        for _ in range(iterations):
            row_sum = torch.baddbmm(eps, v.unsqueeze(1), p_t).squeeze(1)
            u = r / row_sum
            column_sum = torch.baddbmm(eps, u.unsqueeze(1), p).squeeze(1)
            v = c / column_sum
            if keep_steps:
                row_scales.append(u)
                row_sums.append(row_sum)
                column_scales.append(v)
                column_sums.append(column_sum)
        if keep_steps:
            ctx.steps = [torch.stack(vectors) for vectors in (row_scales, row_sums, column_scales, column_sums)]
            ctx.save_for_backward(p)
        return (p * u.unsqueeze(-1)).mul_(v.unsqueeze(-2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (p,) = ctx.saved_tensors
        u, a, v, b = ctx.steps  # u, a: steps 1..k; v: steps 0..k; b: steps 1..k
        p_t = p.transpose(1, 2)
        grad_p = grad * u[-1].unsqueeze(-1) * v[-1].unsqueeze(-2)
        weighted = grad * p
        grad_u = _times(v[-1], weighted.transpose(1, 2))
        grad_v = _times(u[-1], weighted)
        # du/da = -u/a and dv/db = -v/b of all steps at once: a GPU would launch a kernel for each
        du, dv = -u / a, -v[1:] / b
        grads_a, grads_b = [], []
        for k in reversed(range(len(u))):
            grads_b.append(grad_v * dv[k])
            grad_u = _times(grads_b[-1], p_t) if grads_a else grad_u + _times(grads_b[-1], p_t)
            grads_a.append(grad_u * du[k])
            if k:
                grad_v = _times(grads_a[-1], p)
        grads_a, grads_b = torch.stack(grads_a[::-1]), torch.stack(grads_b[::-1])
        left = torch.cat([u, grads_a]).permute(1, 2, 0)  # grad of p from each step: outer products of rows and columns
        right = torch.cat([grads_b, v[:-1]]).transpose(0, 1)
        grad_p.baddbmm_(left, right)
        return grad_p, None, None, None


def sinkhorn(p: Tensor, r: Tensor, c: Tensor, iterations: int) -> Tensor:
    """`iterations` times u = r / (p v + eps), v = c / (p^T u + eps), from ones; returns p * u v^T.

    p (B, m, n) non-negative; r (B, m); c (B, n).
    """
    return _Sinkhorn.apply(p, r, c, iterations)


def assign(x0: Tensor, x1: Tensor, bin_score: Tensor, with_sinkhorn: bool, iterations: int,
           keep0: Tensor | None = None, keep1: Tensor | None = None) -> Tensor:
    """Assignment (B, N0+1, N1+1) with dustbins of projected descriptors x0 (B, N0, D), x1 (B, N1, D); float32 or wider.

    keep0 (B, N0), keep1 (B, N1) or None: keypoints that take part; rows and columns of the others are zero, and the
    rest is what it would be without them.
    """
    with torch.autocast(x0.device.type, enabled=False):
        if x0.dtype in (torch.float16, torch.bfloat16):
            x0, x1 = x0.float(), x1.float()
        batch, n0, dim = x0.shape
        n1 = x1.shape[1]
        inner = torch.bmm(x0, x1.transpose(1, 2)) / dim ** 0.5
        bin_score = bin_score.to(inner.dtype)
        scores = torch.cat([inner, bin_score.expand(batch, n0, 1)], dim=2)
        scores = torch.cat([scores, bin_score.expand(batch, 1, n1 + 1)], dim=1)

        rows, columns = (torch.cat([scores.new_ones(batch, n) if keep is None else keep.to(scores.dtype),
                                    scores.new_ones(batch, 1)], dim=1) for n, keep in ((n0, keep0), (n1, keep1)))
        lowest = torch.finfo(scores.dtype).min
        p = (scores if keep1 is None else scores.masked_fill(columns.unsqueeze(1) == 0, lowest)).softmax(dim=2)
        if with_sinkhorn:  # a total of 0 makes a row zero
            r, c = (torch.cat([ones[:, :-1], ones.sum(dim=1, keepdim=True)], dim=1) for ones in (rows, columns))
            return sinkhorn(p, r, c, iterations)
        return p * (scores if keep0 is None else scores.masked_fill(rows.unsqueeze(2) == 0, lowest)).softmax(dim=1)


@torch.no_grad()
def mutual_matches(assignment: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignment (B, N0+1, N1+1) -> matches0 (B, N0), matches1 (B, N1), int64 index or -1, and their scores.

    A match is a mutual argmax of the inner block with score > threshold; scores are 0 where not mutual.
    """
    inner = assignment[:, :-1, :-1]
    batch, n0, n1 = inner.shape
    if n0 == 0 or n1 == 0:
        none = [torch.full((batch, n), -1, dtype=torch.int64, device=inner.device) for n in (n0, n1)]
        return *none, inner.new_zeros(batch, n0), inner.new_zeros(batch, n1)
    best0, index0 = inner.max(dim=2)
    index1 = inner.max(dim=1).indices  # the same as argmax, and faster
    mutual0 = index1.gather(1, index0) == torch.arange(n0, device=inner.device)
    mutual1 = index0.gather(1, index1) == torch.arange(n1, device=inner.device)
    scores0 = torch.where(mutual0, best0, torch.zeros_like(best0))
    scores1 = torch.where(mutual1, scores0.gather(1, index1), torch.zeros_like(best0[:, :1]))
    matches0 = torch.where(scores0 > threshold, index0, -1)
    matches1 = torch.where(scores1 > threshold, index1, -1)
    return matches0, matches1, scores0, scores1


def matches_of_input(found: tuple, indices: tuple[Tensor, Tensor], n_inputs: tuple[int, int]
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matches of the keypoints that are left -> of all n_inputs (N0, N1) of the input; -1 and score 0 for the others.

    found: as from `mutual_matches`, (B, K0), (B, K1); indices (K0,), (K1,) int64: which of the input's they are.
    """
    all_matches, all_scores = [], []
    for v, (matches, scores) in enumerate(zip(found[:2], found[2:])):
        named = torch.full_like(matches, -1)
        matched = matches >= 0
        named[matched] = indices[1 - v][matches[matched]]
        all_matches.append(matches.new_full((len(matches), n_inputs[v]), -1))
        all_matches[v][:, indices[v]] = named
        all_scores.append(scores.new_zeros(len(scores), n_inputs[v]))
        all_scores[v][:, indices[v]] = scores
    return *all_matches, *all_scores
