"""LightGlue as a matcher of the loop: the same matches as kornia's own, and what the loop asks of a network."""
import copy
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, NAMES, POSES, make_scene
from test_features import kornia_extractor

from eval import eval_imp
from eval.image_matcher import ImageMatcher
from eval.iterative import Schedule, match_iteratively
from eval.methods import to_data
from eval.pair_sets import EvalPair
from eval.peers import LightGlue, LightGlueState, inside_image
from nets import SuperPoint, build_matcher
from tools.cli import InputError, run
from tools.files import read_image
from tools.geometry import relative_pose
from tools.metrics import pose_error
from tools.pretrained import find_pretrained

K = np.array([[300.0, 0, 159.5], [0, 300, 119.5], [0, 0, 1]])


def textured(seed):
    rng = np.random.default_rng(seed)
    image = np.full((240, 320, 3), 128, np.uint8)
    for x, y, r in zip(rng.integers(0, 320, 250), rng.integers(0, 240, 250), rng.integers(4, 25, 250)):
        color = rng.integers(0, 255, 3).tolist()
        cv2.rectangle(image, (int(x), int(y)), (int(x + r), int(y + r // 2)), color, -1)
    return cv2.GaussianBlur(image, (0, 0), 1)


@pytest.fixture(scope="module")
def pairs():
    """Twenty pairs of images as data for a matcher, each a view and another of the same plane."""
    extractor, data = kornia_extractor("aliked", 150), []
    for seed in range(20):
        image, rng = textured(seed), np.random.default_rng(seed)
        corners = np.float32([[0, 0], [319, 0], [319, 239], [0, 239]])
        H = cv2.getPerspectiveTransform(corners, corners + rng.uniform(-40, 40, (4, 2)).astype(np.float32))
        features = extractor(image), extractor(cv2.warpPerspective(image, H, (320, 240)))
        data.append(to_data(EvalPair(seed, ("a", "b"), ("a", "b"), *features, K, K)))
    return data


@pytest.fixture(scope="module")
def lightglue():
    kornia_extractor("aliked")  # skips without kornia
    return LightGlue("aliked")


def kornia_forward(network, data, depth_confidence):
    """What kornia's own LightGlue finds without pruning, with its own cross-attention."""
    network = copy.deepcopy(network)
    network.conf.depth_confidence, network.conf.width_confidence = depth_confidence, -1
    for layer in network.transformers:
        del layer.cross_attn.forward
    with torch.no_grad():
        return network({f"image{v}": {"keypoints": data[f"keypoints{v}"], "descriptors": data[f"descriptors{v}"],
                                      "image_size": data[f"image_size{v}"]} for v in "01"})


def test_last_layer_is_kornias_forward(lightglue, pairs):
    for data in pairs:
        expected = kornia_forward(lightglue.network, data, -1)
        found = lightglue(data)
        assert expected["stop"] == lightglue.n_layers == 9
        for v in "01":
            matched = expected[f"matches{v}"] >= 0
            assert matched.sum() > 30
            np.testing.assert_array_equal(found[f"matches{v}"], expected[f"matches{v}"])
            np.testing.assert_allclose(found[f"matching_scores{v}"][matched], expected[f"matching_scores{v}"][matched],
                                       atol=1e-4)  # nine layers, whose attention adds in another order


def test_own_exit_and_pruning_are_kornias(lightglue, pairs):
    """Pruning after each layer and the state's confidence give its matches and its number of layers."""
    stops = set()
    for data in pairs[:8]:
        expected = lightglue.match_adaptively(data)
        with torch.no_grad():
            for state in lightglue.iterate(data):
                if state.is_confident():
                    break
        assert state.iteration + 1 == expected["stop"]
        matches0, matches1, *_ = state.matches(0.0)
        np.testing.assert_array_equal(matches0, expected["matches0"])
        np.testing.assert_array_equal(matches1, expected["matches1"])
        stops.add(expected["stop"])
    assert min(stops) < 9


def test_kept_keypoints_have_the_names_of_the_input(lightglue, pairs):
    """Without interaction between keypoints, at the same layer, the rest matches as before."""
    with torch.no_grad():
        state = next(lightglue.iterate(pairs[0]))
        before0, before1, *_ = state.matches(0.0)
        rows0, rows1 = torch.arange(0, len(state.indices0), 2), torch.arange(1, len(state.indices1), 3)
        state.select(rows0, rows1)
        state.select(torch.arange(5, len(rows0)), torch.arange(len(rows1)))
        after0, after1, *_ = state.matches(0.0)
    np.testing.assert_array_equal(state.indices0, rows0[5:])
    assert after0.shape == before0.shape and after1.shape == before1.shape
    gone = np.setdiff1d(np.arange(before0.shape[1]), state.indices0)
    assert (after0[0, gone] == -1).all()
    matched = torch.nonzero(after0[0] >= 0)[:, 0]
    assert len(matched) > 10
    assert set(after0[0, matched].tolist()) <= set(state.indices1.tolist())
    np.testing.assert_array_equal(after1[0, after0[0, matched]], matched)
    both = [i for i in matched.tolist() if before0[0, i] in state.indices1]
    np.testing.assert_array_equal(after0[0, both], before0[0, both])


def test_the_loop_drives_it(lightglue, pairs):
    seen = []

    def estimate(matches, scores=None, quick=False):
        seen.append(len(matches))
        return np.eye(3), np.array([1.0, 0, 0]), np.ones(len(matches), bool)

    found = match_iteratively(lightglue, pairs[0], estimate)
    assert found.stopped_early and len(found.steps) == len(seen) == 2
    assert min(seen) >= 25 and found.n_iterations < 9


def test_the_loop_ends_where_lightglue_would_stop(lightglue, pairs):
    """Without a pose, its matches are those of LightGlue up to there."""
    network = LightGlue("aliked", prunes=False)
    for data in pairs[:4]:
        found = match_iteratively(network, data, lambda matches, *_, **__: None, schedule=Schedule(0, 1))
        assert not found.stopped_early
        assert found.n_iterations == kornia_forward(lightglue.network, data, 0.95)["stop"] < 9
        one_shot = network(data, found.n_iterations)["matching_scores0"][0]
        np.testing.assert_array_equal(found.matches[:, 0], torch.nonzero(one_shot > 0.2)[:, 0])


@pytest.mark.parametrize("counts", [(0, 5), (1, 1), (1, 300), (2, 2)])
def test_hardly_a_keypoint(lightglue, pairs, counts):
    data = {name: value[:, :counts[int(name[-1])]] if "size" not in name else value for name, value in pairs[0].items()}
    found = match_iteratively(lightglue, data, lambda matches, *_, **__: None)
    assert len(found.matches) <= min(counts) and found.pose is None
    if min(counts):
        assert lightglue(data)["matches0"].shape == lightglue.match_adaptively(data)["matches0"].shape == (1, counts[0])


def test_keypoints_at_the_border(lightglue, pairs):
    data = {**pairs[0], "keypoints0": pairs[0]["keypoints0"].clone()}
    data["keypoints0"][0, :2] = torch.tensor([[-0.4, 3], [319.49, 240.2]])
    assert inside_image(data, "0").min() >= 0
    assert lightglue.match_adaptively(data)["matches0"].shape[1] == data["keypoints0"].shape[1]
    np.testing.assert_array_equal(LightGlueState(lightglue.network, data).indices0,
                                  torch.arange(data["keypoints0"].shape[1]))


def test_weights_of_disk_have_older_names(pairs):
    network = LightGlue("disk")
    assert network(pairs[0])["matches0"].shape == (1, pairs[0]["keypoints0"].shape[1])


@pytest.mark.parametrize("state", [SuperPoint().state_dict(), build_matcher("imp", n_layers=3).state_dict()])
def test_weights_of_another_network(tmp_path, lightglue, state):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not fit this network"):
        LightGlue("aliked", tmp_path / "other.pth")


def test_weights_of_another_feature(lightglue):
    with pytest.raises(InputError, match="input_proj"):
        LightGlue("spp", find_pretrained("aliked_lightglue.pth"))


# commands

@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    kornia_extractor("aliked")
    return make_scene(tmp_path_factory.mktemp("scene"))


def command(scene, save_path, *options):
    return [*options, "--pairs", str(scene / "pairs.txt"), "--image_dir", str(scene / "images"), "--save_path",
            str(save_path), "--device", "cpu", "--max_keypoints", "400", "--estimator", "poselib", "--threshold", "1",
            "--pictures", "1"]


def test_evaluation(scene, tmp_path):
    assert eval_imp.main(command(scene, tmp_path, "--matching_method", "LightGlue", "LightGlue_adaptive",
                                 "--use_iterative", "--feature_weights", str(find_pretrained("aliked-n16.pth")))) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    methods = results["tables"][0]["methods"]
    assert list(methods) == ["LightGlue", "LightGlue iterative", "LightGlue_adaptive"]
    assert min(numbers["auc"]["20"] for numbers in methods.values()) > 0.8
    assert methods["LightGlue"]["iterations"] == 9
    assert methods["LightGlue iterative"]["iterations"] < 9 and methods["LightGlue_adaptive"]["iterations"] < 9
    assert {entry["path"] for entry in results["weights"].values()} == {str(find_pretrained("aliked_lightglue.pth"))}
    assert results["settings"]["feature_type"] == "aliked"


def test_when_the_loop_looks(scene, tmp_path):
    looks = command(scene, tmp_path, "--matching_method", "LightGlue", "--use_iterative", "--schedule", "5", "2",
                    "--same_pose", "0", "--no_pruning")
    assert eval_imp.main(looks) == 0
    methods = json.loads((tmp_path / "results.json").read_text())["tables"][0]["methods"]
    # without an end by the pose, LightGlue's own decides
    assert methods["LightGlue iterative"]["by_iteration"][0]["iterations"] == 5
    assert methods["LightGlue iterative"]["stopped_early"] == 0
    assert methods["LightGlue iterative"]["keypoints_kept"] == 400


def test_each_method_has_its_features(scene, tmp_path, capsys):
    both = ["--matching_method", "LightGlue", "IMP"]
    assert run(eval_imp.main, command(scene, tmp_path, *both)) == 2
    assert capsys.readouterr().err == "error: name --feature_type: LightGlue takes aliked, IMP takes spp by default\n"
    assert run(eval_imp.main, command(scene, tmp_path, *both, "--feature_type", "sift")) == 2
    assert "LightGlue takes the features aliked, disk, spp, not sift" in capsys.readouterr().err
    shortened = ["--matching_method", "LightGlue_adaptive", "--n_layers", "3"]
    assert run(eval_imp.main, command(scene, tmp_path, *shortened)) == 2
    assert "--n_layers does not go with LightGlue_adaptive" in capsys.readouterr().err


def test_images_of_ones_own(scene):
    matcher = ImageMatcher("LightGlue", device="cpu", max_keypoints=400)
    assert matcher.settings["feature_type"] == "aliked"
    found = matcher(scene / "images" / NAMES[0], scene / "images" / NAMES[1], CAMERAS[0], CAMERAS[1])
    truth = relative_pose(POSES[0], POSES[1])
    assert found.stopped_early and found.n_iterations < found.n_layers == 9
    assert max(pose_error(truth, found.R, found.t)) < 5
    array = np.repeat(read_image(scene / "images" / NAMES[0])[:, :, None], 3, axis=2)
    assert len(matcher.load(array[:, :, 0]).keypoints) == len(matcher.load(array).keypoints)
    assert found.draw().ndim == 3
    # LightGlue finds what looks alike: more of it agrees by chance the more keypoints there are
    views = [replace(view, keypoints=np.zeros((n, 2), np.float32))
             for view, n in ((found.view0, 1500), (found.view1, 900))]
    for n_inliers, verdict in ((53, "doubtful"), (54, "trusted")):
        few = replace(found, stopped_early=False, view0=views[0], view1=views[1],
                      inliers=np.arange(len(found.matches)) < n_inliers)
        assert few.verdict == verdict
