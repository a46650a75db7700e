"""The matchers beyond the golden files: against tests/oracle.py, by their symmetries, and at the limits of numbers."""
import itertools
import warnings

import pytest
import torch
from golden.fill import fill_, matching_mask, two_views
from oracle import Oracle

from eval.straightforward import Straightforward, assignment_of_scores
from eval.straightforward import sinkhorn as unrolled_sinkhorn
from nets import EIMP, GM, IMP, build_matcher
from nets.assignment import assign, mutual_matches, sinkhorn
from nets.layers import normalize_keypoints
from nets.layout import to_published
from nets.losses import matching_loss, targets_of
from nets.pooling import keep_indices, keep_mask

KINDS = ("gm", "imp", "eimp")
DIM = 32
SCALARS = ("loss", "matching_loss_corr", "matching_loss_incorr", "acc_corr", "acc_incorr", "total_acc_corr",
           "total_acc_incorr")


def make_data(n0, n1, dim, batch=1, seed=0, dtype=torch.float64):
    """Random views as tensors, with gt0 (B, n0) and the matching_mask that goes with it."""
    views = two_views(n0, n1, dim, batch, seed=seed)
    data = {key: torch.from_numpy(value) if key == "gt0" else torch.from_numpy(value).to(dtype)
            for key, value in views.items()}
    data["matching_mask"] = torch.from_numpy(matching_mask(views["gt0"], n1))
    return data


def make_matcher(kind, dim=DIM, n_layers=6, salt="", gain=3.0, dtype=torch.float64, norm_fn="in", training=False,
                 bin_score=None, **options):
    """Weights as for the golden files, but for a dustbin that attracts enough for EIMP to drop keypoints."""
    matcher = build_matcher(kind, descriptor_dim=dim, n_layers=n_layers, n_min_tokens=6, norm_fn=norm_fn, **options)
    fill_(matcher.to(dtype), salt, gain)
    if bin_score is None:  # with statistics of the keypoints at hand, descriptors grow from layer to layer
        bin_score = 40.0 if kind == "eimp" and (norm_fn == "in" or (norm_fn == "bn" and training)) else 5.0
    matcher.bin_score.data.fill_(bin_score)
    return matcher.train(training)


def make_oracle(kind, matcher, norm_fn="in", ac_fn="relu", training=False):
    return Oracle(kind, matcher.state_dict(), norm_fn, ac_fn, matcher.with_sinkhorn, matcher.n_min_tokens,
                  matcher.match_threshold, training)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


def all_finite(out):
    """Whether all numbers of a dict of tensors, or of dicts of them, are finite."""
    return all(all_finite(v) if isinstance(v, dict) else bool(torch.isfinite(v).all()) for v in out.values())


def check_losses(out, expected):
    for name in ("loss", "matching_loss_corr", "matching_loss_incorr"):
        close(out[name], torch.as_tensor(expected[name]))
    for name in ("acc_corr", "acc_incorr", "total_acc_corr", "total_acc_incorr"):
        assert out[name].item() == pytest.approx(expected[name], rel=1e-6), name


def views_of(data, v):
    """The entries of view `v`, without its number."""
    return {key[:-1]: value for key, value in data.items() if key[-1] == v and key != "gt0"}


CASES = [  # kind, norm_fn, ac_fn, with_sinkhorn, D, L, n0, n1, batch, seed, salt
    ("gm", "in", "relu", True, 16, 3, 20, 28, 2, 11, ""),
    ("gm", "bn", "gelu", False, 24, 5, 18, 13, 2, 12, "a"),
    ("gm", None, "lrelu", True, 12, 1, 9, 14, 1, 13, "b"),
    ("imp", None, "lrelu", True, 32, 8, 33, 21, 1, 14, "c"),
    ("imp", "in", "gelu", False, 20, 6, 17, 25, 3, 15, "d"),
    ("imp", "bn", "relu", True, 16, 7, 22, 22, 2, 16, "e"),
    ("eimp", "in", "relu", True, 32, 8, 40, 31, 3, 17, "f"),
    ("eimp", "bn", "lrelu", True, 24, 7, 28, 36, 2, 18, "g"),
    ("eimp", None, "gelu", False, 32, 6, 30, 30, 2, 19, "h"),
    ("eimp", "bn", "relu", False, 12, 2, 16, 12, 2, 20, "i"),
]


def build_case(case, training=False):
    kind, norm_fn, ac_fn, with_sinkhorn, dim, n_layers, n0, n1, batch, seed, salt = case
    matcher = make_matcher(kind, dim, n_layers, salt, norm_fn=norm_fn, ac_fn=ac_fn, with_sinkhorn=with_sinkhorn,
                           training=training)
    return matcher, make_oracle(kind, matcher, norm_fn, ac_fn, training), make_data(n0, n1, dim, batch, seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_matches_as_the_oracle(case):
    matcher, oracle, data = build_case(case)
    found = set()
    for pool_threshold in (0.1, 0.6):
        matches0, scores0 = matcher.match_all_iterations(data, threshold=0.2, pool_threshold=pool_threshold)
        expected_matches, expected_scores = oracle.match_all(data, 0.2, pool_threshold)
        assert torch.equal(matches0, expected_matches)
        close(scores0, expected_scores)
        found.update(matches0.unique().tolist())
    assert len(found) > 3
    assert oracle.n_dropped >= 8 or matcher.n_layers < 4 or not matcher.pools


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_losses_gradients_and_running_statistics_as_the_oracle(case):
    matcher, oracle, data = build_case(case, training=True)
    out, expected = matcher(data), oracle.train(data, data["gt0"])
    check_losses(out, expected)
    assert oracle.n_dropped >= 4 or matcher.n_layers < 4 or not matcher.pools
    out["loss"].backward()
    expected["loss"].backward()
    for name, parameter in matcher.named_parameters():
        close(to_published(name, parameter.grad), oracle.parameters[name].grad)
    for name, value in matcher.state_dict().items():
        if "running" in name:
            close(value, oracle.state[name])
        elif "num_batches" in name:  # how often they were updated
            assert value == (1 if case[0] == "imp" and name.startswith("gnn") else 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_what_is_timed_does_the_same(case):
    """The pooling and the loss of eval.straightforward that tests/oracle.py replaces, and its short cut."""
    matcher, oracle, data = build_case(case, training=True)
    kind, norm_fn, ac_fn = case[:3]
    timed = Straightforward(kind, matcher.state_dict(), norm_fn, ac_fn, matcher.with_sinkhorn, matcher.n_min_tokens,
                            training=True)
    close(timed.loss(data), oracle.train(data, data["gt0"])["loss"])
    assert timed.n_dropped == oracle.n_dropped
    timed.training = False
    last, *others = timed.run(data, last_only=True)[::-1]
    for (p, keep0, keep1), (p_all, keep0_all, keep1_all) in zip(last, timed.run(data)[-1]):
        close(p, p_all)
        assert keep0 is keep0_all is None or (torch.equal(keep0, keep0_all) and torch.equal(keep1, keep1_all))
    assert not others


@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("threshold", [0.1, 0.6])
def test_the_tests_below_pool(with_sinkhorn, threshold):
    """What they rest on: EIMP drops keypoints in them, in each sample others."""
    matcher = make_matcher("eimp", with_sinkhorn=with_sinkhorn)
    for state in matcher.iterate(make_data(30, 24, DIM, 2)):
        if state.iteration in (3, 5):
            state.mask_out(threshold)
    for keep in (state.keep0, state.keep1):
        assert keep.sum() < keep.numel() - 2 and not torch.equal(keep[0], keep[1])


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind):
    single = make_matcher(kind, 32, 9, "s", 1.5, torch.float32, bin_score=5.0)
    oracle = make_oracle(kind, single.double())
    single.float()
    data = make_data(50, 37, 32, 2, seed=21)
    matches0, scores0 = single.match_all_iterations({k: v.float() for k, v in data.items() if k != "gt0"})
    expected_matches, expected_scores = oracle.match_all(data)
    assert torch.equal(matches0, expected_matches)
    close(scores0, expected_scores, 1e-4)


def test_samples_without_matches_or_without_dustbins():
    """No true match adds 0 to the first mean; an empty dustbin column or row is left out of its mean."""
    matcher = make_matcher("gm", n_layers=2)
    oracle = make_oracle("gm", matcher)
    data = make_data(8, 8, DIM, 3)
    data["gt0"][0] = -1
    data["gt0"][1] = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for samples in ([0, 1, 2], [1], [0], [0, 1]):
        part = {key: value[samples] for key, value in data.items()}
        part["matching_mask"] = torch.from_numpy(matching_mask(part["gt0"].numpy(), 8))
        check_losses(matcher(part), oracle.train(part, part["gt0"]))


def test_matching_loss_of_a_small_assignment():
    p = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.05, 0.7], [0.3, 0.8, 0.0]])[None]
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]])[None]
    corr, incorr = matching_loss(p, targets_of({"matching_mask": mask}))
    close(corr, -torch.log(p[0, 0, 0]), 1e-6)
    close(incorr, -(torch.log(p[0, 1, 2]) + torch.log(p[0, 2, 1])) / 2, 1e-6)


def test_mutual_matches():
    """Mutual argmax above the threshold, not at it; what is mutual has a score even where it is not a match."""
    p = torch.tensor([[0.5, 0.1, 0.0, 9], [0.75, 0.2, 0.0, 9], [0.0, 0.625, 0.0, 9], [0.0, 0.0, 0.25, 9], [9, 9, 9, 9]])
    matches0, matches1, scores0, scores1 = mutual_matches(p[None], 0.25)
    assert matches0.tolist() == [[-1, 0, 1, -1]] and matches1.tolist() == [[1, 2, -1]]
    assert scores0.tolist() == [[0, 0.75, 0.625, 0.25]] and scores1.tolist() == [[0.75, 0.625, 0.25]]


# symmetries

@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_permuting_keypoints_permutes_matches(kind, with_sinkhorn):
    matcher = make_matcher(kind, with_sinkhorn=with_sinkhorn)
    data = make_data(30, 24, DIM, 2)
    generator = torch.Generator().manual_seed(1)
    orders = {"0": torch.randperm(30, generator=generator), "1": torch.randperm(24, generator=generator)}
    permuted = {key: value[:, orders[key[-1]]] for key, value in data.items() if key[-1] in orders}
    del data["matching_mask"]
    out, moved = matcher(data), matcher(permuted)
    assert (out["matches0"] >= 0).sum() > 10
    for v, other in ("01", "10"):
        place = torch.cat([orders[other].argsort(), torch.tensor([-1])])  # the last one, for index -1: no match
        assert torch.equal(moved[f"matches{v}"], place[out[f"matches{v}"][:, orders[v]]])
        close(moved[f"matching_scores{v}"], out[f"matching_scores{v}"][:, orders[v]])


@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_swapping_views(kind, with_sinkhorn):
    """It transposes the scores of every iteration; with dual softmax also the assignment and the matches.

    Sinkhorn's rows are normalised first, so its pooling does not swap exactly: EIMP is compared up to the first.
    """
    matcher = make_matcher(kind, with_sinkhorn=with_sinkhorn)
    data = make_data(30, 24, DIM, 2)
    swapped = {key[:-1] + {"0": "1", "1": "0"}[key[-1]]: value for key, value in data.items() if key[-1] in "01"}
    states = zip(matcher.iterate(data), matcher.iterate(swapped))
    for t, (state, other) in enumerate(states):
        x0, x1, y0, y1 = (matcher.final_proj[t](x) for x in (state.x0, state.x1, other.x0, other.x1))
        close(x0 @ x1.transpose(1, 2), (y0 @ y1.transpose(1, 2)).transpose(1, 2))
        if not with_sinkhorn:
            close(state.assignment, other.assignment.transpose(1, 2))
            matches0, matches1, scores0, scores1 = state.matches(0.2)
            assert (matches0 >= 0).any() or t < 5
            for a, b in zip(other.matches(0.2), (matches1, matches0, scores1, scores0)):
                close(a, b)
            if matcher.pools and t >= 3:
                state.mask_out(0.6)
                other.mask_out(0.6)
                assert torch.equal(state.keep0, other.keep1) and torch.equal(state.keep1, other.keep0)


def pad(data, extra0, extra1, seed=5):
    """Keypoints of no meaning after the real ones, and the masks that say so."""
    generator = torch.Generator().manual_seed(seed)
    padded = {}
    for v, extra in (("0", extra0), ("1", extra1)):
        for name, value in views_of(data, v).items():
            noise = 3 * torch.randn(len(value), extra, *value.shape[2:], generator=generator, dtype=value.dtype)
            padded[name + v] = torch.cat([value, noise], dim=1)
        batch, n = data[f"scores{v}"].shape
        padded[f"mask{v}"] = (torch.arange(n + extra) < n).expand(batch, -1)
    mask = data["matching_mask"]
    n0, n1 = mask.shape[1] - 1, mask.shape[2] - 1
    padded["matching_mask"] = mask.new_zeros(len(mask), n0 + extra0 + 1, n1 + extra1 + 1)
    rows, columns = [*range(n0), n0 + extra0], [*range(n1), n1 + extra1]
    padded["matching_mask"][:, torch.tensor(rows)[:, None], torch.tensor(columns)] = mask
    return padded


@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("norm_fn", ["in", "bn"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, norm_fn, with_sinkhorn):
    matcher = make_matcher(kind, norm_fn=norm_fn, with_sinkhorn=with_sinkhorn)
    data = make_data(30, 24, DIM, 2)
    padded = pad(data, 7, 11)
    for threshold in (0.1, 0.6):
        matches0, scores0 = matcher.match_all_iterations(data, pool_threshold=threshold)
        padded_matches, padded_scores = matcher.match_all_iterations(padded, pool_threshold=threshold)
        assert torch.equal(padded_matches[..., :30], matches0) and (padded_matches[..., 30:] == -1).all()
        close(padded_scores[..., :30], scores0)
        assert (padded_scores[..., 30:] == 0).all()

    statistics = []
    for views in (data, padded):
        network = make_matcher(kind, norm_fn=norm_fn, with_sinkhorn=with_sinkhorn, training=True)
        out = network(views)
        out["loss"].backward()
        statistics.append(([out[name] for name in SCALARS], [p.grad for p in network.parameters()],
                           [b for name, b in network.named_buffers() if "running" in name]))
    for plain, with_padding in zip(*statistics):
        for a, b in zip(plain, with_padding):
            close(a, b)


def join(items):
    """Pairs of any sizes, each with B = 1, as one padded batch."""
    sizes = [max(len(item[f"scores{v}"][0]) for item in items) for v in "01"]
    padded = [pad(item, *(size - item[f"scores{v}"].shape[1] for v, size in zip("01", sizes)), seed=i)
              for i, item in enumerate(items)]
    return {key: torch.cat([item[key] for item in padded]) for key in padded[0]}


@pytest.mark.parametrize("norm_fn", ["in", "bn", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_items(kind, norm_fn):
    """Of one size, and of several under masks, among them a view without any keypoint."""
    matcher = make_matcher(kind, norm_fn=norm_fn)
    same = make_data(30, 24, DIM, 3)
    items = [{key: value[b:b + 1] for key, value in same.items()} for b in range(3)]
    others = [make_data(n0, n1, DIM, seed=n0) for n0, n1 in ((30, 24), (21, 33), (12, 0), (9, 40))]
    for batch, parts in ((same, items), (join(others), others)):
        for threshold in (0.1, 0.6):
            matches0, scores0 = matcher.match_all_iterations(batch, pool_threshold=threshold)
            for b, part in enumerate(parts):
                n0 = part["scores0"].shape[1]
                expected_matches, expected_scores = matcher.match_all_iterations(part, pool_threshold=threshold)
                assert torch.equal(matches0[:, b, :n0], expected_matches[:, 0])
                close(scores0[:, b, :n0], expected_scores[:, 0])
        *_, state = matcher.iterate(batch)
        for b, part in enumerate(parts):
            *_, alone = matcher.iterate(part)
            for x, of_part in ((state.x0, alone.x0), (state.x1, alone.x1)):
                close(x[b, :of_part.shape[1]], of_part[0])
    if norm_fn != "bn":
        loss = matcher.train()(same)["loss"]
        close(loss, torch.stack([matcher(part)["loss"] for part in items]).mean())


@pytest.mark.parametrize("kind, n_layers", list(itertools.product(KINDS, (1, 4, 5))))
def test_fewer_iterations_at_call_time(kind, n_layers):
    whole = make_matcher(kind, n_layers=7)
    short = make_matcher(kind, n_layers=n_layers)
    short.load_state_dict({name: value for name, value in whole.state_dict().items() if name in short.state_dict()})
    data = make_data(30, 24, DIM, 2)
    out, expected = whole(data, n_layers=n_layers), short(data)
    for name in expected:
        close(out[name], expected[name])
    for a, b in zip(whole.match_all_iterations(data, n_layers=n_layers), short.match_all_iterations(data)):
        close(a, b)
    assert [state.iteration for state in whole.iterate(data, n_layers)] == list(range(n_layers))


@pytest.mark.parametrize("n_layers", [0, 8, -1])
def test_impossible_number_of_iterations(n_layers):
    with pytest.raises(ValueError, match="the network has 7 iterations"):
        make_matcher("imp", n_layers=7)(make_data(5, 5, DIM), n_layers=n_layers)


def test_pixels_are_normalised_by_the_image_size():
    data = make_data(20, 15, DIM)
    matcher = make_matcher("imp")
    pixels = {key: value for key, value in data.items() if not key.startswith("norm")}
    for v, size in (("0", [640.0, 480.0]), ("1", [300.0, 900.0])):
        size = torch.tensor([size], dtype=torch.float64)
        pixels[f"image_size{v}"] = size
        pixels[f"keypoints{v}"] = data[f"norm_keypoints{v}"] * 0.7 * size.max() + size / 2
        close(normalize_keypoints(pixels[f"keypoints{v}"], size), data[f"norm_keypoints{v}"])
    close(matcher(pixels)["matching_scores0"], matcher(data)["matching_scores0"])


def test_names_and_bad_options():
    for name, kind in (("gm", GM), ("IMP", IMP), ("dgnns", IMP), ("eimp", EIMP), ("AdaGMN", EIMP)):
        assert type(build_matcher(name, descriptor_dim=8, n_layers=1)) is kind
    for name, options, message in (("sgm", {}, "known are gm"), ("imp", {"descriptor_dim": 30}, "multiple of 4"),
                                   ("imp", {"norm_fn": "ln"}, "norm_fn 'ln'"),
                                   ("imp", {"ac_fn": "tanh"}, "ac_fn 'tanh'")):
        with pytest.raises(ValueError, match=message):
            build_matcher(name, **options)


# few keypoints

@pytest.mark.parametrize("n0, n1", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("norm_fn", ["in", "bn", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_without_keypoints(kind, norm_fn, n0, n1):
    matcher = make_matcher(kind, norm_fn=norm_fn)
    data = make_data(n0, n1, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = matcher(data)
        for v, n in (("0", n0), ("1", n1)):
            assert out[f"matches{v}"].shape == (1, n) and (out[f"matches{v}"] == -1).all()
            assert (out[f"matching_scores{v}"] == 0).all()
        matches0, scores0 = matcher.match_all_iterations(data)
        assert matches0.shape == scores0.shape == (6, 1, n0) and (matches0 == -1).all()
        for state in matcher.iterate(data):
            state.remove(0.2)
            assert (state.matches(0.1)[0] == -1).all()
        if norm_fn != "bn":
            loss = matcher.train()(data)["loss"]
            loss.backward()
            assert torch.isfinite(loss)
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in matcher.parameters())


@pytest.mark.parametrize("norm_fn", ["in", "bn", None])
@pytest.mark.parametrize("kind", KINDS)
def test_one_keypoint(kind, norm_fn):
    matcher = make_matcher(kind, norm_fn=norm_fn)
    for n0, n1 in ((1, 1), (1, 6), (6, 1)):
        data = make_data(n0, n1, DIM)
        out = matcher(data)
        assert all_finite(out)
        for state in matcher.iterate(data):
            state.remove(0.2)
            assert min(state.x0.shape[1], state.x1.shape[1]) == 1
        if norm_fn != "in":  # torch's instance norm refuses a single keypoint; ours makes it 0
            _, scores0 = make_oracle(kind, matcher, norm_fn).match_all(data)
            close(out["matching_scores0"], scores0[-1])


# what is computed in another way where that is faster

def results(matcher, data):
    """Matches of all iterations with masks and with removal, and losses and gradients of one training step."""
    found = list(matcher.eval().match_all_iterations(data, pool_threshold=0.6))
    if len(data["scores0"]) == 1:
        for state in matcher.iterate(data):
            found += state.matches(0.1)
            if matcher.pools and state.iteration in (2, 3, 5):
                state.remove(0.6)
    matcher.zero_grad()
    out = matcher.train()(data)
    out["loss"].backward()
    gradients = [parameter.grad.clone() for parameter in matcher.parameters()]
    return found + [out[name].detach() for name in SCALARS] + gradients


@pytest.mark.parametrize("kind", ["imp", "eimp"])
def test_a_training_step_is_one_graph(kind):
    """For torch.compile: fragments would reach its limit of recompilations, and give less speed."""
    torch._dynamo.reset()
    explained = torch._dynamo.explain(make_matcher(kind, n_layers=4, training=True))(make_data(20, 16, DIM))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("kind", ["imp", "eimp"])
def test_exported_for_any_number_of_keypoints(kind):
    def inputs(n0, n1):
        return {key: value for key, value in make_data(n0, n1, DIM).items() if key[-1] in "01" and key != "gt0"}

    matcher = make_matcher(kind)
    sizes = {v: {1: torch.export.Dim(f"n{v}", min=2, max=4096)} for v in "01"}
    data = inputs(20, 16)
    with torch.no_grad():
        exported = torch.export.export(matcher, (data,), dynamic_shapes=({key: sizes[key[-1]] for key in data},))
        other = inputs(30, 41)
        for name, value in exported.module()(other).items():
            close(value, matcher(other)[name])


def test_eimp_pools_in_bfloat16():
    """Masses of attention in bfloat16 would be the same for all keypoints, and none would be dropped."""
    matcher = make_matcher("eimp", bin_score=60.0).float()
    data = {key: value.float() for key, value in make_data(400, 400, DIM).items() if key[-1] in "01"}
    kept = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            *_, state = matcher.iterate(data, 4)
            state.mask_out(0.9)
            kept.append(int(state.keep0.sum()))
    assert kept[0] < 300 and kept[1] == pytest.approx(kept[0], abs=10)


@pytest.mark.parametrize("kind", ["imp", "eimp"])
def test_compiled(kind):
    """Traced and run as it is traced, without the minutes that code generation takes."""
    matcher = make_matcher(kind)
    data = {key: value for key, value in make_data(20, 16, DIM).items() if key[-1] in "01"}
    with torch.no_grad():
        expected = matcher(data)
        out = torch.compile(matcher, backend="eager", dynamic=False)(data)
    for name in expected:
        close(out[name], expected[name])


# removal for good

def by_hand(oracle, data, removals, n_layers):
    """Assignments of one pair at each iteration; removals: {t: (keep0, keep1)}, rows that stay after iteration t."""
    x0, x1 = oracle.encode(data)
    matrices, assignments = {}, []
    for t in range(n_layers):
        x0, x1 = oracle.iteration(t, x0, x1, matrices)
        assignments.append(oracle.assignment(t, x0, x1)[0])
        if t in removals:
            keep = removals[t]
            x0, x1 = x0[:, :, keep[0]], x1[:, :, keep[1]]
            for kind, sources in (("self", (0, 1)), ("cross", (1, 0))):
                matrices[kind] = [m[:, :, keep[v]][:, :, :, keep[source]]
                                  for v, (m, source) in enumerate(zip(matrices[kind], sources))]
                matrices[kind] = [m / m.sum(dim=-1, keepdim=True) for m in matrices[kind]]
    return assignments


@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("pool_at", [(3, 5), (2, 4), (3,), (1, 2, 3)], ids=str)
def test_removal(pool_at, with_sinkhorn):
    """After odd iterations (the next compute their own attention) and even ones (the next share what was reduced)."""
    matcher = make_matcher("eimp", n_layers=8, with_sinkhorn=with_sinkhorn)
    data = make_data(60, 48, DIM, seed=1)
    n0, n1 = 60, 48
    indices0, indices1, removals, assignments = torch.arange(n0), torch.arange(n1), {}, []
    for state in matcher.iterate(data):
        t = state.iteration
        p = state.assignment
        assignments.append(p[0])
        assert torch.equal(state.indices0, indices0) and torch.equal(state.indices1, indices1)

        matches0, matches1, scores0, scores1 = state.matches(0.1)
        assert matches0.shape == scores0.shape == (1, n0) and matches1.shape == scores1.shape == (1, n1)
        expected0, expected1 = torch.full((n0,), -1), torch.full((n1,), -1)
        for row, column in enumerate(mutual_matches(p, 0.1)[0][0].tolist()):
            if column >= 0:
                expected0[indices0[row]], expected1[indices1[column]] = indices1[column], indices0[row]
        assert torch.equal(matches0[0], expected0) and torch.equal(matches1[0], expected1)
        for scores, indices, of_kept in zip((scores0, scores1), (indices0, indices1), mutual_matches(p, 0.1)[2:]):
            assert torch.equal(scores[0, indices], of_kept[0])
            close(scores.sum(), of_kept.sum())

        if t in pool_at:
            self0, cross0, self1, cross1 = (mass[0] for mass in state.attention_masses())
            keep = (keep_indices(p[0], self0, cross0, 0.6, 6), keep_indices(p[0].T, self1, cross1, 0.6, 6))
            state.remove(0.6)
            removals[t] = keep
            indices0, indices1 = indices0[keep[0]], indices1[keep[1]]
    assert len(indices0) < n0 - 2 and len(indices1) < n1 - 1 and (expected0 >= 0).sum() > 5
    for a, b in zip(assignments, by_hand(make_oracle("eimp", matcher), data, removals, 8)):
        close(a, b)


@pytest.mark.parametrize("n_min_tokens", [6, 1000])
def test_removal_with_padding(n_min_tokens):
    """Padding comes first here: 9 and 5 keypoints. It may stay, where all stay, but it means nothing."""
    matcher = make_matcher("eimp", n_layers=8)
    matcher.n_min_tokens = n_min_tokens
    data = make_data(40, 32, DIM, seed=3)
    padded = {key: value.roll(9 if key[-1] == "0" else 5, dims=1) for key, value in pad(data, 9, 5).items()
              if key[-1] in "01"}
    for state, other in zip(matcher.iterate(data), matcher.iterate(padded)):
        matches0, matches1, scores0, scores1 = state.matches(0.1)
        expected = (torch.where(matches0 >= 0, matches0 + 5, -1), torch.where(matches1 >= 0, matches1 + 9, -1), scores0,
                    scores1)
        for a, b, n in zip(expected, other.matches(0.1), (9, 5, 9, 5)):
            close(b[:, n:], a)
            assert (b[:, :n] <= 0).all()
        if state.iteration in (3, 5):
            state.remove(0.6)
            other.remove(0.6)
            assert torch.equal(other.indices0[other.indices0 >= 9] - 9, state.indices0)
            assert torch.equal(other.indices1[other.indices1 >= 5] - 5, state.indices1)
    assert (len(state.indices0) < 38) == (n_min_tokens == 6) and (matches0 >= 0).sum() > 5


def test_removal_is_for_one_pair():
    (state, *_) = make_matcher("eimp").iterate(make_data(9, 9, DIM, 2))
    with pytest.raises(ValueError, match="one pair at a time"):
        state.remove(0.1)


# pooling

def test_keep_indices():
    """Adaptive pooling on numbers to follow by eye: P = {0, 1, 2, 3}; the lower medians are of keypoints 1 and 2."""
    p = torch.zeros(8, 3)
    p[:4, 0] = 0.2
    p[3, :2] = 0.1  # the row counts, not its best
    p[4:7, 2] = 0.9  # the dustbin does not
    mass_self = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.0, 0.1])
    mass_cross = torch.tensor([0.4, 0.4, 0.1, 0.0, 0.0, 0.1, 0.0])
    assert keep_indices(p, mass_self, mass_cross, 0.2, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert keep_indices(p, mass_self, mass_cross, 0.2, 7).tolist() == list(range(7))
    assert keep_indices(p, mass_self, mass_cross, 0.3, 0).tolist() == list(range(7))
    active = torch.arange(7) != 2
    kept = keep_mask(p[None], mass_self[None], mass_cross[None], 0.2, 5, active[None])[0]
    assert kept.tolist() == [True, True, False, True, True, False, False]  # medians over {0, 1, 3}: 0.2 and 0.4
    assert torch.equal(keep_mask(p[None], mass_self[None], mass_cross[None], 0.3, 5, active[None])[0], active)
    kept = keep_indices(torch.zeros(1, 5), torch.zeros(0), torch.zeros(0), 0.2, 0)
    assert kept.dtype == torch.int64 and kept.tolist() == []


# the limits of numbers

def exact_views(logits, dtype):
    """x0, x1 of D = 64 whose scores are `logits` (B, n0, n1 <= 64) to the last bit."""
    batch, _, n1 = logits.shape
    x0 = torch.zeros(batch, logits.shape[1], 64)
    x0[:, :, :n1] = logits
    return x0.to(dtype), 8 * torch.eye(64)[:n1].expand(batch, -1, -1).to(dtype)


def extreme_logits(kind, size):
    """(1, 40, 30) multiples of 1/4 in +-size."""
    logits = torch.full((1, 40, 30), -size)
    diagonal = torch.arange(30)
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(1, 40, 30, generator=generator) * size / 2).clamp(-size, size).mul(4).round() / 4
    elif kind == "column":
        logits[:, :, 0] = size
    elif kind == "row":
        logits[:, 0] = size
    elif kind == "matches":
        logits[:, diagonal, diagonal] = size
    elif kind == "all":
        logits = -logits
    return logits


@pytest.mark.parametrize("with_sinkhorn", [True, False])
@pytest.mark.parametrize("bin_score", [1.0, 1e4, -1e4])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4])
def test_extreme_logits(size, bin_score, with_sinkhorn):
    """Finite forward and backward, and what exact arithmetic gives, also in half precision and under autocast."""
    true = torch.arange(30)

    def loss_of(p):
        log = torch.log(p + 1e-8)
        return -log[:, true, true].mean() - log[:, :, -1].mean() - log[:, -1].mean()

    for kind in ("random", "none", "column", "row", "matches", "all"):
        logits = extreme_logits(kind, size)
        exact = logits.double().requires_grad_()
        exact_bin = torch.tensor(bin_score, dtype=torch.float64, requires_grad=True)
        expected = assignment_of_scores(exact, exact_bin, with_sinkhorn)
        loss_of(expected).backward()
        for dtype, autocast in ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.float16, None),
                                (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
            x0, x1 = (x.requires_grad_() for x in exact_views(logits, dtype))
            bin_parameter = torch.tensor(bin_score, requires_grad=True)
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                p = assign(x0, x1, bin_parameter, with_sinkhorn, 20)
            assert p.dtype == torch.float32
            loss_of(p).backward()
            for value in (p, x0.grad, x1.grad, bin_parameter.grad):
                assert torch.isfinite(value).all(), (kind, dtype)
            if dtype == torch.float32:
                close(p, expected, 1e-5)
                close(x0.grad[:, :, :30], exact.grad, 1e-6)
                close(bin_parameter.grad, exact_bin.grad, 1e-5)


def random_scaling_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(2, 7, 5, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    r, c = torch.ones(2, 7, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    r[:, -1], c[:, -1] = 7, 5
    return p, r, c


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_gradient_of_sinkhorn(iterations):
    p, r, c = random_scaling_problem()
    assert torch.autograd.gradcheck(lambda p: sinkhorn(p, r, c, iterations), p.requires_grad_(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_sinkhorn_as_unrolled(iterations, masked):
    """Values and gradients; masked: rows and columns of zeros with total zero, as padding makes them."""
    p, r, c = random_scaling_problem(1)
    if masked:
        p[0, 2:4] = 0
        p[1, :, 3] = 0
        r[0, 2:4], c[1, 3] = 0, 0
    ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
    a = sinkhorn(ours, r, c, iterations)
    b = unrolled_sinkhorn(theirs, r.unsqueeze(-1), c.unsqueeze(-1), iterations)
    close(a, b, 1e-13)
    weights = torch.rand(a.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    """Training and matching in half precision, with padding: finite, and near what single precision gives."""
    matcher = make_matcher(kind, gain=2.0, dtype=torch.float32, bin_score=5.0)
    items = [make_data(n0, n1, 32, seed=4, dtype=torch.float32) for n0, n1 in ((40, 32), (31, 44), (7, 0))]
    batch = join(items)
    expected = matcher(batch)
    with torch.autocast("cpu", dtype=dtype):
        out = matcher(batch)
        loss = matcher.train()(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and abs(loss - expected["loss"]) < 0.02 * expected["loss"]
    assert all(torch.isfinite(parameter.grad).all() for parameter in matcher.parameters())
    assert all_finite(out)
    assert (out["matches0"] == expected["matches0"]).float().mean() > 0.95
    assert (expected["matches0"] >= 0).sum() > 20
    assert (out["matches0"][2] == -1).all()


def test_same_for_any_number_of_threads():
    matcher, data = make_matcher("eimp", dtype=torch.float32), make_data(60, 50, DIM, dtype=torch.float32)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(matcher.match_all_iterations(data, pool_threshold=0.6))
    finally:
        torch.set_num_threads(before)
    for matches0, scores0 in outcomes[1:]:
        assert torch.equal(matches0, outcomes[0][0])
        close(scores0, outcomes[0][1], 1e-5)
