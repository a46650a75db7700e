"""The loop of matching and pose estimation: every branch with a scripted network and estimator, then real networks."""
import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from eval.iterative import Schedule, match_iteratively, same_pose
from eval.methods import Imp, Matcher, MatcherSettings, Method
from nets import build_matcher
from training.start import warm_start

N = 40  # keypoints of a view in the scripted network
DATA = {"descriptors0": torch.zeros(1, N, 4), "descriptors1": torch.zeros(1, N, 4)}


class ScriptedState:
    def __init__(self, network, iteration):
        self.network, self.iteration = network, iteration
        self.indices0 = self.indices1 = torch.arange(N)

    def matches(self, threshold):
        """Keypoint i with keypoint N - 1 - i; the first `strong` score 0.5, the `weak` after them 0.15."""
        strong, weak = self.network.counts[self.iteration]
        scores = torch.zeros(1, N)
        scores[0, :strong + weak] = 0.15
        scores[0, :strong] = 0.5
        matches = torch.where(scores > threshold, N - 1 - torch.arange(N), -1)
        return matches, matches.flip(1), scores, scores.flip(1)

    def remove(self, threshold, n_min_tokens):
        self.network.pooled_above.append(n_min_tokens)
        self.network.removed.append((self.iteration, pytest.approx(threshold)))


class ScriptedNetwork:
    """Finds counts[t] = (strong, weak) matches at iteration t, and notes what is done to it."""

    n_min_tokens = 256

    def __init__(self, counts, pools=True):
        self.counts, self.pools, self.n_layers = counts, pools, len(counts)
        self.started, self.removed, self.pooled_above = 0, [], []

    def iterate(self, data, n_layers):
        for t in range(n_layers):
            self.started += 1
            yield ScriptedState(self, t)


def pose(degrees, turn=0.0):
    """R turned by `turn` degrees, t pointing `degrees` from the x axis."""
    R = Rotation.from_rotvec([0, 0, turn], degrees=True).as_matrix()
    return R, np.array([np.cos(np.radians(degrees)), 0, np.sin(np.radians(degrees))])


class ScriptedEstimator:
    """Returns pose after pose, with the first share of the matches as inliers; None where the script says so."""

    def __init__(self, *poses, share=0.5):
        self.poses, self.share, self.calls, self.scores, self.quick = list(poses), share, [], [], []

    def __call__(self, matches, scores=None, quick=False):
        self.calls.append(matches)
        self.quick.append(quick)
        self.scores.append(scores)
        found = self.poses.pop(0)
        return None if found is None else (*found, np.arange(len(matches)) < self.share * len(matches))


A, B, C, D, E, F, G, H = (pose(20 * i, 20 * i) for i in range(8))
ENOUGH = (30, 0)


def test_iterations_at_which_matches_are_read():
    assert [t for t in range(15) if Schedule().reads(t, 15)] == [3, 5, 7, 9, 11, 13, 14]
    assert [t for t in range(6) if Schedule().reads(t, 6)] == [3, 5]
    assert [t for t in range(5) if Schedule().reads(t, 5)] == [3, 4]
    assert [t for t in range(3) if Schedule().reads(t, 3)] == [2]
    assert [t for t in range(9) if Schedule(2, 1).reads(t, 9)] == [2, 3, 4, 5, 6, 7, 8]


def test_two_poses_that_agree_stop_it_and_their_inliers_are_the_matches():
    network, estimate = ScriptedNetwork([ENOUGH] * 15), ScriptedEstimator(A, B, B, share=0.4)
    found = match_iteratively(network, DATA, estimate)
    assert found.stopped_early and found.n_iterations == network.started == 8
    assert found.matches.tolist() == [[i, N - 1 - i] for i in range(12)] and len(found.scores) == 12
    assert found.pose[0] is B[0] and found.pose[1] is B[1] and found.pose[2].tolist() == [True] * 12
    assert [step.iteration for step in found.steps] == [3, 5, 7]
    assert [len(scores) for scores in estimate.scores] == [30] * 3
    assert [len(step.matches) for step in found.steps] == [len(step.pose[2]) for step in found.steps] == [30] * 3
    assert [step.pose[1] for step in found.steps] == [A[1], B[1], B[1]]


@pytest.mark.parametrize("second, stops", [
    (pose(1.4, 1.4), True), (pose(1.6, 0), False), (pose(0, 1.6), False), (pose(1.6, 1.6), False)])
def test_rotation_and_translation_must_both_agree(second, stops):
    found = match_iteratively(ScriptedNetwork([ENOUGH] * 8), DATA, ScriptedEstimator(pose(0), second, E, F))
    assert found.stopped_early is stops


def test_poses_may_also_agree_at_the_last_iteration():
    found = match_iteratively(ScriptedNetwork([ENOUGH] * 5), DATA, ScriptedEstimator(A, A))
    assert found.stopped_early and found.n_iterations == 5


def test_too_few_matches_forget_the_last_pose_and_pool_nothing():
    counts = [ENOUGH] * 15
    counts[5], counts[9] = (20, 4), (0, 0)  # 24 above 0.1, one too few
    counts[7] = (0, 25)  # just enough
    network, estimate = ScriptedNetwork(counts), ScriptedEstimator(A, A, A, A)
    found = match_iteratively(network, DATA, estimate)
    # A of 3 is forgotten at 5, A of 7 at 9
    assert found.stopped_early and found.n_iterations == 14
    assert [step.pose is None for step in found.steps] == [False, True, False, True, False, False]
    assert [t for t, _ in network.removed] == [3, 7, 11]


@pytest.mark.parametrize("use_uncertainty", [False, True])
@pytest.mark.parametrize("failed", [None, pose(0)], ids=["no pose", "no inliers"])
def test_a_failed_pose_forgets_the_last_one_and_pools_as_without_uncertainty(failed, use_uncertainty):
    network, estimate = ScriptedNetwork([ENOUGH] * 15), ScriptedEstimator(A, failed, A, A)
    shares = iter([0.5, 0.0, 0.5, 0.5])

    def failing_once(matches, scores=None, quick=False):
        estimate.share = next(shares)
        return estimate(matches, scores, quick)

    found = match_iteratively(network, DATA, failing_once, use_uncertainty)
    assert found.stopped_early and found.n_iterations == 10
    half = 0.1 if use_uncertainty else 0.2
    assert network.removed == [(3, half), (5, 0.2), (7, half)]


def test_uncertainty_pools_in_proportion_to_the_share_of_inliers():
    removed = {}
    for use_uncertainty in (False, True):
        network = ScriptedNetwork([ENOUGH] * 7)
        match_iteratively(network, DATA, ScriptedEstimator(A, B, C, D, share=0.3), use_uncertainty)
        removed[use_uncertainty] = network.removed
    assert removed[False] == [(3, 0.2), (5, 0.2)]
    assert removed[True] == [(3, 0.06), (5, 0.06)]


def test_a_network_that_does_not_pool_keeps_everything():
    network = ScriptedNetwork([ENOUGH] * 7, pools=False)
    match_iteratively(network, DATA, ScriptedEstimator(A, B, C, D), use_uncertainty=True)
    assert network.removed == []


def test_never_stopped_gives_the_strong_matches_of_the_last_iteration_and_one_more_pose():
    network, estimate = ScriptedNetwork([ENOUGH] * 14 + [(27, 6)]), ScriptedEstimator(A, B, C, D, E, F, G, H)
    found = match_iteratively(network, DATA, estimate)
    assert not found.stopped_early and found.n_iterations == network.started == 15
    assert len(found.matches) == len(found.scores) == 27 and found.scores.min() == 0.5
    assert [len(call) for call in estimate.calls] == [30] * 6 + [33, 27]
    assert all(len(scores) == len(matches) for scores, matches in zip(estimate.scores[:-1], estimate.calls))
    assert estimate.quick == [True] * 7 + [False]
    assert found.pose[1] is H[1] and len(found.pose[2]) == 27
    assert len(found.steps) == 7 and len(found.steps[-1].matches) == 33 and found.steps[-1].pose[1] is G[1]
    assert [t for t, _ in network.removed] == [3, 5, 7, 9, 11, 13]  # after the last there is nothing to save

    found = match_iteratively(network, DATA, ScriptedEstimator(*[None] * 8), threshold=0.1)
    assert found.pose is None and len(found.matches) == 33


def test_fewer_iterations_than_the_network_has():
    network = ScriptedNetwork([ENOUGH] * 15)
    found = match_iteratively(network, DATA, ScriptedEstimator(A, B, C), n_layers=5)
    assert found.n_iterations == network.started == 5 and [step.iteration for step in found.steps] == [3, 4]


# real networks: nearest-neighbour matchers, untrained but not blind

def make_network(kind, n_layers=8, n_min_tokens=256):
    torch.manual_seed(0)
    network = build_matcher(kind, descriptor_dim=32, n_layers=n_layers, n_min_tokens=n_min_tokens, match_threshold=0.2)
    warm_start(network)
    return network.eval()


def make_data(n_shared=60, n_alone=60):
    """Views that see n_shared points, and n_alone each that the other does not, shuffled; and the true partners."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(n_shared + 2 * n_alone, 32))
    rows0 = rng.permutation(n_shared + n_alone)
    rows1 = rng.permutation(np.r_[:n_shared, n_shared + n_alone:n_shared + 2 * n_alone])
    data = {}
    for view, rows in (("0", rows0), ("1", rows1)):
        descriptors = points[rows] + rng.normal(0, 0.1, (len(rows), 32))
        descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
        data["descriptors" + view] = torch.tensor(descriptors[None], dtype=torch.float32)
        data["scores" + view] = torch.tensor(rng.random((1, len(rows))), dtype=torch.float32)
        data["keypoints" + view] = torch.tensor(rng.uniform(0, 300, (1, len(rows), 2)), dtype=torch.float32)
        data["image_size" + view] = torch.tensor([[320.0, 240.0]])
    partners = {int(i): int(np.flatnonzero(rows1 == rows0[i])[0]) for i in np.flatnonzero(rows0 < n_shared)}
    return data, partners


def never_the_same(share=0.75):
    """An estimator that finds another pose each time, with a share of the matches as inliers."""
    angles = itertools.count(0, 17)
    return lambda matches, *_, **__: (*pose(next(angles)), np.arange(len(matches)) < share * len(matches))


@pytest.mark.parametrize("kind, n_min_tokens", [("imp", 0), ("eimp", 256), ("gm", 256)])
def test_without_pooling_and_stopping_it_equals_one_shot(kind, n_min_tokens):
    network, (data, _) = make_network(kind, n_min_tokens=n_min_tokens), make_data()
    found = match_iteratively(network, data, never_the_same())
    with torch.no_grad():
        out = network(data)
    matches0 = out["matches0"][0].numpy()
    index0 = np.flatnonzero(matches0 >= 0)
    assert len(index0) > 40 and not found.stopped_early
    np.testing.assert_array_equal(found.matches, np.c_[index0, matches0[index0]])
    np.testing.assert_array_equal(found.scores, out["matching_scores0"][0].numpy()[index0])
    assert all(len(step.kept0) == len(step.kept1) == 120 for step in found.steps)


def test_indices_refer_to_the_input_after_keypoints_were_removed():
    network, (data, partners) = make_network("eimp", n_min_tokens=30), make_data()
    found = match_iteratively(network, data, never_the_same())
    counts = [len(step.kept0) for step in found.steps]
    assert counts[0] == 120 and counts[-1] < 110 and counts == sorted(counts, reverse=True)
    for before, after in zip(found.steps, found.steps[1:]):
        assert set(after.kept0) <= set(before.kept0) and set(after.kept1) <= set(before.kept1)
    for step in found.steps:
        assert set(step.matches[:, 0]) <= set(step.kept0) and set(step.matches[:, 1]) <= set(step.kept1)
    for matches in (found.matches, *(step.matches for step in found.steps)):
        assert len(matches) > 50
        assert np.mean([partners.get(i) == j for i, j in matches.tolist()]) > 0.95


def test_the_state_is_consistent_after_every_removal():
    network, (data, _) = make_network("eimp", n_min_tokens=30), make_data()
    encoded = network.encode(data)
    sizes, plain_iterate = [], network.iterate

    def watched(data, n_layers):
        for state in plain_iterate(data, n_layers):
            whole0, whole1 = state.x0, state.x1
            rows_before = state.indices0
            queries = state.attention_self[0].queries
            yield state  # after which the loop has removed what it wants
            n0, n1 = len(state.indices0), len(state.indices1)
            sizes.append((n0, n1))
            assert state.x0.shape[1] == n0 and state.x1.shape[1] == n1
            self0, cross0, self1, cross1 = state.attention_masses()
            assert (self0.shape, cross0.shape, self1.shape, cross1.shape) == ((1, n0),) * 2 + ((1, n1),) * 2
            assert state.assignment.shape == (1, n0 + 1, n1 + 1)
            # rows are those of the input that indices name
            stayed = torch.isin(rows_before, state.indices0)
            torch.testing.assert_close(state.x0, whole0[:, stayed], rtol=0, atol=0)
            torch.testing.assert_close(state.attention_self[0].queries, queries[:, :, stayed], rtol=0, atol=0)
            nearest = torch.cdist(state.x0[0], encoded.x0[0]).argmin(dim=1)
            assert (nearest == state.indices0).float().mean() > 0.9
            assert whole1.shape[1] >= n1

    network.iterate = watched
    match_iteratively(network, data, never_the_same(), use_uncertainty=True)
    # the last iteration ends the loop before the watcher looks again
    assert sizes[2] == (120, 120) > sizes[3] > sizes[5] and sizes[3] == sizes[4]


@pytest.mark.parametrize("empty", ["0", "1"])
def test_a_view_without_keypoints_has_no_matches(empty):
    network, (data, _) = make_network("eimp"), make_data()
    for name in ("descriptors", "scores", "keypoints"):
        data[name + empty] = data[name + empty][:, :0]
    found = match_iteratively(network, data, lambda *_: pytest.fail("nothing to estimate from"))
    assert found.matches.shape == (0, 2) and found.pose is None and not found.steps and not found.stopped_early


# methods, which evaluation runs

class Given(Imp):
    """A network that is there already."""

    def __init__(self, network, threshold, n_iterations):
        self.network, self.threshold, self.n_iterations = network, threshold, n_iterations


class Timed:
    """An estimator with the times that a method asks for."""

    def __init__(self, estimate):
        self.estimate, self.seconds, self.elapsed = estimate, 2.0, 0.0

    def __call__(self, *arguments, **options):
        return self.estimate(*arguments, **options)


def test_a_method_runs_the_loop_as_its_matcher_says():
    network, (data, _) = make_network("eimp", n_min_tokens=30), make_data()
    torch.nn.init.constant_(network.bin_score, 15)  # fewer keypoints are without a doubt matched or not
    scores = match_iteratively(network, data, never_the_same(), n_layers=6).scores
    threshold = float(np.median(scores))
    kept = {}
    for use_uncertainty in (False, True):
        outcome, other = Method(Given(network, threshold, 6), True, use_uncertainty).match(
            data, [Timed(never_the_same(share=0.02)), Timed(lambda matches, scores=None, quick=False: None)])
        assert outcome.n_iterations == 6 and outcome.stopped_early is False and outcome.pose is not None
        assert outcome.used.all() and len(outcome.used) == len(outcome.all_matches)
        assert other.pose is None and len(other.steps) == 2
        kept[use_uncertainty] = len(outcome.steps[-1].kept0)
        if not use_uncertainty:
            assert outcome.all_scores.tolist() == scores[scores > threshold].tolist()
    assert kept[True] > kept[False]


def test_one_shot_is_matched_once_for_all_estimators_and_they_get_what_is_used():
    calls = []

    class Scripted(Matcher):
        threshold, n_iterations = 0.5, 9

        def match(self, data):
            calls.append(data)
            return {"matches0": torch.tensor([2, -1, 0, 1]), "matching_scores0": torch.tensor([0.9, 0.0, 0.2, 0.6])}

    data = {f"keypoints{view}": torch.zeros(1, 4, 2) for view in "01"}
    first, second = Method(Scripted(MatcherSettings())).match(
        data, [Timed(lambda matches: ("R", "t", matches.tolist())), Timed(lambda matches: None)])
    assert len(calls) == 1 and first.pose[2] == [[0, 2], [3, 1]] and second.pose is None
    assert first.all_matches.tolist() == [[0, 2], [2, 0], [3, 1]] and first.used.tolist() == [True, False, True]
    assert first.n_iterations == 9 and first.stopped_early is None
    assert first.seconds["pose"] == 2 and first.seconds["matching"] > 0


# the published protocol

@pytest.mark.parametrize("published, use_uncertainty, above", [
    (False, False, 256), (False, True, 256), (True, False, None), (True, True, 255)])
def test_published_program_pools_with_uncertainty_alone_and_also_256_keypoints(published, use_uncertainty, above):
    network = ScriptedNetwork([ENOUGH] * 6)
    match_iteratively(network, DATA, ScriptedEstimator(A, B, C), use_uncertainty, published=published)
    assert network.pooled_above == ([] if above is None else [above])


def test_a_translation_that_changes_its_sign_is_another_one():
    R, t = A
    assert same_pose((R, t), (R, t)) and not same_pose((R, t), (R, -t))
