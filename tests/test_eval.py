"""Pair sets, matchers and the evaluation command, on images of two textured planes with exact poses."""
import csv
import json

import cv2
import h5py
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from eval import eval_imp
from eval.eval_imp import Outcome, evaluate, match_one_shot, score_pair, to_data, true_correspondences
from eval.matchers import MATCHERS, MatcherSettings
from eval.pair_sets import Hdf5PairSet, ListPairSet, upright_images
from eval.report import PairResult, format_table, summarize
from nets import build_matcher
from tools.checkpoint import save_checkpoint
from tools.cli import InputError, run
from tools.features import Features, Sift
from tools.files import read_image, write_depth, write_image
from tools.geometry import essential_matrix, make_pose, relative_pose
from tools.pair_list import Pair, write_pair_list

NAMES = ["a.png", "sub/b.png", "c.png"]
SIZES = [(320, 240), (400, 300), (320, 240)]
CAMERAS = [np.array([[f, 0, (w - 1) / 2], [0, f * 1.02, (h - 1) / 2], [0, 0, 1]])
           for f, (w, h) in zip((300.0, 420.0, 300.0), SIZES)]
POSES = [make_pose(Rotation.from_rotvec(turn, degrees=True).as_matrix(), t)
         for turn, t in (([0, 0, 0], [0, 0, 0]), ([2, 9, 4], [-0.7, 0.05, 0.1]), ([-6, 4, -8], [-0.3, -0.6, 0.2]))]
# two planes z = const, the nearer one in front of a part of the other
PLANES = [(5.0, (-6, 6, -5, 5)), (3.0, (-0.2, 1.6, -1.2, 1.4))]
TEXELS = 110  # per unit of length


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small lose more by threads that wait for each other than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def texture(rng, width, height):
    """Blobs of all sizes, uint8."""
    image = np.full((height, width), 128, np.uint8)
    for _ in range(width * height // 250):
        x, y, radius, value = rng.integers(0, [width, height, 14, 256])
        cv2.circle(image, (int(x), int(y)), int(3 + radius), int(value), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), 1.0)


def render(textures, K, pose, size):
    """Image (H, W) uint8 and depth (H, W) of the planes."""
    w, h = size
    image, depth = np.zeros((h, w), np.uint8), np.zeros((h, w), np.float32)
    rays = np.linalg.inv(K) @ np.stack([*np.mgrid[:h, :w][::-1], np.ones((h, w))]).reshape(3, -1)
    for picture, (z, (left, _, top, _)) in zip(textures, PLANES):
        texel_to_plane = np.array([[1 / TEXELS, 0, left], [0, 1 / TEXELS, top], [0, 0, 1]])
        H = K @ np.c_[pose[:3, :2], pose[:3, 2] * z + pose[:3, 3]] @ texel_to_plane
        covered = cv2.warpPerspective(np.full_like(picture, 255), H, size) > 250
        image[covered] = cv2.warpPerspective(picture, H, size)[covered]
        plane_depth = (z + pose[:3, 2] @ pose[:3, 3]) / (pose[:3, 2] @ rays)
        depth[covered] = plane_depth.reshape(h, w)[covered]
    return image, depth


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """Folder with images/, depths/ and pairs.txt, never written to; all three pairs of the three views."""
    root = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    textures = [texture(rng, round((right - left) * TEXELS), round((bottom - top) * TEXELS))
                for _, (left, right, top, bottom) in PLANES]
    for name, K, pose, size in zip(NAMES, CAMERAS, POSES, SIZES):
        image, depth = render(textures, K, pose, size)
        write_image(root / "images" / name, image)
        write_depth((root / "depths" / name).with_suffix(".h5"), depth)
    write_pair_list(root / "pairs.txt", [make_pair(0, 1), make_pair(1, 2), make_pair(0, 2)])
    return root


def make_pair(i, j):
    return Pair(NAMES[i], NAMES[j], 0, 0, CAMERAS[i], CAMERAS[j], relative_pose(POSES[i], POSES[j]))


def evaluate_command(scene, save_path, *options):
    return ["--matching_method", "NN_ratio", "--pairs", str(scene / "pairs.txt"), "--image_dir", str(scene / "images"),
            "--feature_type", "sift", "--max_keypoints", "400", "--save_path", str(save_path), "--device", "cpu",
            *map(str, options)]


def list_set(scene, pairs, **options):
    return ListPairSet(pairs, scene / "images", Sift(400, 1e-5), **options)


def mean_error(pair_set, **options):
    results, skipped = evaluate(pair_set, {"NN_ratio": MATCHERS["NN_ratio"](MatcherSettings())}, 1.0, **options)
    assert not skipped
    return np.mean([row.error for row in results["NN_ratio"]])


def write_hdf5(path, pair_set, sizes=True, text=None, depth=True, numbers=(0, 1)):
    """The evaluation dump's format, from another set."""
    with h5py.File(path, "w") as file:
        for i, pair in zip(numbers, (pair_set[i] for i in range(len(pair_set)))):
            views = (("1", pair.features0, pair.K0, pair.depth0), ("2", pair.features1, pair.K1, pair.depth1))
            for view, features, K, at_keypoints in views:
                name = pair.names[int(view) - 1]
                file[f"img_path{view}/{i}"] = text(name) if text else name
                file[f"K{view}/{i}"] = K
                file[f"kpt{view}/{i}"] = np.c_[features.keypoints, features.scores]
                file[f"desc{view}/{i}"] = features.descriptors.astype(np.float16)
                if sizes:
                    file[f"size{view}/{i}"] = features.image_size
                if depth:
                    file[f"depth{view}/{i}"] = at_keypoints
            file[f"R/{i}"], file[f"T/{i}"] = pair.T_0to1[:3, :3], pair.T_0to1[:3, 3:]
            file[f"e/{i}"] = file[f"f/{i}"] = essential_matrix(pair.T_0to1)


# the whole way

def test_command_measures_the_poses_of_a_pair_list(scene, tmp_path, capsys):
    command = evaluate_command(scene, tmp_path, "--depth_dir", scene / "depths", "--pictures", 2, "--threshold", 1,
                               "--unique_locations")
    command.insert(1, "NN")
    (tmp_path / "pairs_middle1.png").write_text("of an earlier run with more pictures")
    assert run(eval_imp.main, command) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:6:2] == ["method", "[95%]", "[95%]"] and "prec*@" in table[0]
    assert [line.split()[0] for line in table[1:3]] == ["NN", "NN_ratio"]
    assert len({len(line) for line in table[:3]}) == 1  # aligned

    results = json.loads((tmp_path / "results.json").read_text())
    numbers = results["methods"]["NN_ratio"]
    assert numbers["auc"]["5"] > 0.7 and numbers["auc"]["20"] > 0.9
    assert numbers["auc_interval"]["5"][0] <= numbers["auc"]["5"] <= numbers["auc_interval"]["5"][1]
    assert numbers["precision"] > 0.85 and numbers["matches"] > 50 and 0.1 < numbers["matching_score"] < 1
    assert results["settings"]["threshold"] == 1 and results["versions"]["numpy"] == np.__version__
    depth = {method: results["methods"][method]["against_depth"] for method in ("NN", "NN_ratio")}
    assert depth["NN_ratio"]["precision"] > depth["NN"]["precision"] + 0.02 > 0.8
    assert depth["NN"]["recall"] > depth["NN_ratio"]["recall"] > 0.4
    assert depth["NN_ratio"]["baseline_recall"] == depth["NN"]["recall"]
    assert depth["NN"]["precision_at_baseline_recall"] == pytest.approx(depth["NN"]["precision"], abs=0.05)

    with open(tmp_path / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["method"] for row in rows} == {"NN", "NN_ratio"}
    assert rows[0]["image1"] == NAMES[1] and float(rows[-1]["error"]) < 5
    for name in ("pairs_easy.png", "pairs_hard.png"):
        height, width = read_image(tmp_path / name).shape
        assert 640 < width < 760 and 2 * 240 < height < 2 * 400  # two methods below each other
    assert min(read_image(tmp_path / "pose_recall.png").shape) > 200
    assert not (tmp_path / "pairs_middle1.png").exists()


def test_two_runs_give_the_same_numbers(scene, tmp_path):
    written = []
    for name in ("first", "second"):
        options = ["--depth_dir", scene / "depths", "--pictures", 0]
        assert run(eval_imp.main, evaluate_command(scene, tmp_path / name, *options)) == 0
        methods = json.loads((tmp_path / name / "results.json").read_text())["methods"]
        del methods["NN_ratio"]["ms"]
        written.append(methods)
    assert written[0] == written[1]


def test_a_bad_pair_is_skipped_and_said(scene, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in NAMES[::2]:
        (tmp_path / name).write_bytes((scene / "images" / name).read_bytes())
    broken, missing = make_pair(0, 2), make_pair(0, 2)
    broken.image1, missing.image0 = "broken.png", "missing.png"
    write_pair_list(tmp_path / "list.txt", [broken, make_pair(0, 2), missing])
    command = evaluate_command(scene, tmp_path / "out", "--pictures", 1)
    command[3], command[5] = str(tmp_path / "list.txt"), str(tmp_path)
    assert run(eval_imp.main, command) == 1
    assert "2 pairs skipped" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["methods"]["NN_ratio"]["pairs"] == 1
    assert ["broken.png" in item["reason"] for item in results["skipped"]] == [True, False]

    write_pair_list(tmp_path / "list.txt", [missing])
    assert run(eval_imp.main, command) == 2
    assert "missing.png" in capsys.readouterr().err


def test_pairs_without_truth_are_matched_but_not_scored(scene, tmp_path):
    without_pose, without_K = make_pair(0, 1), Pair(NAMES[0], NAMES[2])
    without_pose.T_0to1 = None
    write_pair_list(tmp_path / "list.txt", [without_K, without_pose])
    command = evaluate_command(scene, tmp_path / "out", "--pictures", 2)
    command[3] = str(tmp_path / "list.txt")
    assert run(eval_imp.main, command) == 0
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["NN_ratio"]
    assert "auc" not in numbers and numbers["precision"] is None and numbers["matches"] > 50
    assert (tmp_path / "out" / "pairs_easy.png").exists()


def test_limit_takes_pairs_from_all_over_the_set(scene):
    pair_set = list_set(scene, [make_pair(0, 1), make_pair(0, 1), make_pair(1, 2), make_pair(0, 2), make_pair(0, 2)])
    results, _ = evaluate(pair_set, {"NN": MATCHERS["NN"](MatcherSettings())}, 1.0, limit=3)
    assert [row.index for row in results["NN"]] == [0, 2, 4]


@pytest.mark.parametrize("options, message", [
    (["--image_dir", "nowhere"], "nowhere"),
    (["--pairs", "nowhere.txt"], "nowhere.txt"),
    (["--depth_dir", "nowhere"], "a.h5"),
    (["--matching_method", "IMP", "--weights", "nowhere.pth"], "nowhere.pth"),
    (["--matching_method", "IMP", "EIMP", "--weights", "one.pth"], "--weights"),
])
def test_bad_input_is_one_line_that_names_it(scene, tmp_path, capsys, options, message):
    assert run(eval_imp.main, [*evaluate_command(scene, tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_features_say_which_command_makes_them(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("{dataset: yfcc, feature_type: sift, output: no.hdf5, raw_data_dir: raw}")
    command = ["--matching_method", "NN", "--dataset", "yfcc", "--feature_type", "sift",
               "--config", str(tmp_path / "my.yaml")]
    assert run(eval_imp.main, command) == 2
    assert f"python3 -m dump.dump --config {tmp_path / 'my.yaml'}" in capsys.readouterr().err
    command[3] = "scannet"
    assert run(eval_imp.main, command) == 2
    assert "yfcc, not scannet" in capsys.readouterr().err


# pair sets

def test_keypoints_of_resized_images_are_in_pixels_of_the_original(scene):
    pair = list_set(scene, [make_pair(0, 1)], resize=(480, 240))[0]
    assert pair.features1.image_size == SIZES[1]
    assert pair.features1.keypoints.max(axis=0) == pytest.approx(SIZES[1], rel=0.1)
    assert mean_error(list_set(scene, [make_pair(0, 1)], resize=(480, 360))) < 3
    assert mean_error(list_set(scene, [make_pair(0, 1)], resize=(400,))) < 3


def stored_sideways(pair, scene, folder):
    """The pair with view 1 stored turned clockwise, so that one turn counter-clockwise makes it upright."""
    image = read_image(scene / "images" / pair.image1)
    h = image.shape[0]
    write_image(folder / "images" / "turned.png", np.ascontiguousarray(np.rot90(image, -1)))
    write_image(folder / "images" / pair.image0, read_image(scene / "images" / pair.image0))
    for name in ("turned", "a"):
        with h5py.File(scene / "depths" / ("a.h5" if name == "a" else "sub/b.h5")) as file:
            depth = file["depth"][()]
        write_depth(folder / "depths" / f"{name}.h5", depth if name == "a" else np.rot90(depth, -1))
    # upright pixel (x, y) is stored at (h - 1 - y, x), so the stored camera's x axis is minus the upright one's y axis
    K = pair.K1
    K_stored = np.array([[K[1, 1], 0, h - 1 - K[1, 2]], [0, K[0, 0], K[0, 2]], [0, 0, 1]])
    turn = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return Pair(pair.image0, "turned.png", 0, 1, pair.K0, K_stored, turn @ pair.T_0to1)


@pytest.mark.parametrize("resize", [None, (300, 400)])
def test_an_image_stored_sideways_gives_the_same_pose_after_its_turn(scene, tmp_path, resize):
    upright = make_pair(0, 1)
    turned = stored_sideways(upright, scene, tmp_path)
    pair_set = ListPairSet([turned], tmp_path / "images", Sift(400, 1e-5), resize, tmp_path / "depths")
    pair, expected = pair_set[0], list_set(scene, [upright], depth_dir=scene / "depths")[0]
    np.testing.assert_allclose(pair.K1, expected.K1)
    np.testing.assert_allclose(pair.T_0to1, expected.T_0to1, atol=1e-12)
    assert pair.features1.image_size == expected.features1.image_size
    if resize is None:
        np.testing.assert_allclose(pair.features1.keypoints, expected.features1.keypoints, atol=1e-3)
        # floor of a coordinate picks another pixel after a turn, so depth differs at the planes' borders only
        assert np.mean(np.abs(pair.depth1 - expected.depth1) < 0.05) > 0.9
    assert mean_error(pair_set) < 3
    np.testing.assert_array_equal(upright_images(pair)[1][:, :, 0], read_image(scene / "images" / upright.image1))
    true0 = true_correspondences(pair)
    assert np.sum(true0 >= 0) > 0.8 * np.sum(true_correspondences(expected) >= 0) > 80


def test_depth_of_another_size_than_its_image_is_refused(scene, tmp_path):
    write_depth(tmp_path / "a.h5", np.ones((24, 32)))
    with pytest.raises(InputError, match="32x24, its image 320x240"):
        list_set(scene, [make_pair(0, 2)], depth_dir=tmp_path)[0]


def test_features_of_an_image_are_extracted_once(scene):
    calls = []
    sift = Sift(50)

    def counting(image):
        calls.append(image.shape)
        return sift(image)

    pair_set = ListPairSet([make_pair(0, 1), make_pair(0, 2), make_pair(1, 2)], scene / "images", counting)
    for i in range(3):
        pair_set[i]
    assert len(calls) == 3


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("text", [None, np.bytes_, lambda name: [name.encode()]])
def test_hdf5_files_of_any_writer_read_the_same(scene, tmp_path, sizes, text):
    listed = list_set(scene, [make_pair(0, 1), make_pair(1, 2)], depth_dir=scene / "depths")
    write_hdf5(tmp_path / "pairs.hdf5", listed, sizes, text, numbers=(2, 10))
    stored = Hdf5PairSet(tmp_path / "pairs.hdf5", scene / "images")
    assert len(stored) == 2 and stored.descriptor_dim == 128 and stored.name(1) == "pair 10"
    for i in range(2):
        pair, expected = stored[i], listed[i]
        assert pair.names == expected.names and pair.image_paths == expected.image_paths
        np.testing.assert_allclose(pair.T_0to1, expected.T_0to1)
        for mine, theirs in ((pair.features0, expected.features0), (pair.features1, expected.features1)):
            assert mine.image_size == theirs.image_size and mine.descriptors.dtype == np.float32
            np.testing.assert_allclose(mine.keypoints, theirs.keypoints)
            np.testing.assert_allclose(mine.scores, theirs.scores)
        np.testing.assert_allclose(pair.depth1, expected.depth1)


def test_hdf5_pairs_without_depth_are_scored_by_pose_only(scene, tmp_path):
    listed = list_set(scene, [make_pair(0, 1)], depth_dir=scene / "depths")
    write_hdf5(tmp_path / "pairs.hdf5", listed, depth=False)
    results, _ = evaluate(Hdf5PairSet(tmp_path / "pairs.hdf5", scene / "images"),
                          {"NN_ratio": MATCHERS["NN_ratio"](MatcherSettings())}, 1.0)
    assert results["NN_ratio"][0].error < 3 and results["NN_ratio"][0].n_true is None


def test_damaged_hdf5_files_are_named(scene, tmp_path, capsys):
    path = tmp_path / "pairs.hdf5"
    write_hdf5(path, list_set(scene, [make_pair(0, 1), make_pair(0, 2)], depth_dir=scene / "depths"))
    with h5py.File(path, "a") as file:
        del file["desc2/1"]
        file["desc2/1"] = np.zeros((3, 128))
    command = ["--matching_method", "NN", "--dataset", "yfcc", "--feature_type", "sift", "--hdf5", str(path),
               "--image_dir", str(scene / "images"), "--save_path", str(tmp_path / "out"), "--pictures", "0"]
    assert run(eval_imp.main, command) == 1
    assert "pair 1" in capsys.readouterr().err
    command[5] = "spp"
    assert run(eval_imp.main, command) == 2
    assert "128" in capsys.readouterr().err
    with h5py.File(path, "a") as file:
        del file["desc2"]
    assert run(eval_imp.main, command) == 2
    assert "desc2" in capsys.readouterr().err
    path.write_bytes(b"no hdf5")
    assert run(eval_imp.main, command) == 2


# matchers

def as_data(descriptors0, descriptors1):
    def unit(values):
        values = torch.tensor(values, dtype=torch.float32)
        return (values / values.norm(dim=1, keepdim=True))[None]
    return {"descriptors0": unit(descriptors0), "descriptors1": unit(descriptors1)}


def test_nearest_neighbours_are_mutual():
    # both of view 0 prefer the first of view 1, which prefers the second of view 0
    data = as_data([[1, 0.3], [1, 0.1], [0, 1]], [[1, 0], [-1, 0.5]])
    out = MATCHERS["NN"](MatcherSettings())(data)
    assert out["matches0"].tolist() == [-1, 0, 1]
    scores = out["matching_scores0"]
    assert scores[0] == 0 and 1 > scores[1] > scores[2] > 0


def test_ratio_test_scores_by_how_much_nearer_the_nearest_is():
    angles1 = np.radians([0, 10, 90])
    angles0 = np.radians([2, 88])
    data = as_data(np.c_[np.cos(angles0), np.sin(angles0)], np.c_[np.cos(angles1), np.sin(angles1)])
    matcher = MATCHERS["NN_ratio"](MatcherSettings(ratio=0.7))
    out = matcher(data)
    assert out["matches0"].tolist() == [0, 2]
    chord = lambda degrees: np.sin(np.radians(degrees) / 2)  # noqa: E731
    np.testing.assert_allclose(out["matching_scores0"], [1 - chord(2) / chord(8), 1 - chord(2) / chord(78)], atol=1e-4)
    assert matcher.threshold == pytest.approx(0.3)


def test_ratio_test_trusts_neither_twins_nor_a_lonely_descriptor():
    matcher = MATCHERS["NN_ratio"](MatcherSettings())
    assert matcher(as_data([[1, 0]], [[1, 0], [1, 0]]))["matching_scores0"].tolist() == [0]
    assert matcher(as_data([[1, 0]], [[1, 0]]))["matching_scores0"].tolist() == [0]


@pytest.mark.parametrize("method, network", [("IMP", "imp"), ("EIMP_geo", "eimp"), ("GM", "gm")])
def test_networks_are_evaluated_with_the_weights_named(scene, tmp_path, method, network):
    torch.manual_seed(0)
    net = build_matcher(network, descriptor_dim=128, n_layers=5)
    save_checkpoint(tmp_path / "net.pth", {"model": net.state_dict()})
    data = to_data(ListPairSet([make_pair(0, 1)], scene / "images", Sift(120))[0])
    net.eval().match_threshold = 0.0
    expected = net(data)
    scores = expected["matching_scores0"][0].detach()
    threshold = float(scores[scores > 0].median())
    matcher = MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), match_threshold=threshold))
    out = matcher(data)
    np.testing.assert_array_equal(out["matches0"], expected["matches0"][0])
    np.testing.assert_allclose(out["matching_scores0"], scores)
    outcome = match_one_shot(matcher, data, lambda matches: None)
    assert 0 < outcome.used.sum() == (scores > threshold).sum() < len(outcome.used)

    fewer = MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), n_layers=2))(data)
    first_two, _ = net.match_all_iterations(data, threshold=0.0, n_layers=2)
    np.testing.assert_array_equal(fewer["matches0"], first_two[-1, 0])
    with pytest.raises(InputError, match="n_layers 6"):
        MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), n_layers=6))
    with pytest.raises(InputError, match="128"):
        MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), feature_type="spp"))


def test_dual_softmax_reaches_the_network(tmp_path):
    save_checkpoint(tmp_path / "net.pth", {"model": build_matcher("imp", descriptor_dim=128, n_layers=2).state_dict()})
    for dual in (False, True):
        matcher = MATCHERS["IMP"](MatcherSettings(weights=str(tmp_path / "net.pth"), use_dual_softmax=dual))
        assert matcher.network.with_sinkhorn is not dual


def test_a_matcher_of_ones_own_is_ten_lines(scene, tmp_path, monkeypatch):
    """The example in eval.matchers, run as it stands there."""
    from eval import matchers
    example = matchers.__doc__.split("    import sys\n", 1)[1]
    example = "\n".join(line.removeprefix("    ") for line in ("    import sys\n" + example).splitlines())
    monkeypatch.setattr(matchers, "MATCHERS", dict(MATCHERS))
    monkeypatch.setattr(eval_imp, "MATCHERS", matchers.MATCHERS)
    command = []
    monkeypatch.setattr(eval_imp, "main", lambda argv: command.extend(argv))
    with pytest.raises(SystemExit):
        exec(example, {})
    assert command[:3] == ["--matching_method", "NN_ratio", "mine"]
    results, _ = evaluate(list_set(scene, [make_pair(0, 1)]), {"mine": matchers.MATCHERS["mine"](None)}, 1.0)
    assert len(results["mine"][0].matches) == 400


# what is reported of a pair

def test_a_view_without_keypoints_counts_as_a_failure(scene):
    pair = list_set(scene, [make_pair(0, 1)], depth_dir=scene / "depths")[0]
    pair.features1 = Features(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, 128), np.float32),
                              pair.features1.image_size)
    pair.depth1 = np.zeros(0, np.float32)
    for method in ("NN", "NN_ratio"):
        outcome = match_one_shot(MATCHERS[method](MatcherSettings()), to_data(pair), lambda matches: None)
        result = score_pair(pair, outcome, true_correspondences(pair), 0.0)
        assert result.error == np.inf and result.precision == 0 and result.n_true == 0 and len(result.matches) == 0


def test_matches_are_judged_by_depth_only_where_both_ends_have_it(scene):
    pair = list_set(scene, [make_pair(0, 1)], depth_dir=scene / "depths")[0]
    true0 = true_correspondences(pair)
    right = np.flatnonzero(true0 >= 0)
    assert len(right) > 80
    # three right matches, one of them below the threshold, a wrong one, and one whose first keypoint has no depth
    matches = np.c_[right[:5], true0[right[:5]]]
    matches[3, 1] = true0[right[10]]
    pair.depth0[matches[4, 0]] = 0
    outcome = Outcome(matches, np.array([0.9, 0.8, 0.1, 0.7, 0.6]), np.array([1, 1, 0, 1, 1], bool), None,
                      {"matching": 0.0, "pose": 0.0})
    result = score_pair(pair, outcome, true0, 0.0)
    assert (result.n_used, result.n_correct, result.n_true) == (3, 2, len(right))
    assert result.scores.tolist() == [0.9, 0.8, 0.1, 0.7] and result.correct.tolist() == [True, True, True, False]
    # epipolar precision knows no depth: of the four used, the three right ones at least
    assert result.precision in (0.75, 1.0) and result.matching_score == 4 * result.precision / 400


def row(error, n_matches, scores=(), correct=(), n_true=None, n_used=None, n_correct=None):
    return PairResult(0, ("a", "b"), 100, 100, np.zeros((n_matches, 2), int), np.zeros(n_matches),
                      np.ones(n_matches, bool), {"features": 0.004, "matching": 0.002, "pose": 0.001}, error, 0.0, None,
                      0.5, 0.25, np.array(scores), np.array(correct, bool), n_true, n_used, n_correct)


def test_summary_compares_at_the_recall_of_the_first_method():
    baseline = [row(1.0, 10, [0.9, 0.5], [True, False], 4, 2, 1), row(np.inf, 20, [0.6], [True], 4, 1, 1)]
    other = [row(2.0, 6, [0.9, 0.8, 0.2], [True, True, False], 4, 1, 1), row(3.0, 8, [0.85], [False], 4, 0, 0)]
    summary = summarize({"base": baseline, "other": other}, seed=0)
    base, other = summary["base"], summary["other"]
    assert base["matches"] == 15 and base["pose_found"] == 0.5 and base["ms"]["features"] == pytest.approx(4)
    assert base["auc"]["5"] == pytest.approx((0.5 * 1 / 2 + 0.5 * 4) / 5)
    assert base["against_depth"]["recall"] == other["against_depth"]["baseline_recall"] == 0.25
    assert base["against_depth"]["precision"] == pytest.approx(2 / 3)
    # 2 of 8 are found at score 0.8: two right, one wrong
    assert other["against_depth"]["precision_at_baseline_recall"] == pytest.approx(2 / 3)
    table = format_table(summary).splitlines()
    assert "prec*@25.0" in table[0] and len(table) == 4 and "66.7" in table[2]
