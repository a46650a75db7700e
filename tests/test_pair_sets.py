"""Sets of pairs: lists, MegaDepth-1500, ScanNet's folders and HDF5 files give the same keypoints, cameras and poses."""
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from eval_scene import CAMERAS, NAMES, POSES, SIZES, list_set, make_pair, make_scene, write_hdf5

from eval import eval_imp
from eval.methods import MATCHERS, MatcherSettings, Method, PoseSetting
from eval.pair_sets import Hdf5PairSet, ListPairSet, read_scannet_pairs, upright_images
from eval.results import true_correspondences
from eval.run import evaluate
from tools.cli import InputError, run
from tools.features import Sift
from tools.files import read_image, write_depth, write_image
from tools.geometry import opencv_to_colmap_K, relative_pose
from tools.pair_list import Pair, read_pair_list
from tools.scannet import read_scannet_camera
from tools.scene_info import read_megadepth1500

LISTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "lists"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Folder with images/, depths/ and pairs.txt, never written to; all three pairs of the three views."""
    return make_scene(tmp_path_factory.mktemp("scene"))


def match_all(pair_set):
    """Results of NN_ratio on every pair."""
    setting = PoseSetting("magsac", 1.0)
    results, skipped = evaluate(pair_set, {"NN_ratio": Method(MATCHERS["NN_ratio"](MatcherSettings()))}, [setting])
    assert not skipped
    return results[setting]["NN_ratio"]


def mean_error(pair_set):
    return np.mean([row.error for row in match_all(pair_set)])


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


# MegaDepth-1500

def write_pair_infos(path, pairs):
    """A file of MegaDepth-1500's layout: one pickled dict, whatever its name says; K in COLMAP's convention."""
    def objects(values):
        array = np.empty(len(values), object)
        array[:] = values
        return array

    names = [None, *(f"images/{name}" for name in NAMES)]  # not all images of a scene are there
    info = {"image_paths": objects(names), "depth_paths": objects(names),
            "intrinsics": objects([None, *map(opencv_to_colmap_K, CAMERAS)]), "poses": objects([None, *POSES]),
            "pair_infos": [(np.array(pair) + 1, 0.2, np.zeros(4)) for pair in pairs]}
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(info))


def test_megadepth1500_is_read_file_by_file(scene, tmp_path):
    write_pair_infos(tmp_path / "0022_0.5_0.7.npz", [(0, 2)])
    write_pair_infos(tmp_path / "0015_0.1_0.3.npz", [(0, 1), (2, 1)])
    pairs = read_megadepth1500(tmp_path)
    assert [(pair.image0, pair.image1) for pair in pairs] == [
        (f"images/{NAMES[i]}", f"images/{NAMES[j]}") for i, j in ((0, 1), (2, 1), (0, 2))]
    np.testing.assert_allclose(pairs[1].K0, CAMERAS[2])
    np.testing.assert_allclose(pairs[1].K1, CAMERAS[1])
    np.testing.assert_allclose(pairs[1].T_0to1, relative_pose(POSES[2], POSES[1]))
    assert mean_error(ListPairSet(pairs[::2], scene, Sift(400, 1e-5))) < 3


def test_files_that_are_not_megadepth1500s_are_named(tmp_path):
    with pytest.raises(InputError, match=r"expected 0015_0\.1_0\.3\.npz"):
        read_megadepth1500(tmp_path)
    (tmp_path / "0015_0.1_0.3.npz").write_bytes(pickle.dumps({"image_paths": []}))
    with pytest.raises(InputError, match=r"not a file of MegaDepth-1500: .*pair_infos"):
        read_megadepth1500(tmp_path)


def test_a_bad_pair_of_megadepth1500_is_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "0015_0.1_0.3.npz"
    write_pair_infos(path, [(0, 1), (2, 1), (-1, 1), (0, 7)])  # the first image is None, and 7 is not there
    assert len(read_megadepth1500(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"note: {path}: 2 pairs are left out; the first: ")
    write_pair_infos(path, [(0, 7)])
    with pytest.raises(InputError, match="no pair of MegaDepth-1500 that can be used: "):
        read_megadepth1500(tmp_path)


@pytest.mark.skipif(not LISTS.is_dir(), reason="the public lists are not here")
def test_the_public_megadepth1500():
    pairs = read_megadepth1500(LISTS / "megadepth1500")
    assert len(pairs) == 1500
    assert {pair.image0.split("/")[1] for pair in pairs} == {"0015", "0022"}
    np.testing.assert_allclose(pairs[0].K0[:2, 2], (799.5, 498.5))
    for pair in pairs:
        R = pair.T_0to1[:3, :3]
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-6)
        assert np.isfinite(pair.T_0to1).all() and 100 < pair.K1[0, 0] < 1e5


@pytest.mark.skipif(not LISTS.is_dir(), reason="the public lists are not here")
def test_the_public_lists_of_yfcc_and_scannet():
    yfcc = read_pair_list(LISTS / "yfcc_test_pairs_with_gt.txt")
    assert len(yfcc) == 4000 and {pair.rot0 for pair in yfcc} > {0, 1}
    scannet = read_scannet_pairs(LISTS / "scannet_test_pairs_with_gt.txt")
    assert len(scannet) == 1500 and scannet[0].image0 == "scene0707_00/img/15.jpg"


# ScanNet's folders

@pytest.fixture(scope="module")
def scannet(scene, tmp_path_factory):
    """The folder of scenes; pairs.txt beside them, by both kinds of names; the last image lacks its pose."""
    root = tmp_path_factory.mktemp("scannet")
    for number, name, K, pose in zip((15, 585, 7), NAMES, CAMERAS, POSES):
        folder = root / "scene0707_00"
        write_image(folder / "img" / f"{number}.jpg", read_image(scene / "images" / name), quality=100)
        for kind, matrix in (("intrinsic", K), ("extrinsic", np.linalg.inv(pose))):
            (folder / kind).mkdir(exist_ok=True)
            np.savetxt(folder / kind / f"{number}.txt", matrix)
    (root / "scene0707_00" / "extrinsic" / "7.txt").write_text("-inf " * 16)
    # with ground truth for images of another size, as the public list has it
    other = " ".join(map(str, [*np.ravel([CAMERAS[0] * [[4], [4], [1]]] * 2), *np.eye(4).ravel()]))
    (root / "pairs.txt").write_text(
        "scans_test/scene0707_00/sens/frame-000015.color.jpg scans_test/scene0707_00/sens/frame-000585.color.jpg 0 0 "
        f"{other}\nscene0707_00/img/15.jpg scene0707_00/img/7.jpg\nscene0707_00/img/15.jpg scene0707_00/img/8.jpg\n")
    return root


def test_scannet_folders_are_read_by_the_names_of_its_list(scannet):
    pairs = read_scannet_pairs(scannet / "pairs.txt")
    pair_set = ListPairSet(pairs, scannet, Sift(400, 1e-5), camera=lambda name: read_scannet_camera(scannet, name))
    pair = pair_set[0]
    assert pair.names == ("scene0707_00/img/15.jpg", "scene0707_00/img/585.jpg")
    np.testing.assert_allclose(pair.K1, CAMERAS[1])
    np.testing.assert_allclose(pair.T_0to1, relative_pose(POSES[0], POSES[1]), atol=1e-12)
    for i, message in ((1, "extrinsic/7.txt"), (2, "intrinsic/8.txt")):
        with pytest.raises(InputError, match=message):
            pair_set[i]


def test_scannet_folders_on_the_command_line(scannet, tmp_path, capsys):
    command = ["--matching_method", "NN_ratio", "--dataset", "scannet", "--pairs", str(scannet / "pairs.txt"),
               "--image_dir", str(scannet), "--feature_type", "sift", "--max_keypoints", "400", "--device", "cpu",
               "--save_path", str(tmp_path), "--pictures", "0"]
    assert run(eval_imp.main, command) == 1
    out = capsys.readouterr()
    assert out.out.startswith("magsac at 3 px") and "2 pairs skipped" in out.err
    with open(tmp_path / "pairs.csv") as file:
        assert float(file.read().splitlines()[1].split(",")[6]) < 5


# HDF5 files

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
    (result,) = match_all(Hdf5PairSet(tmp_path / "pairs.hdf5", scene / "images"))
    assert result.error < 3 and result.n_true is None


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
    with h5py.File(path, "a") as file:  # then the pair that is whole is not the first
        for group in ("desc1", "desc2"):
            file.move(f"{group}/0", f"{group}/2")
            del file[f"{group}/1"]
            file.move(f"{group}/2", f"{group}/1")
    assert run(eval_imp.main, command) == 1
    error = capsys.readouterr().err
    assert "1 pairs skipped" in error and "pair 0 of" in error
    command[5] = "spp"
    assert run(eval_imp.main, command) == 2
    assert "128" in capsys.readouterr().err
    with h5py.File(path, "a") as file:
        del file["desc1/1"]
    assert run(eval_imp.main, command) == 2
    assert f"{path} holds no descriptors" in capsys.readouterr().err
    with h5py.File(path, "a") as file:
        del file["desc2"]
    assert run(eval_imp.main, command) == 2
    assert "desc2" in capsys.readouterr().err
    path.write_bytes(b"no hdf5")
    assert run(eval_imp.main, command) == 2


@pytest.fixture(scope="module")
def two_pairs(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("hdf5") / "pairs.hdf5"
    write_hdf5(path, ListPairSet([make_pair(0, 1), make_pair(1, 2)], scene / "images", Sift(60, 1e-5),
                                 depth_dir=scene / "depths"))
    return path


def with_value(index, value):
    def change(values):
        values[index] = value
        return values
    return change


@pytest.mark.parametrize("name, change, said", [
    ("kpt1", with_value((3, 0), np.nan), "keypoints0: not finite"),
    ("kpt2", with_value((3, 2), np.inf), "scores1: not finite"),
    ("kpt2", lambda values: values.astype(np.float64) * 1e60, "keypoints1: not finite"),
    ("kpt1", lambda values: values[:, :2], "kpt1/1 of .* has shape"),
    ("desc2", with_value((0, 5), np.nan), "descriptors1: not finite"),
    ("desc1", lambda values: values[:, :64], r"has shape \(60, 64\), not \(60, 128\)"),
    ("desc1", lambda values: values[:-1], "desc1/1 of .* has shape"),
    ("K1", np.zeros_like, "K0 is not a camera matrix"),
    ("K2", lambda values: np.array([[2.0, 2, 0], [2, 2, 0], [0, 0, 1]]), "K1 is not a camera matrix"),
    ("K2", lambda values: np.eye(2), r"K2/1 has shape \(2, 2\)"),
    ("K2", lambda values: np.full((3, 3), b"1"), "is of type"),
    ("R", np.zeros_like, "the pose is not a rotation"),
    ("R", with_value((0, 0), np.nan), "the pose is not a rotation"),
    ("R", lambda values: -values, "the pose is not a rotation"),
    ("T", with_value(0, np.inf), "the pose is not a rotation"),
    ("size1", np.zeros_like, r"image_size0 is \(0, 0\)"),
    ("size2", lambda values: np.array([np.nan, 300]), r"image_size1 is \(0, 300\)"),
    ("depth1", lambda values: values[:-1], "depth0: of shape"),
    ("depth2", with_value(2, -1), "depth1 is negative"),
    ("img_path1", lambda value: b"../images/a.png", "must lie below"),
    ("img_path2", lambda value: [b"a", b"b"], "img_path2/1 of .* is not one string"),
    ("kpt1", lambda values: h5py.ExternalLink("other.hdf5", "/kpt1/0"), "a link to elsewhere"),
    ("desc2", None, "desc2/1 of .* is missing"),
])
def test_a_pair_that_cannot_be_right_is_refused_alone(scene, two_pairs, tmp_path, name, change, said):
    path = tmp_path / "pairs.hdf5"
    path.write_bytes(two_pairs.read_bytes())
    with h5py.File(path, "a") as file:
        values = file[name]["1"][()]
        del file[name]["1"]
        if change is not None:
            file[name]["1"] = change(values)
    pair_set = Hdf5PairSet(path, scene / "images", 128)
    with pytest.raises(InputError, match=f"^pair 1 of .*pairs.hdf5 cannot be used: .*{said}"):
        pair_set[1]
    assert len(pair_set[0].features0.scores) == 60 and NAMES[0] in pair_set.image_names()


def test_the_first_keypoints_only(scene, two_pairs):
    whole, part = (Hdf5PairSet(two_pairs, scene / "images", max_keypoints=n)[0] for n in (None, 20))
    np.testing.assert_array_equal(part.features1.keypoints, whole.features1.keypoints[:20])
    np.testing.assert_array_equal(part.features0.descriptors, whole.features0.descriptors[:20])
    np.testing.assert_array_equal(part.depth0, whole.depth0[:20])


@pytest.mark.parametrize("spoil, said", [
    (lambda file: file.move("kpt1/1", "kpt1/first"), "are not pair indices"),
    (lambda file: file.move("kpt1/1", "kpt1/01"), "are not pair indices"),
    (lambda file: [file.move("T", "S"), file.__setitem__("T", h5py.ExternalLink("x", "/T"))], "a link to elsewhere"),
    (lambda file: [file.move("T", "S"), file.__setitem__("T", 5)], "lacks the group T"),
    (lambda file: [file["kpt1"].pop(name) for name in "01"], "holds no pairs"),
])
def test_a_bad_file_is_one_line(scene, two_pairs, tmp_path, spoil, said):
    path = tmp_path / "pairs.hdf5"
    path.write_bytes(two_pairs.read_bytes())
    with h5py.File(path, "a") as file:
        spoil(file)
    with pytest.raises(InputError, match=f"pairs.hdf5.*{said}"):
        Hdf5PairSet(path, scene / "images")
