"""HPatches: sequences made here, by known homographies of a textured image."""
import csv
import json
import shutil

import cv2
import numpy as np
import pytest
from eval_scene import texture

from eval import eval_imp
from eval.hpatches import HPatchesPairSet, corner_error, read_homography, reprojection_errors
from tools.cli import InputError, run
from tools.features import Features, Sift
from tools.files import write_image

SIZE = (300, 200)
NONE = np.zeros((0, 2), np.float32)
METHODS = ["NN_ratio", "NN"]
# of the stored images; the larger half of the view stays visible
HOMOGRAPHIES = {"i_light": [np.eye(3)] * 5, "v_wall": [
    np.array([[1 - 0.03 * k, 0.05 * k, 2.0 * k], [-0.04 * k, 1, 3.0 * k], [1e-4 * k, -5e-5 * k, 1]])
    for k in range(1, 6)]}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A folder in HPatches' layout, never written to: one sequence of .ppm, one of .png images."""
    folder = tmp_path_factory.mktemp("hpatches")
    first = cv2.cvtColor(texture(np.random.default_rng(0), *SIZE), cv2.COLOR_GRAY2BGR)
    for (name, homographies), suffix in zip(HOMOGRAPHIES.items(), ("ppm", "png")):
        for k, H in enumerate([np.eye(3), *homographies], start=1):
            image = cv2.warpPerspective(first, H, SIZE)
            if name == "i_light":
                image = cv2.convertScaleAbs(image, alpha=1 - 0.1 * k, beta=5 * k)
            write_image(folder / name / f"{k}.{suffix}", image)
            if k > 1:
                np.savetxt(folder / name / f"H_1_{k}", H)
    return folder


@pytest.fixture
def folder(sequences, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sequences, tmp_path / "sequences")


def command(folder, save_path, *options):
    return ["--matching_method", *METHODS, "--dataset", "hpatches", "--image_dir", str(folder), "--feature_type",
            "sift", "--max_keypoints", "300", "--save_path", str(save_path), "--pictures", "0", *map(str, options)]


def tables(folder):
    """{(estimator, part): {method: numbers}} of a run."""
    return {(table["estimator"], table["part"]): table["methods"]
            for table in json.loads((folder / "results.json").read_text())["tables"]}


def test_pairs_have_the_homography_of_the_resized_images(sequences):
    pair_set = HPatchesPairSet(sequences, Sift(300, 1e-5))
    assert len(pair_set) == 10 and pair_set.name(7) == "v_wall"
    pair = pair_set[7]
    assert pair.names == ("v_wall/1.png", "v_wall/4.png")
    assert pair.features0.image_size == pair.features1.image_size == (720, 480)
    # the centre of a pixel is at whole numbers before and after
    stored = np.array([[37.0, 81.0]])
    H = HOMOGRAPHIES["v_wall"][2]
    mapped = np.c_[stored, 1] @ H.T
    mapped = mapped[:, :2] / mapped[:, 2:]
    errors = reprojection_errors((stored + 0.5) * 2.4 - 0.5, (mapped + 0.5) * 2.4 - 0.5, pair.H_0to1)
    assert errors == pytest.approx(0, abs=1e-9)


def test_errors_of_homographies_are_in_pixels():
    shift = np.array([[1.0, 0, 3], [0, 1, 4], [0, 0, 1]])
    assert corner_error(5 * shift, np.eye(3), (100, 50)) == pytest.approx(5)
    assert corner_error(np.diag([2.0, 1, 1]), np.eye(3), (101, 51)) == pytest.approx(50)
    assert reprojection_errors(np.ones((1, 2)), np.ones((1, 2)), shift) == pytest.approx(5)
    vanishing = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 1]])
    assert reprojection_errors(np.ones((1, 2)), np.ones((1, 2)), vanishing) == np.inf


def test_command_reports_accuracy_and_corner_errors_of_all_parts(sequences, tmp_path, capsys):
    assert run(eval_imp.main, command(sequences, tmp_path / "0", "--estimator", "all", "--pictures", 2)) == 0
    out = capsys.readouterr().out
    assert "poselib at 3 px, viewpoint" in out and "AUC@3 [95%]" in out and "MMA@5" in out
    found = tables(tmp_path / "0")
    assert list(found) == [(name, part) for name in ("magsac", "ransac", "poselib")
                           for part in ("all", "illumination", "viewpoint")]
    for (_, part), methods in found.items():
        ratio, nearest = (methods[name] for name in METHODS)
        assert ratio["pairs"] == (10 if part == "all" else 5)
        accuracy = [ratio["match_accuracy"][str(pixels)] for pixels in range(1, 11)]
        assert accuracy == sorted(accuracy) and accuracy[4] > 0.93
        assert nearest["match_accuracy"]["5"] < accuracy[4]
        assert 0.4 < ratio["auc"]["1"] < ratio["auc"]["3"] < ratio["auc"]["5"] < 1 and ratio["auc"]["5"] > 0.8
    both = [found["magsac", part]["NN"]["match_accuracy"]["3"] for part in ("illumination", "viewpoint")]
    assert found["magsac", "all"]["NN"]["match_accuracy"]["3"] == pytest.approx(np.mean(both))
    assert {path.name for path in (tmp_path / "0").iterdir()} == {
        "results.json", "pairs.csv", "pose_recall.png", "pairs_easy.png", "pairs_hard.png"}
    with open(tmp_path / "0" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and {row["image0"] for row in rows} == {"i_light/1.ppm", "v_wall/1.png"}
    assert 0 < float(rows[0]["error"]) < 3 and float(rows[0]["within_5_px"]) > 0.9

    assert run(eval_imp.main, command(sequences, tmp_path / "1", "--estimator", "all", "--workers", 1)) == 0
    for methods in (found_again := tables(tmp_path / "1")).values():
        for numbers in methods.values():
            numbers.pop("ms")
    assert found_again == {key: {name: {k: v for k, v in numbers.items() if k != "ms"}
                                 for name, numbers in methods.items()} for key, methods in found.items()}


def test_an_interrupted_run_resumes(sequences, tmp_path, monkeypatch):
    calls = []
    score = eval_imp.evaluate.__globals__["score_pair"]

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setitem(eval_imp.evaluate.__globals__, "score_pair", interrupted)
    assert run(eval_imp.main, command(sequences, tmp_path / "out")) == 130
    assert run(eval_imp.main, command(sequences, tmp_path / "out")) == 0
    assert len(calls) == 7 + 20 - 6
    assert {numbers["pairs"] for numbers in tables(tmp_path / "out")["magsac", "all"].values()} == {10}


@pytest.mark.parametrize("damage, message", [
    (lambda sequence: (sequence / "3.png").unlink(), "no image"),
    (lambda sequence: (sequence / "3.png").write_bytes(b"no image"), "not a readable image"),
    (lambda sequence: (sequence / "H_1_6").unlink(), "H_1_6"),
    (lambda sequence: np.savetxt(sequence / "H_1_2", np.full((3, 3), np.nan)), "finite"),
    (lambda sequence: np.savetxt(sequence / "H_1_2", np.ones((3, 3))), "invertible"),
    (lambda sequence: np.savetxt(sequence / "H_1_2", [[1, 0, 0], [0, 1, 0], [-0.01, 0, 1]]), "to infinity"),
    (lambda sequence: (sequence / "H_1_2").write_text("1 0 0 0 1"), "3x3 numbers"),
])
def test_a_file_that_cannot_be_right_is_named(folder, damage, message):
    damage(folder / "v_wall")
    pair_set = HPatchesPairSet(folder, lambda image: Features(NONE, NONE[:, 0], NONE, image.shape[1::-1]))
    with pytest.raises(InputError, match=message):
        pair_set[5]


def test_a_sequence_with_a_bad_file_is_skipped_and_named_once(folder, tmp_path, capsys):
    np.savetxt(folder / "v_wall" / "H_1_2", np.full((3, 3), np.nan))
    assert run(eval_imp.main, command(folder, tmp_path / "out", "--limit", 6)) == 1
    *_, heading, line = capsys.readouterr().err.strip().splitlines()
    assert heading == "1 sequences skipped:" and line.startswith("  v_wall: ") and "finite" in line
    assert {part for _, part in tables(tmp_path / "out")} == {"all", "illumination"}


def test_homographies_that_are_hardly_one_pass(tmp_path):
    np.savetxt(tmp_path / "H", np.eye(3) * 1e-3)
    np.testing.assert_array_equal(read_homography(tmp_path / "H", SIZE), np.eye(3) * 1e-3)
    np.savetxt(tmp_path / "H", -np.eye(3))
    assert corner_error(read_homography(tmp_path / "H", SIZE), np.eye(3), SIZE) == 0
    with pytest.raises(InputError, match="H2"):
        read_homography(tmp_path / "H2", SIZE)


def test_what_does_not_go_with_homographies_is_said(sequences, tmp_path, capsys):
    for options, message in ((["--use_iterative"], "--use_iterative does not go"), (["--resize", 640], "--resize"),
                             (["--estimator", "pycolmap"], "--estimator magsac, ransac, poselib or all"),
                             (["--protocol", "published"], "--estimator"), (["--pairs", "list.txt"], "--pairs")):
        with pytest.raises(SystemExit):
            eval_imp.main(command(sequences, tmp_path, *options))
        assert message in capsys.readouterr().err
    assert run(eval_imp.main, command(tmp_path, tmp_path / "out")) == 2
    assert "no sequences of HPatches" in capsys.readouterr().err
    assert run(eval_imp.main, ["--matching_method", "NN", "--dataset", "hpatches", "--feature_type", "sift"]) == 2
    assert "--image_dir" in capsys.readouterr().err
