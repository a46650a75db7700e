import pytest
import torch
from two_views import see_points

from nets.eight_point import MIN_GAP, eight_point_with_gap, weighted_eight_point


def uniform(*shape, seed=1, least=0.0):
    generator = torch.Generator().manual_seed(seed)
    return least + (1 - least) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def apart(E, expected) -> float:
    """Largest difference of two batches of matrices, up to the sign of each."""
    signs = (E * expected).sum(dim=(1, 2), keepdim=True).sign()
    return (signs * E - expected).abs().max().item()


@pytest.mark.parametrize("n", [8, 60])
def test_noise_free_matches_give_the_exact_matrix(n):
    x0, x1, expected = see_points(16, n)
    E = weighted_eight_point(x0, x1, uniform(16, n, least=0.1))
    assert apart(E, expected) < 1e-6
    torch.testing.assert_close(torch.linalg.matrix_norm(E), torch.ones(16, dtype=torch.float64))


def test_it_minimises_the_weighted_squares_in_hartleys_coordinates():
    """Against one sample at a time, by the singular vectors of the weighted rows."""
    x0, x1, _ = see_points(4, 30)
    x1 = x1 + 0.02 * (uniform(4, 30, 2) - 0.5)
    w = uniform(4, 30, seed=2, least=0.1)
    E = weighted_eight_point(x0, x1, w)
    for i in range(4):
        sides = []
        for x in (x0[i], x1[i]):
            centre = (w[i, :, None] * x).sum(dim=0) / w[i].sum()
            rms = ((w[i] * (x - centre).square().sum(dim=1)).sum() / w[i].sum()).sqrt()
            T = torch.diag(torch.stack([2 ** 0.5 / rms, 2 ** 0.5 / rms, torch.ones_like(rms)]))
            T[:2, 2] = -centre * 2 ** 0.5 / rms
            sides.append((torch.cat([x, torch.ones_like(x[:, :1])], dim=1) @ T.T, T))
        (p0, T0), (p1, T1) = sides
        rows = w[i].sqrt()[:, None] * torch.stack([torch.outer(b, a).flatten() for a, b in zip(p0, p1)])
        expected = T1.T @ torch.linalg.svd(rows).Vh[-1].view(3, 3) @ T0
        assert apart(E[i:i + 1], (expected / expected.norm())[None]) < 1e-9


def test_matches_of_weight_zero_do_not_matter():
    x0, x1, expected = see_points(4, 40)
    x1[:, 20:] = 3 * uniform(4, 20, 2)
    w = uniform(4, 40, least=0.1)
    assert apart(weighted_eight_point(x0, x1, w), expected) > 1e-2
    w[:, 20:] = 0
    assert apart(weighted_eight_point(x0, x1, w), expected) < 1e-6


def test_a_whole_weight_is_a_match_repeated():
    x0, x1, _ = see_points(1, 20)
    x1 = x1 + 0.02 * (uniform(1, 20, 2) - 0.5)
    times = torch.arange(20) % 4
    repeated = [x.repeat_interleave(times, dim=1) for x in (x0, x1)]
    n = repeated[0].shape[1]
    E = weighted_eight_point(*repeated, torch.ones(1, n, dtype=torch.float64))
    assert apart(weighted_eight_point(x0, x1, times[None].double()), E) < 1e-9
    assert apart(weighted_eight_point(x0, x1, 7 * times[None].double()), E) < 1e-9


def test_gradients():
    x0, x1, _ = see_points(2, 20)
    x1 = x1 + 0.02 * (uniform(2, 20, 2) - 0.5)
    inputs = [x.requires_grad_() for x in (x0, x1, uniform(2, 20, seed=2, least=0.2))]

    def without_sign(x0, x1, w):
        E = weighted_eight_point(x0, x1, w).flatten(1)
        return E.unsqueeze(1) * E.unsqueeze(2)

    assert torch.autograd.gradcheck(without_sign, inputs, atol=1e-6, rtol=1e-5)


def degenerate(case):
    """x0, x1, w (2, 20, ...) that do not determine E, float64."""
    x0, x1, _ = see_points(2, 20, depth=(4, 4) if case == "plane" else (2, 6),
                           baseline=0 if case == "pure rotation" else 0.5)
    w = uniform(2, 20, least=0.1)
    if case == "seven matches":
        w[:, 7:] = 0
    elif case == "no matches":
        w[:] = 0
    elif case == "identical points":
        x0[:], x1[:] = x0[:, :1], x1[:, :1]
    elif case == "one line":
        x0[..., 1] = x0[..., 0]
    return x0, x1, w


CASES = ["plane", "pure rotation", "seven matches", "no matches", "identical points", "one line"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_degenerate_matches_give_finite_values_and_gradients(case, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in degenerate(case)]
    E, gap = eight_point_with_gap(*inputs)
    assert E.dtype == dtype
    assert torch.isfinite(E).all()
    assert (gap < MIN_GAP).all()
    E.square().mul(torch.arange(9).view(3, 3)).sum().backward()
    for x in inputs:
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() < 1e6


def test_eigenvectors_that_do_not_converge_are_found_on_the_cpu(monkeypatch):
    x0, x1, expected = see_points(4, 30)
    eigh, devices = torch.linalg.eigh, []

    def fails_at_first(a):
        devices.append(a.device.type)
        if len(devices) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", fails_at_first)
    assert apart(weighted_eight_point(x0, x1, uniform(4, 30, least=0.1)), expected) < 1e-6
    assert devices == ["cpu", "cpu"]


def test_what_is_not_finite_ends_nothing():
    x0, x1, _ = see_points(2, 30)
    x0[0, 3] = float("nan")
    E = weighted_eight_point(x0, x1, uniform(2, 30, least=0.1))
    alone = weighted_eight_point(x0[1:], x1[1:], uniform(2, 30, least=0.1)[1:])
    assert apart(E[1:], alone) < 1e-9


def test_nearly_a_plane():
    for thickness in (1e-1, 1e-3, 1e-5, 1e-7, 1e-9):
        x0, x1, _ = see_points(4, 30, depth=(4, 4 + thickness))
        w = uniform(4, 30, least=0.1).requires_grad_()
        E = weighted_eight_point(x0, x1, w)
        E.square().mul(torch.arange(9).view(3, 3)).sum().backward()
        assert torch.isfinite(E).all() and torch.isfinite(w.grad).all()


def test_single_precision_and_autocast():
    x0, x1, expected = see_points(4, 40)
    w = uniform(4, 40, least=0.1)
    single = weighted_eight_point(x0.float(), x1.float(), w.float())
    assert apart(single.double(), expected) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        autocast = weighted_eight_point(x0.float(), x1.float(), w.float())
    assert autocast.dtype == torch.float32
    assert torch.equal(autocast, single)
    half = weighted_eight_point(x0.float(), x1.float(), w.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert apart(half.double(), expected) < 1e-3
