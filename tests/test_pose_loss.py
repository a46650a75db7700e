import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_views import see_points

import train
from nets import build_matcher, losses
from nets.losses import Targets, epipolar_distance, pose_consistency_loss
from tests.tiny_dump import make_consistent, make_tiny_dump
from tools.checkpoint import load_checkpoint
from training.config import load_train_config
from training.start import warm_start


def uniform(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_case(batch=2, n=30, n_wrong=6, seed=0, noise=2e-3, **scene):
    """Assignment (B, N+1, N+1), targets and keypoints: keypoint i matches i, but the first n_wrong predicted matches
    are wrong, with little score."""
    x0, x1, _ = see_points(batch, n, seed, **scene)
    x1 = x1 + noise * (uniform(batch, n, 2) - 0.5)
    predicted = torch.arange(n)
    predicted[:n_wrong] = torch.arange(n_wrong).roll(1)
    assignment = torch.full((batch, n + 1, n + 1), 1e-3, dtype=torch.float64)
    assignment[:, torch.arange(n), predicted] = torch.where(torch.arange(n) < n_wrong, 0.3, 0.8).double()
    truth = torch.arange(n).expand(batch, n)
    return assignment.requires_grad_(), Targets(truth, truth), x0, x1, torch.ones(batch)


def test_epipolar_distance_is_that_to_the_lines_of_the_other_view():
    x0, x1, E = see_points(2, 20)
    assert epipolar_distance(x0, x1, E).max() < 1e-20
    x1 = x1 + 0.1 * uniform(2, 20, 2)
    for b in range(2):
        for i in range(20):
            total = 0
            for own, other, matrix in ((x0, x1, E[b]), (x1, x0, E[b].T)):
                line = matrix @ torch.tensor([*own[b, i], 1.0], dtype=torch.float64)
                p = torch.tensor([*other[b, i], 1.0], dtype=torch.float64)
                total += (p @ line / torch.hypot(line[0], line[1])) ** 2
            assert epipolar_distance(x0, x1, E)[b, i].item() == pytest.approx(total.item(), rel=1e-5)


def make_sideways(scores=(0.5,) * 10, offsets=(0.0, 0.01, 0.1, 0.4)):
    """Matches i - i with these scores of cameras that differ by a step along x, and true matches that are not
    predicted, so much higher in view 1. A point at a height y lies on the line y of the other view: the epipolar
    distance is twice the offset squared."""
    n = len(scores) + len(offsets)
    x0 = 0.8 * uniform(1, n, 2) - 0.4
    x1 = x0 + torch.stack([-1 / (2 + 4 * uniform(1, n, seed=2)), torch.zeros(1, n)], dim=-1)
    x1[0, len(scores):, 1] += torch.tensor(offsets)
    assignment = torch.zeros(1, n + 1, n + 1, dtype=torch.float64)
    assignment[0].diagonal()[:len(scores)] = torch.tensor(scores)
    true = torch.where(torch.arange(n) < len(scores), n, torch.arange(n))[None]
    return assignment, Targets(true, true), x0, x1, torch.ones(1)


@pytest.mark.parametrize("clamp, expected", [(0.1, (0 + 2e-4 + 0.02 + 0.1) / 4), (5e-4, (0 + 2e-4 + 5e-4 + 5e-4) / 4)])
@pytest.mark.parametrize("form", losses.POSE_FORMS)
def test_values_of_both_forms(form, clamp, expected):
    loss, used = pose_consistency_loss(*make_sideways(), clamp, form)
    assert used == 1
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # wrong predicted matches, the last two, count in the plain form if their score is above 0.2
    for score, counts in ((0.19, form == "normalised"), (0.21, True)):
        assignment, targets, x0, x1, has_pose = make_sideways((0.5,) * 10 + (score,) * 2)
        x1[0, 10:12, 1] += 0.2
        loss, used = pose_consistency_loss(assignment, targets, x0, x1, has_pose, clamp, form)
        assert used == 1
        assert (loss.item() != pytest.approx(expected, rel=1e-3)) == counts
    _, used = pose_consistency_loss(*make_sideways((0.5,) * 7 + (0.19,) * 3), clamp, form)
    assert used == (form == "normalised")


@pytest.mark.parametrize("form", losses.POSE_FORMS)
def test_the_solution_of_both_forms(form):
    """Against one sample at a time, by the singular vectors of the weighted rows."""
    assignment, targets, x0, x1, has_pose = make_case(noise=0.02)
    total = 0
    for b in range(2):
        predicted = assignment[b, :-1, :-1].argmax(dim=1)
        w = assignment[b, torch.arange(30), predicted].detach()
        sides = []
        for x in (x0[b], x1[b][predicted]):
            T = torch.eye(3, dtype=torch.float64)
            if form == "normalised":
                centre = (w[:, None] * x).sum(dim=0) / w.sum()
                scale = (2 * w.sum() / (w * (x - centre).square().sum(dim=1)).sum()).sqrt()
                T = torch.tensor([[scale, 0, -scale * centre[0]], [0, scale, -scale * centre[1]], [0, 0, 1]]).double()
            sides.append((torch.cat([x, torch.ones(30, 1)], dim=1) @ T.T, T))
        (p0, T0), (p1, T1) = sides
        rows = w.sqrt()[:, None] * torch.einsum("ni,nj->nij", p1, p0).flatten(1)
        E = T1.T @ torch.linalg.svd(rows).Vh[-1].view(3, 3) @ T0
        distances = epipolar_distance(x0[b:b + 1], x1[b:b + 1], (E / E.norm())[None])
        total += distances.clamp(max=5e-4).mean() / 2
    loss, used = pose_consistency_loss(assignment, targets, x0, x1, has_pose, 5e-4, form)
    assert used == 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_right_matches_cost_nothing_and_wrong_ones_do():
    loss, used = pose_consistency_loss(*make_case(n_wrong=0, noise=0))
    assert used == 2
    assert loss < 1e-12
    loss, used = pose_consistency_loss(*make_case(n_wrong=6, noise=0))
    assert used == 2
    assert 1e-4 < loss < 0.1


def test_the_loss_falls_when_weight_moves_from_wrong_to_right_matches():
    case = make_case()
    loss, _ = pose_consistency_loss(*case)
    loss.backward()
    gradient = case[0].grad
    wrong, right = torch.zeros(30, 30, dtype=torch.bool), torch.zeros(30, 30, dtype=torch.bool)
    wrong[torch.arange(6), torch.arange(6).roll(1)] = True
    right[torch.arange(6, 30), torch.arange(6, 30)] = True
    assert (gradient[:, :-1, :-1][:, wrong].sum(dim=1) > 0).all()
    assert (gradient[:, :-1, :-1][:, right].sum(dim=1) < 0).all()
    # no other entry is the weight of a match
    assert (gradient[:, :-1, :-1][:, ~wrong & ~right] == 0).all()
    assert (gradient[:, -1] == 0).all() and (gradient[:, :, -1] == 0).all()
    moved = case[0].detach() - 0.1 * gradient.sign()
    assert pose_consistency_loss(moved, *case[1:])[0] < 0.8 * loss


def test_gradient():
    assignment, *rest = make_case(n=16, n_wrong=2)
    n = torch.arange(16)
    predicted = n.clone()
    predicted[:2] = n[:2].roll(1)
    scores = assignment.detach()[:, n, predicted].requires_grad_()

    def loss(scores):
        filled = torch.zeros_like(assignment)
        filled[:, n, predicted] = scores
        return pose_consistency_loss(filled, *rest)[0]

    assert torch.autograd.gradcheck(loss, [scores], atol=1e-8)


def test_distances_are_clamped():
    assignment, targets, x0, x1, has_pose = make_case(n_wrong=0, noise=0)
    shifted = Targets(targets.matches0.roll(7, dims=1), targets.matches1)
    loss, _ = pose_consistency_loss(assignment, shifted, 50 * x0, 50 * x1, has_pose)
    assert 0.05 < loss <= 0.1


def test_keypoints_without_target_do_not_count():
    assignment, targets, x0, x1, has_pose = make_case(batch=1, n_wrong=6)
    full = pose_consistency_loss(assignment, targets, x0, x1, has_pose)[0]
    n = 30
    halves = []
    for half in (torch.arange(n) < 15, torch.arange(n) >= 15):
        for missing in (-1, n):
            kept = Targets(torch.where(half, targets.matches0, missing), targets.matches1)
            halves.append(pose_consistency_loss(assignment, kept, x0, x1, has_pose)[0])
    assert halves[0] == halves[1] and halves[2] == halves[3]
    assert (halves[0] + halves[2]).item() / 2 == pytest.approx(full.item())


def spoil(case: str, assignment, targets, x0, x1, has_pose):
    """Make sample 0 of a batch one that gives no pose."""
    assignment = assignment.detach().clone()
    if case == "no pose":
        has_pose[0] = 0
    elif case == "seven matches":
        assignment[0, 7:] = 0
    elif case == "no true matches":
        targets = Targets(torch.where(torch.arange(2)[:, None] == 0, 30, targets.matches0), targets.matches1)
    elif case == "plane":
        x0[:1], x1[:1], _ = see_points(1, 30, depth=(3, 3))
    elif case == "pure rotation":
        x0[:1], x1[:1], _ = see_points(1, 30, baseline=0)
    elif case == "identical points":
        x0[0], x1[0] = 0.3, 0.2
    elif case == "infinite points":
        x1[0, 3] = torch.inf
    elif case == "nan scores":
        assignment[0, 9] = torch.nan
    return assignment.requires_grad_(), targets, x0, x1, has_pose


CASES = ["no pose", "seven matches", "no true matches", "plane", "pure rotation", "identical points",
         "infinite points", "nan scores"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_samples_that_give_no_pose_contribute_nothing_and_are_not_counted(case, dtype):
    n_wrong = 0 if case in ("plane", "pure rotation") else 6  # wrong matches are no part of a plane
    whole = make_case(n_wrong=n_wrong)
    expected, _ = pose_consistency_loss(whole[0][1:], Targets(*(m[1:] for m in whole[1])), *(x[1:] for x in whole[2:]))
    (gradient,) = torch.autograd.grad(expected, whole[0])
    assignment, targets, x0, x1, has_pose = spoil(case, *make_case(n_wrong=n_wrong))
    assignment = assignment.detach().to(dtype).requires_grad_()
    loss, used = pose_consistency_loss(assignment, targets, x0.to(dtype), x1.to(dtype), has_pose)
    assert used == 1
    loss.backward()
    tolerance = {"rtol": 1e-2, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, expected.to(dtype) / 2, **tolerance)
    assert (assignment.grad[0] == 0).all()
    torch.testing.assert_close(assignment.grad[1], gradient[1].to(dtype) / 2, **tolerance)


def test_nearly_degenerate_scenes_have_finite_gradients():
    for thickness, baseline in ((1e-3, 0.5), (1e-6, 0.5), (1e-9, 0.5), (4, 1e-4), (4, 1e-8)):
        for noise in (0, 1e-3):
            case = make_case(n_wrong=0, noise=noise, depth=(3, 3 + thickness), baseline=baseline)
            assignment = case[0].detach().float().requires_grad_()
            loss, _ = pose_consistency_loss(assignment, case[1], case[2].float(), case[3].float(), case[4])
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(assignment.grad).all()


def test_gradients_that_are_not_finite_are_dropped_sample_by_sample(monkeypatch):
    case = make_case()
    loss, _ = pose_consistency_loss(*case)
    (expected,) = torch.autograd.grad(loss, case[0])

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0, 12] = torch.nan
            return grad

    solve = losses.eight_point_with_gap
    monkeypatch.setattr(losses, "eight_point_with_gap", lambda x0, x1, w, *rest: solve(x0, x1, Spoilt.apply(w), *rest))
    loss, _ = pose_consistency_loss(*case)
    (gradient,) = torch.autograd.grad(loss, case[0])
    assert (gradient[0] == 0).all()
    assert torch.equal(gradient[1], expected[1])


def test_autocast():
    assignment, targets, x0, x1, has_pose = make_case()
    assignment = assignment.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = pose_consistency_loss(assignment, targets, x0.float(), x1.float(), has_pose)
    single, _ = pose_consistency_loss(assignment, targets, x0.float(), x1.float(), has_pose)
    assert half.dtype == torch.float32
    assert half == single


def make_batch(batch=3, n=24, dim=32, dtype=torch.float64):
    """Training data: the first 20 keypoints of view 0 match those of view 1, last first, 16 of them by descriptor."""
    x0, x1, _ = see_points(batch, n)
    x1 = x1.flip(1) + 0.02 * (uniform(batch, n, 2) - 0.5)
    mask = torch.zeros(batch, n + 1, n + 1, dtype=torch.uint8)
    mask[:, torch.arange(20), n - 1 - torch.arange(20)] = 1
    mask[:, 20:n, n] = 1
    mask[:, n, :n - 20] = 1
    descriptors0 = torch.nn.functional.normalize(uniform(batch, n, dim) - 0.5, dim=-1)
    descriptors1 = torch.nn.functional.normalize(uniform(batch, n, dim, seed=2) - 0.5, dim=-1)
    descriptors1[:, n - 16:] = descriptors0[:, :16].flip(1)
    data = {"descriptors0": descriptors0, "descriptors1": descriptors1, "matching_mask": mask,
            "has_pose": torch.ones(batch)}
    for v, x in zip("01", (x0, x1)):
        data.update({f"norm_keypoints{v}": x, f"camera_keypoints{v}": x, f"scores{v}": uniform(batch, n, seed=3)})
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}


def make_matcher(kind, dtype=torch.float64, n_layers=6):
    torch.manual_seed(0)
    return build_matcher(kind, descriptor_dim=32, n_layers=n_layers, n_min_tokens=6).to(dtype).train()


@pytest.mark.parametrize("kind", ["gm", "imp", "eimp"])
def test_the_loss_of_a_matcher(kind, monkeypatch):
    data, matcher = make_batch(), make_matcher(kind)
    plain, posed = matcher(data), matcher(data, pose_weight=5.0)
    assert "pose_loss" not in plain
    assert posed["pose_samples"] > 0
    assert 0 < posed["pose_loss"] < 0.1
    torch.testing.assert_close(posed["loss"], plain["loss"] + 5 * posed["pose_loss"])
    warm_start(matcher)
    # whichever keypoints pooling drops, what is left is what the loss is made of
    states = []
    advance = type(matcher).iterate

    def watch(self, *arguments):
        for state in advance(self, *arguments):
            states.append((state.assignment, state.keep0, state.keep1))
            yield state

    monkeypatch.setattr(type(matcher), "iterate", watch)
    posed = matcher(data, pose_weight=5.0)
    targets = losses.targets_of(data)
    terms = [pose_consistency_loss(p, losses.restrict(targets, keep0, keep1), data["camera_keypoints0"],
                                   data["camera_keypoints1"], data["has_pose"]) for p, keep0, keep1 in states]
    assert len(terms) == 6
    assert posed["pose_loss"].item() == pytest.approx(sum(term[0].item() for term in terms) / 6)
    assert posed["pose_samples"].item() == pytest.approx(sum(term[1].item() for term in terms) / 6)
    assert posed["pose_samples"] > 0
    if kind == "eimp":
        assert not states[-1][1].all()


def test_samples_without_pose_leave_the_loss_and_its_gradients_as_they_are():
    data, matcher = make_batch(), make_matcher("imp")
    data["has_pose"][:] = 0
    gradients = []
    for pose_weight in (0.0, 5.0):
        matcher.zero_grad()
        out = matcher(data, pose_weight=pose_weight)
        out["loss"].backward()
        gradients.append([out["loss"], *(p.grad for p in matcher.parameters())])
    assert out["pose_samples"] == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_matcher_under_autocast():
    data, matcher = make_batch(dtype=torch.float32), make_matcher("imp", torch.float32)
    single = matcher(data, pose_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = matcher(data, pose_weight=1.0)
    half["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in matcher.parameters())
    assert half["pose_loss"].item() == pytest.approx(single["pose_loss"].item(), rel=0.3)


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(s.step, s.value) for s in events.Scalars(tag)]


def test_a_training_run(tmp_path):
    make_consistent(make_tiny_dump(tmp_path / "dump"))
    config = {"layers": 4, "max_keypoints": 48, "min_inliers": 16, "max_inliers": 24, "batch_size": 4, "epochs": 1,
              "its_per_epoch": 12, "workers": 0, "gpu": [-1], "init": "warm", "base_path": str(tmp_path / "dump"),
              "with_pose": 1, "pose_weight": 10, "pose_start": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(name, *overrides):
        assert train.main(["--config", str(tmp_path / "config.json"), "--save_path", str(tmp_path / name),
                           *overrides]) == 0
        return load_checkpoint(tmp_path / name / "latest.pth")["model"]

    posed, plain, late = run("posed"), run("plain", "--with_pose", "0"), run("late", "--pose_start", "12")
    loss = scalars(tmp_path / "posed", "train/pose_loss")
    assert [step for step, _ in loss] == list(range(3, 13))
    # the warm start finds most matches, so the pose is all but right from the first
    assert all(0 < value < 0.02 for _, value in loss)
    assert all(value == 4 for _, value in scalars(tmp_path / "posed", "train/pose_samples"))
    total, corr, incorr = (dict(scalars(tmp_path / "posed", f"train/{name}"))
                           for name in ("loss", "matching_loss_corr", "matching_loss_incorr"))
    for step, value in loss:
        assert total[step] == pytest.approx(corr[step] + incorr[step] + 10 * value, rel=1e-5)
    assert all(torch.equal(plain[name], late[name]) for name in plain)
    assert not all(torch.equal(plain[name], posed[name]) for name in plain)

    run("early", "--pose_form", "plain", "--pose_clamp", "5e-4", "--pose_weight", "5000", "--pose_start", "0",
        "--epochs", "1", "--its_per_epoch", "2")
    loss, total, corr, incorr = (dict(scalars(tmp_path / "early", f"train/{name}")) for name in
                                 ("pose_loss", "loss", "matching_loss_corr", "matching_loss_incorr"))
    assert list(loss) == [1, 2]
    for step, value in loss.items():
        assert 0 < value <= 5e-4
        assert total[step] == pytest.approx(corr[step] + incorr[step] + 5000 * value, rel=1e-5)


@pytest.mark.parametrize("network", ["", "_eimp"])
def test_the_shipped_configs_differ_from_the_published_ones_in_the_pose_alone(network):
    published, geo = (load_train_config(f"configs/config_train_megadepth{network}{name}.json", [])
                      for name in ("", "_geo"))
    assert {key for key in geo if geo[key] != published[key]} == {"with_pose", "save_path"}
