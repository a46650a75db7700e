"""Two views of random points with exact poses, for the tests of the pose loss."""
import torch


def rotation(axis_angle: torch.Tensor) -> torch.Tensor:
    """Axis times angle in radians (B, 3) -> (B, 3, 3)."""
    return torch.linalg.matrix_exp(cross_matrix(axis_angle))


def cross_matrix(v: torch.Tensor) -> torch.Tensor:
    """v (B, 3) -> [v]_x (B, 3, 3)."""
    x, y, z = v.unbind(dim=-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)


def see_points(batch: int, n: int, seed=0, depth=(2.0, 6.0), baseline=0.5):
    """Noise-free matches x0, x1 (B, N, 2) in normalised camera coordinates and E (B, 3, 3) of unit norm; float64.

    depth: range in view 0, of one plane where its ends are equal. baseline 0: no translation; E is then that of a
    random direction, as good as any other.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5

    R = rotation(0.4 * uniform(batch, 3))
    t = uniform(batch, 3)
    t = t / t.norm(dim=-1, keepdim=True)
    x0 = 0.8 * uniform(batch, n, 2)
    z = depth[0] + (uniform(batch, n, 1) + 0.5) * (depth[1] - depth[0])
    points = torch.cat([x0, torch.ones_like(z)], dim=-1) * z
    points = points @ R.transpose(1, 2) + baseline * t.unsqueeze(1)
    E = cross_matrix(t) @ R
    return x0, points[..., :2] / points[..., 2:], E / torch.linalg.matrix_norm(E).view(-1, 1, 1)
