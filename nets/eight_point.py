"""The eight-point algorithm with a weight for each match, batched and differentiable."""
import torch
from torch import Tensor

# Of eigenvalues of the normalised matrix, whose diagonal sums to about 9. In scenes with depth the gap is 1e-5 to 1e-1;
# noise of a pixel at a focal length of 800 alone makes one of 4e-6 where points lie on a plane.
MIN_GAP = 1e-6
# Without the normalisation the gaps of rendered scenes were about 300 times smaller. The matrix is made larger by so
# much, which leaves its eigenvectors as they are, so that MIN_GAP serves for both.
_PLAIN_SCALE = 300.0
_MIN_VARIANCE = 1e-8  # of points in units of the focal length: a tenth of a pixel, squared


class _SmallestEigenvector(torch.autograd.Function):
    """Unit eigenvector of the smallest eigenvalue of symmetric matrices, with a gradient that is finite everywhere.

    First-order perturbation of the eigenvector v_0 is dv_0 = sum_{k > 0} v_k (v_k^T dA v_0) / (l_0 - l_k) (Magnus,
    "On differentiating eigenvalues and eigenvectors", 1985). It is infinite where eigenvalues repeat, so that 1 / g is
    replaced by g / (g^2 + MIN_GAP^2) (Liao, Liu, Wang, Xiang, "Differentiable programming tensor networks", Phys. Rev.
    X 9, 2019): the same for g >> MIN_GAP, never above 1 / (2 MIN_GAP), and 0 along directions that are as good as v_0.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> tuple[Tensor, Tensor]:
        """a (B, n, n) symmetric -> eigenvector (B, n), its sign arbitrary, and l_1 - l_0 (B,), without gradient."""
        try:
            values, vectors = torch.linalg.eigh(a)
        except torch.linalg.LinAlgError:  # a GPU's solver may fail where the CPU's converges, and both do on NaN
            values, vectors = (x.to(a.device) for x in torch.linalg.eigh(a.cpu().nan_to_num()))
        ctx.save_for_backward(values, vectors)
        gap = values[:, 1] - values[:, 0]
        ctx.mark_non_differentiable(gap)
        return vectors[:, :, 0].clone(), gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _) -> Tensor:
        values, vectors = ctx.saved_tensors
        smallest, others = vectors[:, :, :1], vectors[:, :, 1:]
        difference = (values[:, :1] - values[:, 1:]).unsqueeze(-1)
        along = others.transpose(1, 2) @ grad.unsqueeze(-1) * difference / (difference.square() + MIN_GAP ** 2)
        grad_a = others @ along @ smallest.transpose(1, 2)
        return (grad_a + grad_a.transpose(1, 2)) / 2


def _hartley(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Homogeneous points (B, N, 3) with weighted centroid 0 and RMS distance sqrt(2), and the similarity T (B, 3, 3)
    that makes them so of x (B, N, 2); w (B, N) sums to 1, or is 0.

    RMS as in Hartley and Zisserman, "Multiple View Geometry", 2nd edition, 11.2: unlike the mean distance of the 1997
    paper it has a derivative where points coincide.
    """
    centre = (w.unsqueeze(-1) * x).sum(dim=1)
    centred = x - centre.unsqueeze(1)
    variance = (w.unsqueeze(-1) * centred.square()).sum(dim=(1, 2))
    scale = (2 / variance.clamp(min=_MIN_VARIANCE)).sqrt()
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    shift = -scale.unsqueeze(-1) * centre
    T = torch.stack([scale, zero, shift[:, 0], zero, scale, shift[:, 1], zero, zero, one], dim=-1).view(-1, 3, 3)
    points = torch.cat([centred * scale.view(-1, 1, 1), torch.ones_like(x[..., :1])], dim=-1)
    return points, T


def eight_point_with_gap(x0: Tensor, x1: Tensor, w: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """As `weighted_eight_point`, and how far (B,) the second-smallest eigenvalue lies above the smallest.

    A gap below MIN_GAP says that the matches do not determine E: fewer than 8 of them, a plane, no translation.
    normalize: False minimises in camera coordinates as they are, instead of Hartley's.
    """
    dtype = torch.promote_types(torch.promote_types(x0.dtype, w.dtype), torch.float32)
    with torch.autocast(x0.device.type, enabled=False):
        # the matrix squares what the points' rounding costs, and its small eigenvalues are what counts
        x0, x1, w = x0.double(), x1.double(), w.double()
        w = w / w.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        p0, T0 = _hartley(x0, w)
        p1, T1 = _hartley(x1, w)
        if not normalize:
            p0, p1 = (torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) for x in (x0, x1))
            T0 = T1 = torch.eye(3, dtype=x0.dtype, device=x0.device)
            w = w * _PLAIN_SCALE
        rows = (p1.unsqueeze(-1) * p0.unsqueeze(-2)).flatten(2)
        smallest, gap = _SmallestEigenvector.apply(rows.transpose(1, 2) @ (w.unsqueeze(-1) * rows))
        E = T1.mT @ smallest.view(-1, 3, 3) @ T0
        E = E / torch.linalg.matrix_norm(E).view(-1, 1, 1)
    return E.to(dtype), gap.to(dtype)


def weighted_eight_point(x0: Tensor, x1: Tensor, w: Tensor) -> Tensor:
    """E (B, 3, 3) of unit Frobenius norm that minimises sum_n w_n (x1_n^T E x0_n)^2, in Hartley's coordinates.

    x0, x1 (B, N, 2): matches in normalised camera coordinates; w (B, N) >= 0. E is defined up to its sign and is not
    made to have two equal singular values and one zero. Linear solution of Hartley, "In defense of the eight-point
    algorithm", PAMI 1997, its rows and its normalisation weighted by w; in double precision inside, whatever the
    autocast. Values and gradients with respect to x0, x1 and w are finite for any finite input, also where E is not
    determined (`eight_point_with_gap` tells).
    """
    return eight_point_with_gap(x0, x1, w)[0]
